from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from bench.harness import table, write_json

NAMES = ("gram", "assemble")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks, each behind a correctness gate.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for row in importlib.import_module(f"bench.{arguments.name}").run(torch.device(arguments.device)):
        rows.append(row)
        print(f"{row.op} {row.dtype} {row.shape}: {row.ours_ms:.3f} ms, {row.ratio:.2f} x {row.rival}", flush=True)
    print(f"\n{rows[0].hardware}, commit {rows[0].commit}\n{table(rows)}")
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
