"""The table and the picture of results, on whatever shows them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from bmm_engine.demo.picture import results_picture
from bmm_engine.demo.results import Results

TASKS = ("reuters", "newsgroups", "election", "movies", "tweets")


@pytest.fixture
def results() -> Results:
    found = Results(dict.fromkeys(TASKS, 0.8))
    for method, score in (("experts", 0.8), ("BMM data-free", 0.6), ("bmm merge", 0.4)):
        found.add(method, dict.fromkeys(TASKS, score), seconds=1.0)
    return found


def printed(results: Results, width: int, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(width=width, file=file).print(results.table())
    file.seek(0)
    return [line.rstrip() for line in file.read().splitlines()]


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize(("encoding", "block"), [("utf-8", "\N{FULL BLOCK}"), ("ascii", "#")])
def test_bars_are_as_long_as_the_shares(results: Results, width: int, encoding: str, block: str) -> None:
    lines = printed(results, width, encoding)
    assert max(map(len, lines)) <= width
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    rows = {name: next(line for line in lines if line.startswith(name)) for name in ("experts", "BMM", "bmm merge")}
    whole, three_quarters, half = (row.count(block) for row in rows.values())
    assert whole >= (26 if width == 100 else 5)
    assert abs(three_quarters - 0.75 * whole) <= 1
    assert abs(half - 0.5 * whole) <= 1
    assert [row.split()[-1] for row in rows.values()] == ["100.0", "75.0", "50.0"]


def test_a_merge_above_its_experts_fits(results: Results) -> None:
    results.add("better", dict.fromkeys(TASKS, 0.9), seconds=1.0)
    lines = printed(results, 100)
    assert max(map(len, lines)) <= 100
    assert lines[-1].endswith(" 112.5")
    assert lines[2].count("\N{FULL BLOCK}") < lines[-1].count("\N{FULL BLOCK}") == 26


def test_the_picture_shows_any_number_of_rows(results: Results, tmp_path: Path) -> None:
    whole = results_picture(results.rows, tmp_path / "whole.png").read_bytes()
    few = results_picture(results.rows[:2], tmp_path / "few.png").read_bytes()
    assert whole.startswith(b"\x89PNG")
    assert few.startswith(b"\x89PNG")
    assert whole != few
