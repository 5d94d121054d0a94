"""OPCM against its sequential definition on whole models, and `ContinualMerge`, which does the same one expert at a time."""

from __future__ import annotations

import fcntl
import json

import pytest
import torch
from torch import nn

from bmm_engine.anchors import get_anchor
from bmm_engine.checkpoint import Checkpoint
from bmm_engine.errors import (
    CheckpointError,
    ConfigError,
    MissingTensorError,
    NonFiniteWeightError,
    OutputExistsError,
    OutputWriteError,
)
from bmm_engine.merging.continual import ContinualMerge
from tests.anchors.test_subspace import Model

SHAPES = {
    "a.linear": (12, 18),
    "a.bias": (12,),
    "b.linear": (20, 7),
    "embedding": (9, 5),
    "scale": (1,),
    "conv": (3, 2, 2),
}
LINEAR = [n for n in SHAPES if n.endswith("linear")]


def family(tasks=4, dtype=torch.float32, size=0.05):
    generator = torch.Generator().manual_seed(11)
    base = {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in SHAPES.items()}
    return base, [
        {n: b + size * (t + 1) * torch.randn(b.shape, generator=generator, dtype=dtype) for n, b in base.items()}
        for t in range(tasks)
    ]


def sequential(base, experts, alpha=0.5):
    """Tang et al. 2025 as it is written: full SVD of the merged difference, projection, rescaling of the whole model after every expert."""
    base = {n: t.double() for n, t in base.items()}

    def length(model):
        return torch.stack([(model[n] - base[n]).square().sum() for n in base]).sum().sqrt()

    merged = {n: t.double() for n, t in experts[0].items()}
    lengths, lam = [length(merged)], 1.0
    for expert in experts[1:]:
        lengths.append(length({n: t.double() for n, t in expert.items()}))
        moved = {}
        for name in base:
            difference, tau = merged[name] - base[name], expert[name].double() - base[name]
            if name in LINEAR:
                u, s, vh = torch.linalg.svd(difference, full_matrices=True)
                k = int((s.cumsum(0) / s.sum() > alpha).int().argmax())
                projected = u.T @ tau @ vh.T
                projected.diagonal().zero_()
                projected[:k, :k] = 0
                tau = u @ projected @ vh
            moved[name] = base[name] + lam * difference + tau
        mean, now = sum(lengths) / len(lengths), length(moved)
        lam = now / mean
        merged = {n: base[n] + (moved[n] - base[n]) * (mean / now) for n in base}
    return merged


def close(got, truth, base, limit):
    assert set(got) == set(truth)
    for name, tensor in truth.items():
        start = base[name].double()
        assert float((got[name].double() - tensor).norm()) <= limit * float((tensor - start).norm()), name


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_rule_is_the_sequential_algorithm_on_a_whole_model(alpha, tasks):
    base, experts = family(tasks, torch.float64)
    close(Model("opcm", base, experts, alpha=alpha).merge(), sequential(base, experts, alpha), base, 1e-9)


def test_rule_in_float32():
    base, experts = family()
    merged = Model("opcm", base, experts).merge()
    truth = sequential(base, experts)
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        assert float((tensor.double() - truth[name]).norm()) < 1e-7 * float(truth[name].norm())


def test_order_matters_and_the_length_is_the_mean():
    base, experts = family(3, torch.float64)
    forward, backward = (Model("opcm", base, e).merge() for e in (experts, experts[::-1]))
    assert not torch.allclose(forward["a.linear"], backward["a.linear"])
    assert not get_anchor("opcm").symmetric

    def length(model):
        return float(torch.cat([(model[n] - base[n]).reshape(-1) for n in base]).norm())

    assert length(forward) == pytest.approx(sum(map(length, experts)) / 3, rel=1e-9)


def test_what_an_expert_repeats_of_itself_does_not_add_up():
    """The second time, an expert lies along its own pairs only, and all of it is left out."""
    base, (expert, _) = family(2, torch.float64)
    base, expert = {"a.linear": base["a.linear"]}, {"a.linear": expert["a.linear"]}
    torch.testing.assert_close(Model("opcm", base, [expert, expert]).merge(), expert, rtol=0, atol=1e-9)


def start(base, tmp_path, **options):
    return ContinualMerge(base, state=tmp_path / "state", **options)


def named(model):
    """The family under names that `modules` can find: NAME.weight."""
    return {(f"{n}.weight" if n in LINEAR else n): t for n, t in model.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_continual_is_the_rule_whoever_goes_on(tmp_path, dtype):
    base, experts = family()
    base, *experts = ({n: t.to(dtype) for n, t in m.items()} for m in (base, *experts))
    for count, expert in enumerate(experts):
        merge = start(named(base), tmp_path, **({"modules": ["*linear"], "alpha": 0.3} if count == 0 else {}))
        assert merge.count == count
        merge.add(named(expert))
        assert merge.count == count + 1
        computed = torch.promote_types(dtype, torch.float32)
        wide = [{n: t.to(computed) for n, t in m.items()} for m in (base, *experts[: count + 1])]
        rule = named(Model("opcm", wide[0], wide[1:], alpha=0.3).merge())
        got = merge.tensors()
        assert list(got) == list(rule)
        for name, tensor in got.items():
            assert tensor.dtype == dtype
            torch.testing.assert_close(tensor, rule[name].to(dtype))
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [".lock", "continual.json", "step-00004"]


def test_continual_in_slabs_is_the_same_to_the_bit(tmp_path, monkeypatch):
    base, experts = family(2)
    results = []
    for label, size in (("whole", 2**20), ("slabs", 7)):
        monkeypatch.setattr("bmm_engine.merging.stream.SLAB_ELEMENTS", size)
        merge = start(named(base), tmp_path / label, modules=["*linear"])
        for expert in experts:
            merge.add(named(expert))
        results.append(merge.tensors())
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


class Conv1D(nn.Module):
    """A layer that stores (in, out), as GPT-2's does."""

    def __init__(self, weight):
        super().__init__()
        self.nf = weight.shape[1]
        self.weight = nn.Parameter(weight.clone())


class Live(nn.Module):
    def __init__(self, weight, transposed):
        super().__init__()
        self.layer = Conv1D(weight.T.contiguous()) if transposed else nn.Linear(*weight.shape[::-1], bias=False)
        if not transposed:
            self.layer.weight = nn.Parameter(weight.clone())
        self.norm = nn.LayerNorm(3)


def test_live_models_and_transposed_layers(tmp_path):
    base, experts = family(3)
    merged = []
    for transposed in (False, True):
        models = [Live(m["a.linear"], transposed) for m in (base, *experts)]
        merge = start(models[0], tmp_path / str(transposed))
        for model in models[1:]:
            merge.add(model)
        merged.append(merge.tensors()["layer.weight"])
    torch.testing.assert_close(merged[1].T, merged[0], rtol=0, atol=1e-6)


def test_written_merge_loads_and_names_its_inputs(tmp_path):
    base, experts = family(2)
    base["steps"] = torch.tensor([3, 4])
    merge = start(named(base), tmp_path, modules=["*linear"], keep_base=["embedding"])
    with pytest.raises(ConfigError, match="no expert"):
        merge.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for expert in experts:
        merge.add(named(expert))
    path = merge.write(tmp_path / "out", max_shard_size=600)
    written = Checkpoint.open(path)
    for name, tensor in merge.tensors().items():
        assert torch.equal(written.load(name), tensor)
    assert torch.equal(written.load("steps"), base["steps"])
    assert torch.equal(written.load("embedding"), base["embedding"])
    record = json.loads((path / "bmm_merge.json").read_text())
    assert [entry["role"] for entry in record["inputs"]] == ["base", "expert 1", "expert 2"]
    merge.write(path, overwrite=True)
    with pytest.raises(OutputExistsError):
        merge.write(path)


def test_a_run_that_dies_leaves_the_old_state(tmp_path, monkeypatch):
    base, experts = family(3)
    whole = start(named(base), tmp_path / "whole", modules=["*linear"])
    merge = start(named(base), tmp_path, modules=["*linear"])
    merge.add(named(experts[0]))
    before = merge.tensors()
    with monkeypatch.context() as patch:  # after the sums are there, before the state says so
        patch.setattr(ContinualMerge, "_write_state", lambda self, state: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge.add(named(experts[1]))
    assert (tmp_path / "state" / "step-00002").is_dir()
    again = start(named(base), tmp_path)
    assert again.count == 1
    assert all(torch.equal(t, before[n]) for n, t in again.tensors().items())
    for expert in experts[1:]:
        again.add(named(expert))
    for expert in experts:
        whole.add(named(expert))
    assert all(torch.equal(t, whole.tensors()[n]) for n, t in again.tensors().items())


def test_bad_experts_change_nothing(tmp_path):
    base, experts = family(2)
    merge = start(named(base), tmp_path, modules=["*linear"])
    merge.add(named(experts[0]))
    before = merge.tensors()
    broken = named(experts[1])
    broken["embedding"] = broken["embedding"].clone().fill_(torch.nan)
    with pytest.raises(NonFiniteWeightError, match="embedding"):
        merge.add(broken)
    with pytest.raises(MissingTensorError, match="scale"):
        merge.add({n: t for n, t in named(experts[1]).items() if n != "scale"})
    assert merge.count == start(named(base), tmp_path).count == 1
    assert all(torch.equal(t, before[n]) for n, t in merge.tensors().items())


def test_a_directory_goes_on_with_its_own_settings_only(tmp_path):
    base, experts = family(2)
    merge = start(named(base), tmp_path, modules=["*linear"], alpha=0.4)
    merge.add(named(experts[0]))
    stale = start(named(base), tmp_path)
    merge.add(named(experts[1]))
    with pytest.raises(ConfigError, match="changed since it was opened"):
        stale.add(named(experts[1]))
    for options, message in [
        ({"alpha": 0.5}, r"alpha = 0\.4, not 0\.5"),
        ({"modules": ["a.*"]}, r"other linear modules \(different: b"),
        ({"keep_base": ["scale"]}, "keep_base"),
    ]:
        with pytest.raises(ConfigError, match=message):
            start(named(base), tmp_path, **options)
    with pytest.raises(ConfigError, match="another base"):
        start(named(experts[0]), tmp_path)
    with pytest.raises(ConfigError, match=r"alpha must be in \[0, 1\)"):
        start(named(base), tmp_path / "other", modules=["*linear"], alpha=1.0)
    with (tmp_path / "state" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            merge.add(named(experts[0]))


def test_foreign_and_damaged_directories_are_refused(tmp_path):
    base, (expert,) = family(1)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="choose another path"):
        start(named(base), tmp_path, modules=["*linear"])
    (tmp_path / "state" / "notes.txt").unlink()
    start(named(base), tmp_path, modules=["*linear"]).add(named(expert))
    (tmp_path / "state" / "continual.json").write_text('{"format": "bmm-continual"')
    with pytest.raises(CheckpointError, match="no state of a continual merge"):
        start(named(base), tmp_path)


def test_full_disk_is_an_output_error(monkeypatch):
    base, experts = family(2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OutputWriteError, match="TMPDIR"):
        Model("opcm", base, experts).merge()
