"""`python -m bench.sequential`: time and peak memory of a whole sequential merge, from checkpoints to checkpoint, in a process of its own.

By default of MiniLM's shape (6 layers, width 384), 8 experts and 256 sentences of 6 to 42 tokens for each, 24 on average; weights are
random, fine-tunes are the base plus noise. The time includes importing transformers. `tflop`: multiplications and additions of the formula's own
products and of the two passes, each computed once; `peak_share`: how much of what the machine can do at that moment they make of the time.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import peak, processes

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def make_models(folder: Path, experts: int, shape: dict[str, Any]) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig(**shape), add_pooling_layer=False)
    base.save_pretrained(folder / "base")
    clean = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for t in range(experts):
        torch.manual_seed(t + 1)
        noise = 0.005
        base.load_state_dict(
            {n: w + noise * torch.randn_like(w) if w.is_floating_point() else w for n, w in clean.items()}
        )
        base.save_pretrained(folder / f"expert-{t}")


def make_batches(seed: int, sentences: int, vocabulary: int, batch_size: int = 16) -> list[dict[str, torch.Tensor]]:
    """Sentences sorted by length, padded to the longest of each batch."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 43, (sentences,), generator=generator).sort().values
    batches = []
    for rows in lengths.split(batch_size):
        mask = (torch.arange(int(rows.max()))[None] < rows[:, None]).long()
        tokens = torch.randint(5, vocabulary, mask.shape, generator=generator)
        batches.append({"input_ids": tokens * mask, "attention_mask": mask})
    return batches


def child(folder: Path, experts: int, sentences: int, vocabulary: int, anchor: str, target: str) -> None:
    from bmm_engine import merge_sequential

    batches = [make_batches(t, sentences, vocabulary) for t in range(experts)]
    tokens = sum(int(b["attention_mask"].sum()) for own in batches for b in own)
    started = time.perf_counter()
    paths = [folder / f"expert-{t}" for t in range(experts)]
    options: dict[str, Any] = {"anchor": anchor, "target": target, "output": folder / "merged", "progress": False}
    result = merge_sequential(folder / "base", paths, batches, **options)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "modules": len(result.modules), "tokens": tokens}))


def tflop(shape: dict[str, Any], tokens: int, experts: int) -> float:
    """What a merge of a BERT needs, without attention scores: for each token the passes of its expert and of the merged network and the moments
    (those of a Gram by half, it is symmetric); for each expert the products of the solves and of the record."""
    d, f = shape["hidden_size"], shape["intermediate_size"]
    passes = 2 * 2 * (4 * d * d + 2 * d * f)
    drift = 4 * d * d  # G~, D^T X~, D^T D: of the inputs of query, key and value, and of the MLP
    writers = (7 * d * d) + (f * f + 6 * f * d)  # G~, D W^T, its product with X~, X U^T
    solves = 3 * 2 * (4 * d**3 + f * d * d + d * f * f)  # (W_t - W_a) G~, and two misfits
    return shape["num_hidden_layers"] * (tokens * (passes + 2 * drift + writers) + experts * solves) * 1e-12


def run(
    folder: Path, *, experts: int, sentences: int, anchor: str, target: str, shape: dict[str, Any]
) -> dict[str, Any]:
    make_models(folder, experts, shape)
    vocabulary = shape.get("vocab_size", 30522)
    command = [sys.executable, "-m", "bench.sequential", "--child", str(folder), "--vocabulary", str(vocabulary)]
    command += ["--experts", str(experts), "--sentences", str(sentences), "--anchor", anchor, "--target", target]
    log = folder / "log"
    device = torch.device("cpu")
    before = peak.measured(device, "fp32")
    memory = processes.run(command, log).peak_mib
    peak.measured.cache_clear()
    after = peak.measured(device, "fp32")
    measured = json.loads(log.read_text().splitlines()[-1])
    work = tflop(shape, measured["tokens"], experts)
    measured["tflop"] = work
    if before and after:
        measured["peak_tflops"] = (before + after) / 2
        measured["peak_share"] = work / measured["seconds"] / measured["peak_tflops"]
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    given = {"experts": experts, "sentences": sentences, "anchor": anchor, "target": target}
    return {**given, **measured, "peak_mib": memory, **machine}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sequential", description=__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--sentences", type=int, default=256, help="for each expert")
    parser.add_argument("--anchor", default="average")
    parser.add_argument("--target", choices=("stream", "module"), default="stream")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, default=30522, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = {key: getattr(arguments, key) for key in ("experts", "sentences", "anchor", "target")}
    if arguments.child:
        return child(arguments.child, vocabulary=arguments.vocabulary, **options)
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), shape=MINILM, **options)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
