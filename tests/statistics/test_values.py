"""Files of what was measured are checked in one place where they are read: their record, their header, their values."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bmm_engine as bmm
from bmm_engine.errors import CheckpointError, NonFiniteGramError
from bmm_engine.statistics.fisher import FisherSet
from bmm_engine.statistics.grams import GramAccumulator, GramSet
from bmm_engine.statistics.sensitivity import SensitivitySet
from bmm_engine.statistics.values import check_gram

WIDTH = 6


def gram(seed=0, width=WIDTH, rows=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    own = GramAccumulator(width, name="a", dtype=dtype)
    return own.update(torch.randn(rows, width, generator=generator, dtype=dtype) + 2)


def write(kind, folder):
    path = folder / f"{kind}.safetensors"
    hashes = {"fingerprints": {"a": "0" * 16}, "calibration": "texts"}
    if kind == "grams":
        return GramSet({"a": gram()}, {"a": "a", "b": "a"}, aliases={"file.a": "a"}, **hashes).save(path)
    if kind == "fisher":
        return FisherSet({"a": torch.rand(3, 4)}, examples=4, labels="expected", **hashes).save(path)
    return SensitivitySet({"a": gram().mean()}, **hashes).save(path)


OPEN = {"grams": GramSet, "fisher": FisherSet, "sensitivity": SensitivitySet}


def spoilt(path, record=None, tensors=None, text=None):
    """The file with another record or other tensors."""
    with safe_open(path, framework="pt") as file:
        ((name, old),) = file.metadata().items()
    found = load_file(path)
    plain = json.loads(old)
    if record is not None:
        record(plain)
    if tensors is not None:
        tensors(found)
    save_file(found, path, {name: json.dumps(plain) if text is None else text})
    return path


@pytest.mark.parametrize("kind", OPEN)
def test_what_was_written_is_read(kind, tmp_path):
    own = OPEN[kind].load(write(kind, tmp_path))
    assert own.get("a") is not None


EVERY_RECORD = {
    "extra key": (lambda r: r.update(colour="red"), r"the key 'colour' is unknown"),
    "missing key": (lambda r: r.pop("calibration"), r"the key 'calibration' is missing"),
    "number for text": (lambda r: r.update(calibration=3), r"calibration = 3: it should be a valid string"),
    "null": (lambda r: r.update(fingerprints=None), r"fingerprints = None: it should be a valid dict"),
    "hash is no text": (lambda r: r.update(fingerprints={"a": 7}), r"fingerprints\.a = 7: it should be a valid string"),
    "dtype unknown": (lambda r: r.update(weights_dtype="int3"), r"weights_dtype = 'int3': .*'float32'"),
    "dtype a function of torch": (lambda r: r.update(weights_dtype="manual_seed"), r"weights_dtype = 'manual_seed'"),
    "hash of nothing": (lambda r: r.update(fingerprints={"z": "0"}), r"fingerprints names 'z', of which .* nothing"),
    "name of nothing": (lambda r: r.update(aliases={"b": "z"}), r"aliases names 'z', of which the file holds nothing"),
    "version is a list": (lambda r: r.update(version=[1]), r"format version \[1\], this engine reads 1"),
    "long": (lambda r: r.update(calibration=["x" * 9999]), r"calibration = .{1,90}: it should be"),
}


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("fault", EVERY_RECORD)
def test_records_that_do_not_fit(kind, fault, tmp_path):
    change, words = EVERY_RECORD[fault]
    path = spoilt(write(kind, tmp_path), change)
    with pytest.raises(CheckpointError, match=rf"{kind}\.safetensors: {words}.*Collect it again|{words}") as caught:
        OPEN[kind].load(path)
    assert str(path) in str(caught.value)
    assert "ollect it again" in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize(
    ("text", "words"),
    [("{nope", "not valid JSON"), ("[1]", "a JSON list"), ('{"version": 1, "version": 1}', "'version' is there twice")],
)
def test_metadata_that_is_no_json_object(kind, text, words, tmp_path):
    with pytest.raises(CheckpointError, match=rf"{kind}\.safetensors.*{words}"):
        OPEN[kind].load(spoilt(write(kind, tmp_path), text=text))


GRAM_RECORDS = {
    "fraction of a row": (lambda r: r["rows"].update(a=2.5), r"rows\.a = 2\.5"),
    "whole but a float": (lambda r: r["rows"].update(a=20.0), r"rows\.a = 20\.0"),
    "negative rows": (lambda r: r["rows"].update(a=-20), r"rows\.a = -20"),
    "no rows": (lambda r: r["rows"].update(a=0), r"rows\.a = 0"),
    "absurd rows": (lambda r: r["rows"].update(a=10**30), r"rows\.a = 1000"),
    "rows are true": (lambda r: r["rows"].update(a=True), r"rows\.a = True"),
    "rows are NaN": (lambda r: r["rows"].update(a=math.nan), "'a' is nan"),
    "rows of nothing": (lambda r: r["rows"].update(z=3), "rows names 'z'"),
    "a group without rows": (lambda r: r["rows"].pop("a"), "modules names 'a'"),
    "a module of no group": (lambda r: r["modules"].update(c="z"), "modules names 'z'"),
    "turned module of nothing": (lambda r: r["transposed"].append("z"), "transposed names 'z'"),
    "unknown kind": (lambda r: r.update(kind="wild"), "kind = 'wild'"),
    "a group that is a list": (lambda r: r["modules"].update(b=["a"]), r"modules\.b"),
}


@pytest.mark.parametrize("fault", GRAM_RECORDS)
def test_gram_records_that_do_not_fit(fault, tmp_path):
    change, words = GRAM_RECORDS[fault]
    with pytest.raises(CheckpointError, match=rf"grams\.safetensors: .*{words}"):
        GramSet.load(spoilt(write("grams", tmp_path), change))


HEADERS = {
    "tensor lacks": (lambda t: t.pop("gram.a"), r"'a'"),
    "sum lacks": (lambda t: t.pop("row_sum.a"), r"'a'"),
    "tensor too many": (lambda t: t.update(more=torch.ones(1)), "'more': the file's record tells nothing of it"),
    "oblong": (lambda t: t.update({"gram.a": torch.ones(6, 5)}), r"\(6, 5\)"),
    "empty": (lambda t: t.update({"gram.a": torch.ones(0, 0), "row_sum.a": torch.ones(0)}), r"\(0, 0\)"),
    "sum too short": (lambda t: t.update({"row_sum.a": torch.ones(5)}), r"\(5,\)"),
    "half": (lambda t: t.update({k: v.half() for k, v in t.items()}), "F16"),
    "whole numbers": (lambda t: t.update({k: v.long() for k, v in t.items()}), "I64"),
    "two dtypes": (lambda t: t.update({"row_sum.a": t["row_sum.a"].double()}), "F32.*F64"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_gram_headers_that_do_not_fit(fault, tmp_path):
    change, words = HEADERS[fault]
    with pytest.raises(CheckpointError, match=rf"grams\.safetensors: .*{words}"):
        GramSet.load(spoilt(write("grams", tmp_path), tensors=change))


@pytest.mark.parametrize("kind", ["fisher", "sensitivity"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update(more=torch.ones(1)), "'more': .*tells nothing of it"),
        (lambda t: t.update({k: v.to(torch.bfloat16) for k, v in t.items()}), "BF16"),
        (lambda t: t.clear() or t.update(other=torch.ones(1)), "other"),
    ],
)
def test_other_headers_that_do_not_fit(kind, change, words, tmp_path):
    with pytest.raises(CheckpointError, match=rf"{kind}\.safetensors: .*{words}"):
        OPEN[kind].load(spoilt(write(kind, tmp_path), tensors=change))


def indefinite(g):
    """All its entries within what the diagonal allows, and yet with an eigenvalue below zero."""
    g.copy_(torch.eye(WIDTH))
    for i, j, value in ((0, 1, 0.9), (0, 2, 0.9), (1, 2, -0.9)):
        g[i, j] = g[j, i] = value


VALUES = {
    "zero": (lambda g: g.zero_(), CheckpointError, "all zero, though 20 rows"),
    "negative": (lambda g: g.neg_(), CheckpointError, "a sum of squares is not negative"),
    "lopsided": (lambda g: g[0, 3].add_(1), CheckpointError, r"not symmetric: entry \(0, 3\)|not symmetric: entry \(3, 0\)"),
    "too large beside the diagonal": (
        lambda g: [g[0, 3].fill_(1e6), g[3, 0].fill_(1e6)],
        CheckpointError,
        r"entry \([03], [03]\) is 1e\+06, its diagonal allows",
    ),
    "indefinite": (indefinite, CheckpointError, "has the eigenvalue -0"),
    "NaN": (lambda g: g[2, 3].fill_(math.nan), NonFiniteGramError, "'a' holds 1 entries that are NaN or infinite"),
    "infinite": (lambda g: g[2].fill_(math.inf), NonFiniteGramError, "'a' holds 6 entries that are NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", VALUES)
def test_grams_that_nobody_can_have_measured(fault, tmp_path):
    change, error, words = VALUES[fault]
    own = GramSet.load(spoilt(write("grams", tmp_path), tensors=lambda t: change(t["gram.a"])))
    with pytest.raises(error, match=rf"grams\.safetensors: .*{words}"):
        own.get("b")


def test_fewer_rows_than_the_sums_are_of(tmp_path):
    own = GramSet.load(spoilt(write("grams", tmp_path), lambda r: r["rows"].update(a=3)))
    with pytest.raises(CheckpointError, match=r"says that 3 rows were measured, its sums are of 1\d\.\d* at least"):
        own.get("a")
    nan = GramSet.load(spoilt(write("grams", tmp_path), tensors=lambda t: t["row_sum.a"][1].fill_(math.nan)))
    with pytest.raises(NonFiniteGramError, match=r"grams\.safetensors: the sum of the rows of 'a' holds 1"):
        nan.get("a")


@pytest.mark.parametrize("fault", ["negative", "lopsided", "NaN", "indefinite"])
def test_sensitivities_that_nobody_can_have_measured(fault, tmp_path):
    change, error, words = VALUES[fault]
    own = SensitivitySet.load(spoilt(write("sensitivity", tmp_path), tensors=lambda t: change(t["sensitivity.a"])))
    with pytest.raises(error, match=rf"sensitivity\.safetensors: .*{words}"):
        own.get("a")


def test_a_sensitivity_of_zero_is_one_where_the_record_tells_of_it(tmp_path):
    """A pooler that the head does not read has none; where another's is zero the file is damaged."""
    measured = {"a": gram().mean(), "pooler": torch.zeros(3, 3)}
    path = SensitivitySet(measured, calibration="texts").save(tmp_path / "sensitivity.safetensors")
    own = SensitivitySet.load(path)
    assert own.unread == ["pooler"]
    assert torch.equal(own.get("pooler"), measured["pooler"])
    assert torch.equal(own.get("a"), measured["a"])
    assert SensitivitySet.load(own.save(tmp_path / "again.safetensors")).unread == ["pooler"]
    for name, words in (("a", "is all zero, by the file's record it was not 0"), ("pooler", "is not 0, by")):
        damaged = tmp_path / f"{name}.safetensors"
        SensitivitySet(measured, calibration="texts").save(damaged)
        other = torch.zeros(6, 6) if name == "a" else torch.ones(3, 3)
        spoilt(damaged, tensors=lambda t, own=name, other=other: t.update({f"sensitivity.{own}": other}))
        with pytest.raises(CheckpointError, match=rf"{name}\.safetensors: the sensitivity of '{name}' {words}"):
            SensitivitySet.load(damaged).get(name)


@pytest.mark.parametrize(
    ("unread", "words"),
    [
        (["a"], "depend on none of its 1 modules"),
        (["z"], "unread names 'z'"),
        ("a", "unread = 'a'"),
        (None, "unread = None"),
    ],
)
def test_records_of_what_is_not_read(unread, words, tmp_path):
    with pytest.raises(CheckpointError, match=rf"sensitivity\.safetensors: .*{words}"):
        SensitivitySet.load(spoilt(write("sensitivity", tmp_path), lambda r: r.update(unread=unread)))


def test_the_shape_of_a_sensitivity(tmp_path):
    path = write("sensitivity", tmp_path)
    path = spoilt(path, tensors=lambda t: t.update({"sensitivity.a": torch.ones(2, 3)}))
    with pytest.raises(CheckpointError, match=r"'a' has shape \(2, 3\)"):
        SensitivitySet.load(path)


@pytest.mark.parametrize(
    ("value", "words"), [(-1.0, "1 negative entries, the lowest -1"), (math.inf, "1 .*infinite"), (math.nan, "1 .*NaN")]
)
def test_fisher_information_that_nobody_can_have_measured(value, words, tmp_path):
    own = FisherSet.load(spoilt(write("fisher", tmp_path), tensors=lambda t: t["fisher.a"][1, 2].fill_(value)))
    for rows in (None, slice(1, 2)):
        with pytest.raises(CheckpointError, match=rf"fisher\.safetensors: the Fisher information of 'a' holds {words}"):
            own.get("a", rows)
    assert own.get("a", slice(0, 1)).shape == (1, 4)
    with pytest.raises(CheckpointError, match=r"examples = 2\.5"):
        FisherSet.load(spoilt(write("fisher", tmp_path), lambda r: r.update(examples=2.5)))
    with pytest.raises(CheckpointError, match=r"buffers = 'a'"):
        FisherSet.load(spoilt(write("fisher", tmp_path), lambda r: r.update(buffers="a")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 400])
@pytest.mark.parametrize("width", [1, 7, 200, 300])
def test_what_is_measured_passes(rows, width, dtype):
    """Fewer rows than columns, columns that are equal, constant or zero, and far apart in size."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows), dtype=dtype)
    x[:, width // 2] = x[:, 0]
    x[:, -1] = 3.0
    if width > 2:
        x[:, 1] = 0
        x[:, 2] *= 1e6
    own = GramAccumulator(width, dtype=dtype)
    for part in x.split(7):
        own.update(part)
    check_gram(own.total, own.row_sum, own.rows, "here", "a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_whose_squares_are_zero_in_their_dtype(dtype):
    x = torch.ones(9, 4, dtype=dtype)
    x[:, 2] = 1e-30 if dtype == torch.float32 else 1e-200
    own = GramAccumulator(4, dtype=dtype).update(x)
    assert own.total[2, 2] == 0
    assert own.total[1, 2] > 0
    check_gram(own.total, own.row_sum, own.rows, "here", "a")


def test_a_nan_is_blamed_on_its_file(tmp_path):
    torch.manual_seed(0)
    base, *experts = (torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))
    files = [
        bmm.collect_grams(expert, [torch.randn(8, 4)]).save(tmp_path / f"of-{t}.safetensors")
        for t, expert in enumerate(experts)
    ]
    spoilt(files[1], tensors=lambda t: t["gram.0"][0, 0].fill_(math.nan))
    for order in ([0, 1], [1, 0]):
        with pytest.raises(NonFiniteGramError, match=r"of-1\.safetensors"):
            bmm.merge(base, [experts[t] for t in order], grams=[files[t] for t in order])
