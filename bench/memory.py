"""`python -m bench.memory`: peak resident memory of a whole merge of Llama-shaped checkpoints, beside its bound.

The bound: 3 x the largest shard of one checkpoint + 1 GiB. The default shape has 1.2 billion parameters (Llama-3.2-1B's), 3 experts, 500 MB
shards; it needs 12 GB of disk and some minutes. The merge runs in a process of its own, whose high-water mark is what is reported.

With `--sequential`, the mode sequential on random tokens, `--samples` of 64 for each expert; its bound is 6 GiB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from bench import processes
from bench.llama import Shapes, llama_shapes, make_checkpoint, parameter_count
from bmm_engine.checkpoint import Checkpoint

SEQUENTIAL_MIB = 6 * 1024
TOKENS = 64


def child(folder: Path, experts: int, samples: int) -> None:
    """Data-free where there are no `samples`, else sequential."""
    from bmm_engine import merge, merge_sequential

    started = time.perf_counter()
    paths = [folder / f"expert-{i}" for i in range(1, experts + 1)]
    if samples:
        batches = list(map(partial(_batches, folder, samples), range(experts)))
        result = merge_sequential(
            folder / "base", paths, batches, mask=None, output=folder / "merged", max_shard_size="500MB"
        )
    else:
        result = merge(folder / "base", paths, output=folder / "merged", max_shard_size="500MB")
    print(json.dumps({"modules": len(result.modules), "seconds": time.perf_counter() - started}))


def _batches(folder: Path, samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
    vocabulary = json.loads((folder / "base" / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(0, vocabulary, (samples, TOKENS), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": rows} for rows in tokens.split(8)]


def run(folder: Path, *, experts: int, heads: int, shard: str, shapes: Shapes, samples: int = 0) -> dict[str, object]:
    """Make the checkpoints in `folder`, merge them on the average in a child process, data-free or, with `samples`, sequentially, and report."""
    for seed in range(experts + 1):
        make_checkpoint(folder / (f"expert-{seed}" if seed else "base"), shapes, heads, seed, shard)
    largest = max(Checkpoint.open(folder / "base").shard_sizes().values())
    command = [sys.executable, "-m", "bench.memory", "--child", str(folder), "--experts", str(experts)]
    command += ["--samples", str(samples)]
    log = folder / "log"
    measured = {"peak_mib": processes.run(command, log).peak_mib, **json.loads(log.read_text().splitlines()[-1])}
    bound_mib = SEQUENTIAL_MIB if samples else 3 * largest / 2**20 + 1024
    mode = {"mode": "sequential", "tokens": samples * TOKENS * experts} if samples else {"mode": "plain"}
    return {"parameters": parameter_count(shapes), "experts": experts, **mode, **measured, "bound_mib": bound_mib}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where the checkpoints go for the time of the run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sequential", action="store_true", help="the mode sequential")
    parser.add_argument("--samples", type=int, default=32, help="of the mode sequential: sequences for each expert")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.experts, arguments.samples)
    samples = arguments.samples if arguments.sequential else 0
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        shapes = llama_shapes(arguments.layers, 2048, 8192, 128_256, 512)
        report = run(Path(folder), experts=arguments.experts, heads=32, shard="500MB", shapes=shapes, samples=samples)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
