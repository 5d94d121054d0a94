"""The README's picture: its numbers are those of the committed rows, and the committed file shows them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from bench import __main__ as bench
from bench.accuracy import picture, results

PICTURE = picture.RESULTS / "methods.png"


def numbers(path: Path) -> list[dict]:
    with Image.open(path) as image:
        return json.loads(image.text["Description"])


def committed(file: str, method: str, anchor: str) -> list[dict]:
    rows = json.loads((picture.RESULTS / file).read_text())
    return [row for row in rows if (row["method"], row["anchor"]) == (method, anchor)]


@pytest.mark.parametrize(
    ("suite", "label", "file", "row"),
    [
        ("text8", "bmm merge", "text8.json", ("sequential, weighted outputs", "average")),
        ("text8", "BMM, plain", "text8.json", ("hybrid, weighted outputs", "average")),
        ("vision4", "BMM, data-free", "vision4.json", ("data-free", "average")),
        ("vision4", "TSV-M", "vision4.json", ("anchor", "tsv_m")),
        ("text8", "RegMean", "text8-seed0.json", ("anchor", "regmean")),
        ("vision4", "RegMean++", "vision4-seed0.json", ("anchor", "regmean_plusplus")),
    ],
)
def test_a_bar_is_what_the_committed_rows_say(suite, label, file, row):
    (bar,) = (bar for bar in picture.read(picture.RESULTS) if (bar.suite, bar.label) == (suite, label))
    own = committed(file, *row)
    assert bar.seeds == len(own) == (1 if "seed0" in file else 3)
    assert bar.mean == pytest.approx(100 * sum(r["normalised"] for r in own) / len(own), rel=1e-12)
    assert bar.worst == pytest.approx(100 * min(r["worst"] for r in own), rel=1e-12)


def test_the_best_other_rule_is_the_best_of_all_at_any_scale():
    found = {bar.suite: bar for bar in picture.read(picture.RESULTS) if bar.label == picture.BEST}
    for suite, bar in found.items():
        rows = json.loads((picture.RESULTS / f"{suite}-seed0.json").read_text())
        rules = [r for r in rows if r["method"].startswith("anchor")]
        assert len({r["anchor"] for r in rules}) >= 30
        assert bar.mean == pytest.approx(100 * max(r["normalised"] for r in rules), rel=1e-12)
    assert {suite: bar.note for suite, bar in found.items()} == {
        "text8": "iso_cts, scale 2",
        "vision4": "regmean_plusplus",
    }


def test_what_is_drawn_is_what_was_read():
    found = picture.read(picture.RESULTS)
    found = [replace(bar, mean=41.5, worst=12.5) if bar.label == "TIES" else bar for bar in found]
    panels = picture.figure(found).axes
    labels = {y: text.get_text() for y, text in zip(panels[0].get_yticks(), panels[0].get_yticklabels())}
    for axes, suite in zip(panels, ("text8", "vision4")):
        own = {bar.label: bar for bar in found if bar.suite == suite}
        drawn = {labels[round(p.get_y() + p.get_height() / 2, 9)]: p.get_width() for p in axes.patches}
        assert drawn == {label: bar.mean for label, bar in own.items()}
        diamonds = [line for line in axes.lines if line.get_marker() == "D" and len(line.get_xdata())]
        assert {labels[line.get_ydata()[0]]: line.get_xdata()[0] for line in diamonds} == {
            label: bar.worst for label, bar in own.items()
        }
        shown = {text.get_text().rstrip("*") for text in axes.texts}
        assert {f"{bar.mean:.1f}" for bar in own.values()} <= shown


def test_the_command_draws_from_given_rows(tmp_path, capsys):
    for suite in ("text8", "vision4"):
        for name in (f"{suite}.json", f"{suite}-seed0.json"):
            rows = results.read(picture.RESULTS / name)
            results.write([replace(r, normalised=r.normalised / 2) for r in rows], tmp_path / name)
    given = ["accuracy-picture", "--results", str(tmp_path), "--plot", str(tmp_path / "new" / "p.png")]
    assert bench.main(given) == 0
    halves = numbers(tmp_path / "new" / "p.png")
    whole = [asdict(bar) for bar in picture.read(picture.RESULTS)]
    assert [bar["label"] for bar in halves] == [bar["label"] for bar in whole]
    assert [bar["mean"] for bar in halves] == pytest.approx([bar["mean"] / 2 for bar in whole], rel=1e-12)
    assert "text8 bmm merge: 49.1 / 95.4, seeds: 3" in capsys.readouterr().out


def test_the_committed_picture_shows_the_committed_rows():
    assert PICTURE.stat().st_size < 60_000
    assert numbers(PICTURE) == [asdict(bar) for bar in picture.read(picture.RESULTS)], (
        f"draw it again: python -m bench accuracy-picture --plot {PICTURE}"
    )
