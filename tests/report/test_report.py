"""The report of studies in every state: one page without anything from outside, and pictures."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from bmm_engine.errors import OutputExistsError, OutputWriteError, StudyError
from bmm_engine.evaluators.scores import Score
from bmm_engine.report import write_report
from bmm_engine.report.charts import charts
from bmm_engine.report.contents import Contents
from bmm_engine.report.document import document, save
from bmm_engine.report.figures import Look, render
from bmm_engine.searching.study import Study

ROLES = {"attention_in": "query", "attention_out": "output", "mlp_in": "up", "mlp_out": "down"}


def score(value, samples=200):
    spread = math.sqrt(value * (1 - value) / samples) if samples else math.nan
    return Score(value, samples, value - 2 * spread, min(1.0, value + 2 * spread), "accuracy")


def make_study(
    folder, *, tasks=3, layers=4, trials=20, anchors=("average", "tsv_m"), test=True, alignment=True, odd="", done=True
):
    names = [f"task{odd}{i}" for i in range(tasks)]
    modules = {
        f"layer.{layer}.{leaf}": {"role": role, "layer": layer, "group": f"{role}.{layer // 2}"}
        for layer in range(layers)
        for role, leaf in ROLES.items()
    }
    modules["pooler"] = {"role": "other", "layer": None, "group": "other.0"}
    groups = {}
    for module, own in modules.items():
        groups.setdefault(own["group"], []).append(module)
    record = {
        "identity": {"of": folder.name}, "recipe": {"base": f"b{odd}"}, "tasks": names, "anchors": list(anchors),
        "objective": "mean", "optimizer": "BO",
        "seed": 0, "budget": {"trials": trials, "minutes": None}, "modules": modules, "versions": {"torch": "2"},
        "groups": [{"name": g, "role": g.split(".")[0], "depth": 0, "modules": own} for g, own in groups.items()],
    }  # fmt: skip
    rng = random.Random(0)
    with Study.create(folder, record) as study:
        experts = {t: score(0.9) for t in names}
        splits = ("validation", "test") if test else ("validation",)
        study.set_fact("experts", {s: {t: own.plain() for t, own in experts.items()} for s in splits})
        tested = {}
        for n in range(trials):
            kind = "anchor" if n < len(anchors) else "default" if n < 2 * len(anchors) else "proposed"
            alpha = {g: "inf" if kind == "anchor" or rng.random() < 0.1 else 10 ** rng.uniform(-3, 3) for g in groups}
            parameters = {
                "anchor": anchors[n % len(anchors)],
                "alpha": alpha,
                "scale": dict.fromkeys(groups, 1.0),
                "task_weights": "none",
            }
            study.add(kind, parameters, waiting=False, worker="driver")
            values = {t: score(rng.uniform(0.5, 0.9)) for t in names}
            if n % 7 == 6:
                study.tell(n, None, state="failed", error="logits are not finite")
                continue
            if n % 7 == 5:
                values = {names[0]: values[names[0]]}
            study.evaluated(n, values, 2.0, 1.9, "driver")
            value = sum(v.value for v in values.values()) / len(values) / 0.9
            study.tell(n, value, state="pruned" if n % 7 == 5 else "finished")
            if test and kind != "proposed":
                tested[str(n)] = {t: score(0.7).plain() for t in names}
        best = study.best()
        if test and best is not None:
            tested[str(best.number)] = {t: score(0.75).plain() for t in names}
        study.set_fact("test", tested)
        if alignment:
            study.set_fact("alignment", {m: {t: rng.random() for t in names} for m in modules})
        if done and best is not None:
            study.set_fact(
                "result", {"best": best.number, "seconds": 120.0, "finished_at": "2999-01-01T00:00:00+00:00"}
            )
    return folder


class Parsed(HTMLParser):
    """Tags that are opened and closed in order, what they refer to, and the text."""

    VOID = frozenset({"meta", "link", "img", "source"})

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.text, self.tags, self.alts = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "srcset", "href"):
                self.references.append(value)
            if key == "alt":
                self.alts.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(path):
    return Parsed(path.read_text(encoding="utf-8"))


def test_a_whole_study_is_one_page_with_all_pictures(tmp_path):
    path = write_report(make_study(tmp_path / "m.study"))
    page = parsed(path)
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    assert "script" not in page.tags
    names = {"best_so_far", "tasks", "ridge", "validation_test", "alignment"}
    assert {p.stem for p in path.parent.glob("*.png")} == names
    for p in path.parent.glob("*.png"):
        assert p.read_bytes().startswith(b"\x89PNG")
    assert page.tags.count("picture") == len(names)
    assert all(len(alt) > 20 for alt in page.alts)
    text = " ".join(page.text)
    assert "20 of 20 trials in 2 min" in text
    assert "5.0 % of a trial's time is not evaluation" in text
    assert "logits are not finite" in text
    assert not list(path.parent.glob(".*.tmp"))


@pytest.mark.parametrize(
    "options",
    [
        {"trials": 0},
        {"trials": 1, "tasks": 1, "test": False, "alignment": False, "done": False},
        {"tasks": 20, "anchors": ("average",), "trials": 8},
        {"layers": 40, "trials": 6},
    ],
    ids=["nothing yet", "one trial", "twenty tasks", "many layers"],
)
def test_studies_of_every_size_can_be_drawn(tmp_path, options):
    folder = make_study(tmp_path / "m.study", **options)
    with Study.open(folder, readonly=True) as study:
        found = charts(Contents.of(study))
    for chart in found:
        for look in (Look(False, False), Look(True, True)):
            assert b"<svg" in render(chart, look, "svg")
    expected = set() if not options["trials"] else {"best_so_far", "tasks", "ridge"}
    assert {c.name for c in found} >= expected


def test_a_study_without_trials_says_so(tmp_path):
    path = write_report(make_study(tmp_path / "m.study", trials=0, alignment=False))
    text = " ".join(parsed(path).text)
    assert "No trial has finished yet" in text
    assert "stopped before its end" in text


def test_names_are_text_and_never_markup(tmp_path):
    path = write_report(
        make_study(
            tmp_path / "m.study", trials=2, layers=1, test=False, odd="<script>alert('x')</script>&\"", alignment=False
        )
    )
    page = parsed(path)
    assert "script" not in page.tags
    assert any("<script>alert('x')</script>" in text for text in page.text)


def test_names_that_no_font_or_formula_can_hold(tmp_path):
    folder = make_study(tmp_path / "m.study", trials=3, layers=1, test=False, odd="$a_{$ 日本", alignment=False)
    with Study.open(folder, readonly=True) as study:
        for chart in charts(Contents.of(study)):
            assert render(chart, Look(False, False), "svg")


def test_a_finished_study_that_went_on_and_stopped_says_so(tmp_path):
    folder = make_study(tmp_path / "m.study", trials=3, layers=1, test=False, alignment=False)
    with Study.open(folder) as study:
        study.set_fact("result", {"best": 0, "seconds": 1.0, "finished_at": "2999-01-01T00:00:00+00:00"})
        assert Contents.of(study).complete
        study.add("proposed", study.trial(2).parameters | {"anchor": "tsv_m"}, waiting=True)
        assert not Contents.of(study).complete


def test_a_report_runs_no_code_that_a_study_names(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = make_study(tmp_path / "m.study", trials=2, layers=1, test=False, alignment=False)
    with Study.open(folder, readonly=True) as study:
        study.record["objective"] = "evil:objective"
        assert Contents.of(study).objective is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match="file"):
        write_report(folder, tmp_path / "file")


def test_the_same_study_gives_the_same_bytes(tmp_path):
    folder = make_study(tmp_path / "m.study", trials=3, layers=2, test=False, alignment=False)
    first = write_report(folder, tmp_path / "a").read_bytes()
    assert write_report(folder, tmp_path / "b").read_bytes() == first
    assert not re.search(rb"https?://(?!www\.w3\.org)", first)


def test_what_is_no_study_is_said(tmp_path):
    with pytest.raises(StudyError):
        write_report(tmp_path)


def test_a_report_replaces_only_a_report(tmp_path):
    page = document("title", ["text"])
    for name in ("report.html", "picture.png"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("precious")
        chart = SimpleNamespace(name="picture")
        with pytest.raises(OutputExistsError, match=rf"holds '{name}' of something else"):
            save(folder, page, [chart])
        assert [(p.name, p.read_text()) for p in folder.iterdir()] == [(name, "precious")]
    save(tmp_path / "new", page, [])
    save(tmp_path / "new", document("other", []), [])
    assert "other" in (tmp_path / "new" / "report.html").read_text()
