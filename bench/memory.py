"""`python -m bench.memory`: peak resident memory of a whole merge of Llama-shaped checkpoints, beside its bound.

The bound: 3 x the largest shard of one checkpoint + 1 GiB. The default shape has 1.2 billion parameters (Llama-3.2-1B's), 3 experts, 500 MB
shards; it needs 12 GB of disk and some minutes. The merge runs in a process of its own, whose high-water mark is what is reported.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bmm_engine.checkpoint import Checkpoint, CheckpointWriter, TensorSpec


def llama_shapes(
    layers: int, hidden: int, intermediate: int, vocabulary: int, key_value: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (key_value, hidden),
            f"{prefix}.self_attn.v_proj.weight": (key_value, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    return {**shapes, "model.norm.weight": (hidden,)}


def make_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], heads: int, seed: int, shard: str) -> None:
    """bfloat16 weights that all checkpoints share, plus, for a `seed` above 0, a small task vector of their own."""
    specs = [TensorSpec(name, shape, torch.bfloat16, "memory") for name, shape in shapes.items()]
    hidden = shapes["model.norm.weight"][0]
    key_value = shapes["model.layers.0.self_attn.k_proj.weight"][0]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in shapes),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value * heads // hidden,
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "tie_word_embeddings": True,
    }
    generator = torch.Generator()
    with CheckpointWriter(folder, specs, max_shard_bytes=shard) as writer:
        for position, spec in enumerate(specs):
            generator.manual_seed(position)
            tensor = torch.empty(spec.shape, dtype=spec.dtype).normal_(0, 0.02, generator=generator)
            if seed:
                generator.manual_seed(seed * 100_003 + position)
                tensor += torch.empty(spec.shape, dtype=spec.dtype).normal_(0, 0.002, generator=generator)
            writer.write(spec.name, tensor)
        writer.write_json("config.json", config)
        writer.commit()


def child(folder: Path, experts: int) -> None:
    from bmm_engine import merge

    started = time.perf_counter()
    paths = [folder / f"expert-{i}" for i in range(1, experts + 1)]
    result = merge(folder / "base", paths, output=folder / "merged", max_shard_size="500MB")
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"modules": len(result.modules), "seconds": time.perf_counter() - started, "peak_mib": peak_mib}))


def run(folder: Path, *, experts: int, heads: int, shard: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, object]:
    """Make the checkpoints in `folder`, merge them data-free on the average in a child process, and report."""
    for seed in range(experts + 1):
        make_checkpoint(folder / (f"expert-{seed}" if seed else "base"), shapes, heads, seed, shard)
    largest = max(Checkpoint.open(folder / "base").shard_sizes().values())
    command = [sys.executable, "-m", "bench.memory", "--child", str(folder), "--experts", str(experts)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    bound_mib = 3 * largest / 2**20 + 1024
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return {"parameters": parameters, "experts": experts, **measured, "bound_mib": bound_mib}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where the checkpoints go for the time of the run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.experts)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        shapes = llama_shapes(arguments.layers, 2048, 8192, 128_256, 512)
        report = run(Path(folder), experts=arguments.experts, heads=32, shard="500MB", shapes=shapes)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
