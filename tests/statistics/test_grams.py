from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from bmm_engine.errors import (
    CheckpointError,
    ConfigError,
    EmptyCalibrationError,
    GramMismatchError,
    NonFiniteGramError,
    OutputWriteError,
    ShapeMismatchError,
)
from bmm_engine.statistics.grams import GramAccumulator, GramSet
from bmm_engine.statistics.sets import Statistics
from tests.numerics import assert_as_good_as_torch


def gram_set(width=6, seed=0, fingerprint="aa"):
    rows = torch.randn(20, width, generator=torch.Generator().manual_seed(seed))
    gram = GramAccumulator(width, name="a").update(rows)
    other = GramAccumulator(4, name="c").update(rows[:, :4])
    return GramSet(
        {"a": gram, "c": other},
        {"a": "a", "b": "a", "c": "c"},
        {"a": fingerprint},
        calibration=f"seed {seed}",
        aliases={"file.a": "a"},
        transposed=("c",),
    )


@given(cuts=st.lists(st.integers(0, 30), max_size=4), width=st.integers(1, 9))
def test_chunks_and_partials_add_up_to_one_shot(cuts, width):
    rows = torch.randn(30, width, generator=torch.Generator().manual_seed(1))
    bounds = [0, *sorted(cuts), 30]
    chunks = [rows[a:b] for a, b in pairwise(bounds)]
    streamed, merged = GramAccumulator(width), GramAccumulator(width)
    for chunk in chunks:
        streamed.update(chunk)
        merged.merge(GramAccumulator(width).update(chunk))
    truth, same = rows.double().T @ rows.double(), rows.T @ rows
    for gram in (streamed, merged):
        assert gram.rows == 30
        assert_as_good_as_torch(gram.total, same, truth)
        assert torch.equal(gram.total, gram.total.T)
        torch.testing.assert_close(gram.row_sum, rows.sum(0))
        torch.testing.assert_close(gram.mean(), gram.total / 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_leading_dimensions_and_dtypes(dtype):
    rows = torch.randn(2, 3, 5, 7).to(dtype)
    gram = GramAccumulator(7, dtype=torch.float64 if dtype == torch.float64 else torch.float32).update(rows)
    flat = rows.reshape(-1, 7).double()
    assert gram.rows == 30
    torch.testing.assert_close(gram.total.double(), flat.T @ flat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram.row_sum.double(), flat.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_rows_are_refused_with_name_and_count_and_change_nothing(value):
    gram = GramAccumulator(4, name="layer.0").update(torch.ones(3, 4))
    before = gram.total.clone()
    rows = torch.ones(5, 4)
    rows[1, 2] = rows[3, 0] = rows[3, 1] = value
    with pytest.raises(NonFiniteGramError, match=r"layer\.0: 2 of 5") as caught:
        gram.update(rows)
    assert (caught.value.module, caught.value.count) == ("layer.0", 2)
    assert torch.equal(gram.total, before)
    assert gram.rows == 3


def test_misuse():
    gram = GramAccumulator(4, name="m")
    with pytest.raises(ShapeMismatchError, match=r"m: .*5.*4"):
        gram.update(torch.ones(2, 5))
    with pytest.raises(ShapeMismatchError, match="4 and 5"):
        gram.merge(GramAccumulator(5))
    with pytest.raises(EmptyCalibrationError, match="m: no rows"):
        gram.mean()
    with pytest.raises(ConfigError, match="at least 1"):
        GramAccumulator(0)
    assert gram.update(torch.ones(0, 4)).rows == 0


def test_save_and_load_keep_everything_bit_for_bit(tmp_path):
    grams = gram_set()
    loaded = GramSet.load(grams.save(tmp_path / "deep" / "g.safetensors"))
    assert loaded.modules == grams.modules
    assert loaded.fingerprints == grams.fingerprints
    assert loaded.aliases == grams.aliases
    assert loaded.transposed == ("c",)
    assert loaded.calibration == "seed 0"
    for module in ("a", "b", "c", "file.a"):
        assert loaded.width(module) == grams.width(module)
        assert loaded.rows(module) == 20
        assert torch.equal(loaded.get(module).total, grams.get(module).total)
        assert torch.equal(loaded.get(module).row_sum, grams.get(module).row_sum)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["g.safetensors"]


def test_loaded_set_saves_again(tmp_path):
    path = gram_set().save(tmp_path / "g.safetensors")
    again = GramSet.load(GramSet.load(path).save(tmp_path / "h.safetensors"))
    assert torch.equal(again.get("a").total, gram_set().get("a").total)


def test_sets_of_one_model_add_also_from_disk(tmp_path):
    one, two = gram_set(seed=1), gram_set(seed=2)
    expected = one.get("a").total + two.get("a").total
    merged = GramSet.load(one.save(tmp_path / "1.safetensors")).merge(
        GramSet.load(two.save(tmp_path / "2.safetensors"))
    )
    assert torch.equal(merged.get("b").total, expected)
    assert merged.rows("c") == 40
    assert merged.calibration == "seed 1; seed 2"
    with pytest.raises(GramMismatchError, match="'a'"):
        gram_set(fingerprint="aa").merge(gram_set(fingerprint="bb"))


def test_unknown_module_names_what_there_is():
    with pytest.raises(GramMismatchError, match=r"no Gram for module 'z'.* a, b, c"):
        gram_set().get("z")


def test_damaged_files(tmp_path):
    good = gram_set().save(tmp_path / "good.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"truncated\.safetensors.*Collect it again"):
        GramSet.load(truncated)
    with pytest.raises(CheckpointError, match="no such Gram file"):
        GramSet.load(tmp_path / "missing.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="not a Gram file"):
        GramSet.load(tmp_path / "weights.safetensors")
    record = {
        "version": 1,
        "rows": {"a": 3},
        "modules": {"a": "a"},
        "fingerprints": {},
        "weights_dtype": "float32",
        "calibration": "",
        "aliases": {},
        "transposed": [],
    }
    save_file(
        {"gram.a": torch.ones(2, 3), "row_sum.a": torch.ones(2)},
        tmp_path / "oblong.safetensors",
        {"bmm-grams": json.dumps(record)},
    )
    with pytest.raises(CheckpointError, match=r"'a' has shape \(2, 3\)"):
        GramSet.load(tmp_path / "oblong.safetensors")
    save_file(
        {"gram.a": torch.ones(2, 2)},
        tmp_path / "future.safetensors",
        {"bmm-grams": json.dumps({**record, "version": 9})},
    )
    with pytest.raises(CheckpointError, match="version 9"):
        GramSet.load(tmp_path / "future.safetensors")


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputWriteError, match="No space left"):
        gram_set().save(tmp_path / "g.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_one_set_is_not_a_list_of_sets():
    with pytest.raises(ConfigError, match="list with one GramSet"):
        Statistics.open(gram_set())
