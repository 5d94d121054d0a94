"""Reading and writing take the memory of one tensor, not of the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
COUNT, ROWS, WIDTH = 10, 10 * 1024, 1024  # ten float32 tensors of 40 MiB

SCRIPT = """
import sys, torch
from pathlib import Path
from bmm_engine.checkpoint import Checkpoint, CheckpointWriter

def peak_bytes():
    # Not ru_maxrss: that one starts at the size of the process that started this one.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024

path, mode = Path(sys.argv[1]), sys.argv[2]
torch.ones(1024).sum()
before = peak_bytes()
checkpoint = Checkpoint.open(path)
total = 0
if mode == "whole":
    for name in checkpoint.names():
        total += int(checkpoint.load(name).count_nonzero())
else:
    with CheckpointWriter(path.parent / "copy", [checkpoint.spec(name) for name in checkpoint.names()]) as writer:
        for name in checkpoint.names():
            for start in range(0, 10240, 1024):
                rows = slice(start, start + 1024)
                block = checkpoint.load(name, rows)
                total += int(block.count_nonzero())
                writer.write(name, block, rows)
        writer.commit()
print(total, peak_bytes() - before)
"""


@pytest.fixture(scope="module")
def sparse_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 400 MiB that takes almost no disk: zeros, and one 1.0 at the start of each tensor."""
    nbytes = ROWS * WIDTH * 4
    header = {
        f"t{i}": {"dtype": "F32", "shape": [ROWS, WIDTH], "data_offsets": [i * nbytes, (i + 1) * nbytes]}
        for i in range(COUNT)
    }
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i in range(COUNT):
            file.seek(8 + len(text) + i * nbytes)
            file.write(b"\x00\x00\x80\x3f")
        file.truncate(8 + len(text) + COUNT * nbytes)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("mode", "bound_bytes"),
    [("whole", 2 * 40 * MIB + 30 * MIB), ("copy", 2 * 4 * MIB + 30 * MIB)],
)
def test_peak_memory(sparse_file: Path, mode: str, bound_bytes: int) -> None:
    """At most two blocks at once (the old one goes when the new one is bound) and 30 MiB for everything else."""
    # Freed blocks go back to the system: the peak is then what is held, not what the C library keeps for later.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", SCRIPT, str(sparse_file), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    nonzero, peak_bytes = map(int, done.stdout.split())
    assert nonzero == COUNT
    assert peak_bytes < bound_bytes
