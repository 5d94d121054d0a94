"""Rows of results: what they hold, as JSON and as a table; which machine and commit they are of."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

import torch


@cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        import triton  # torch for CUDA brings it

        found |= {"cuda": str(torch.version.cuda), "triton": triton.__version__}
    return found


@dataclass(frozen=True)
class Row:
    """One measurement of ours beside one rival, timed in the same run. Speeds, shares and memory are of ours. None: not measured."""

    op: str
    backend: str  # of ours
    device: str  # cpu or cuda
    hardware: str
    dtype: str  # of what is read: rows, weights, Grams
    shape: str
    rival: str  # "-" for none
    ours_ms: float | None  # median
    ours_spread: float | None  # interquartile range / median
    rival_ms: float | None
    rival_spread: float | None
    ratio: float | None  # rival_ms / ours_ms
    tflops: float | None  # operations executed, a multiply-add being two; half of X^T X for a Gram
    peak_share: (
        float | None
    )  # of what bounds the op: fp32, fp64 or bf16 arithmetic, or copy bandwidth (`python -m bench peak`)
    gbytes_per_s: float | None  # bytes that must be read and written, once each
    peak_mib: (
        float | None
    )  # memory one call takes beyond what was held before; of a whole merge, the high-water mark of its process
    # max |ours - truth| / max |truth| in float64; of a solve, its normwise backward error; of a merge, ||ours - truth|| / ||truth - base||
    error: float | None
    rival_error: float | None
    commit: str  # with a plus: of a changed working tree
    versions: dict[str, str] = field(default_factory=versions)
    rival_mib: float | None = None
    private_mib: float | None = None  # of a whole merge: without pages of mapped files, which the system can take back
    rival_private_mib: float | None = None


@cache
def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


@cache
def commit() -> str:
    """The commit of the working tree, with a plus when it has changes; "unknown" outside a repository."""

    def git(*command: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(rows: Sequence[Row], path: Path) -> None:
    """A JSON list of the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read_json(path: Path) -> list[Row]:
    """The rows of a file by `write_json`. A key that an older file lacks is None; a file of something else gives ValueError."""
    content = json.loads(path.read_text())
    if not isinstance(content, list) or not all(isinstance(row, dict) and "op" in row for row in content):
        raise ValueError(f"{path} holds no benchmark rows")
    return [Row(**{key.name: row.get(key.name) for key in fields(Row)}) for row in content]


_COLUMNS = {
    "op": "op",
    "backend": "backend",
    "shape": "shape",
    "dtype": "dtype",
    "ours_ms": "ours, ms",
    "rival": "rival",
    "rival_ms": "rival, ms",
    "ratio": "rival / ours",
    "tflops": "TFLOP/s",
    "gbytes_per_s": "GB/s",
    "peak_share": "of peak",
    "peak_mib": "MiB",
    "rival_mib": "rival, MiB",
    "error": "error",
    "rival_error": "rival's error",
}
_WHERE_MEASURED = ("rival_mib",)  # columns left out of a table that has nothing in them
_SPREADS = {"ours_ms": "ours_spread", "rival_ms": "rival_spread"}


def table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """All rows as one table under a line that names machines, commits and versions."""
    empty = {column for column in _WHERE_MEASURED if all(getattr(row, column) is None for row in rows)}
    shown = {column: title for column, title in _COLUMNS.items() if column not in empty}
    if len({row.hardware for row in rows}) > 1:
        shown["hardware"] = "hardware"
    lines = [list(shown.values())] + [[_cell(row, column) for column in shown] for row in rows]
    if markdown:
        lines.insert(1, ["---"] * len(shown))
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    else:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        body = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )
    origins = {
        f"{row.hardware}, commit {row.commit}, {', '.join(f'{name} {v}' for name, v in (row.versions or {}).items())}"
        for row in rows
    }
    return "\n".join([*sorted(origins), "", body])


def _cell(row: Row, column: str) -> str:
    value = getattr(row, column)
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if column == "peak_share":
        return f"{value:.0%}"
    spread = getattr(row, _SPREADS[column]) if column in _SPREADS else None
    return number(value) + (f" ±{spread:.0%}" if spread is not None else "")


def number(value: float) -> str:
    """Three digits, without an exponent where it can be read without one."""
    if value == 0 or 1e-3 <= abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.1e}"


def note(text: str) -> None:
    """What a reader of the results must know and a row does not say."""
    print(text, file=sys.stderr, flush=True)
