"""Merge a small family of models with mergekit's and FusionBench's own code, and keep the numbers.

    PYTHON -m tests.parity.make_reference

where PYTHON has mergekit 0.1.5 and fusion-bench 0.2.33 (with omegaconf, lightning, hydra-core, bidict). It writes reference.safetensors beside
itself: the family, what each case gave, and as metadata how. The functions serve the live comparison too.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("reference.safetensors")
# Two linear modules, one with a bias: (name, out, in, bias).
SMALL = (("encoder.wide", 20, 32, True), ("encoder.tall", 32, 20, False))
LARGE = (("encoder.wide", 96, 130, True), ("encoder.tall", 130, 96, False), ("encoder.square", 64, 64, True))
State = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A base and its experts as state dicts, with a Gram per linear module and a diagonal Fisher per tensor for each expert."""

    base: State
    experts: list[State]
    grams: list[State]
    fishers: list[State]

    def to(self, dtype: torch.dtype) -> Family:
        def cast(state: State) -> State:
            return {key: value.to(dtype) for key, value in state.items()}

        return Family(cast(self.base), *([cast(s) for s in own] for own in (self.experts, self.grams, self.fishers)))

    def module(self, state: State) -> nn.Module:
        """A state as a torch module whose parameters have these names."""
        model = nn.Module()
        for name, weight in state.items():
            if name.endswith(".weight"):
                _, leaf = name.removesuffix(".weight").split(".")
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=f"encoder.{leaf}.bias" in state)
                model.encoder = getattr(model, "encoder", nn.Module())
                setattr(model.encoder, leaf, linear)
        model.to(next(iter(state.values())).dtype).load_state_dict(state)
        return model.requires_grad_(False)


def make_family(layout: Sequence[tuple[str, int, int, bool]] = SMALL, experts: int = 3, seed: int = 0) -> Family:
    """Experts that share a direction, each of a magnitude of its own; entries of task vectors about 0.01, of the base about 0.1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = {f"{name}.weight": (rows, columns) for name, rows, columns, _ in layout}
    shapes |= {f"{name}.bias": (rows,) for name, rows, _, bias in layout if bias}
    base = {name: 0.1 * normal(*shape) for name, shape in shapes.items()}
    common = {name: 0.004 * normal(*shape) for name, shape in shapes.items()}
    tuned, grams, fishers = [], [], []
    for t in range(experts):
        magnitude = 0.01 * (0.5, 1.0, 2.0)[t % 3]
        tuned.append({name: base[name] + common[name] + magnitude * normal(*shape) for name, shape in shapes.items()})
        inputs = {name: normal(4 * columns, columns) for name, _, columns, _ in layout}
        grams.append({f"{name}.weight": x.mT @ x / len(x) for name, x in inputs.items()})
        fishers.append({name: normal(*shape).square() * 10.0 ** (t - 1) for name, shape in shapes.items()})
    return Family(base, tuned, grams, fishers)


def task_vectors(family: Family) -> list[State]:
    return [{name: expert[name] - base for name, base in family.base.items()} for expert in family.experts]


def plus_base(family: Family, merged: Mapping[str, Tensor], scale: float = 1.0) -> State:
    return {name: base + scale * merged[name].detach() for name, base in family.base.items()}


def mergekit(family: Family, method: str, base: bool = True, experts: int | None = None, **parameters: Any) -> State:
    """mergekit's registered method, through its public call on groups of tensors."""
    from mergekit.merge_methods import merge_state_dicts

    tuned = family.experts[:experts]
    models: dict[str, State] = {str(t): expert for t, expert in enumerate(tuned)}
    if base:
        models = {"base": family.base, **models}
    parameters = {key.rstrip("_"): value for key, value in parameters.items()}
    return merge_state_dicts(models, method, base="base" if base else None, parameters=parameters)


def pool(family: Family, experts: int | None = None) -> Any:
    from fusion_bench.modelpool import BaseModelPool

    tuned = {f"task{t}": family.module(expert) for t, expert in enumerate(family.experts[:experts])}
    return BaseModelPool({"_pretrained_": family.module(family.base), **tuned})


def fusion_bench_module(package: str, module: str) -> ModuleType:
    """A module of one method without its package's `__init__`, which imports vision task pools that need much more than the algebra does."""
    name = f"fusion_bench.method.{package}"
    if name not in sys.modules:
        import fusion_bench.method

        parent = ModuleType(name)
        parent.__path__ = [str(Path(fusion_bench.method.__file__).parent / package)]
        sys.modules[name] = parent
    return import_module(f"{name}.{module}")


def fb_task_arithmetic(family: Family, scaling: float) -> State:
    from fusion_bench.method.task_arithmetic.task_arithmetic import TaskArithmeticAlgorithm

    return dict(TaskArithmeticAlgorithm(scaling_factor=scaling).run(pool(family)).state_dict())


def fb_ties(family: Family, scaling: float, threshold: float, merge_func: str) -> State:
    from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm

    algorithm = TiesMergingAlgorithm(scaling_factor=scaling, threshold=threshold, remove_keys=[], merge_func=merge_func)
    return dict(algorithm.run(pool(family)).state_dict())


def fb_magmax(family: Family, scaling: float) -> State:
    from fusion_bench.method.magmax.magmax import magmax_merge

    tuned = [family.module(expert) for expert in family.experts]
    return dict(magmax_merge(family.module(family.base), tuned, scaling).state_dict())


def fb_model_stock(family: Family, experts: int) -> State:
    from fusion_bench.method.model_stock.model_stock import ModelStock

    return dict(ModelStock().run(pool(family, experts)).state_dict())


def fb_slerp(family: Family, t: float) -> State:
    from fusion_bench.method.slerp.slerp import slerp_on_state_dicts

    return slerp_on_state_dicts(t, family.base, family.experts[0])


def fb_tsv_m(family: Family, scaling: float, eigen: bool) -> State:
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils as tsvm

    merge = tsvm.compute_and_sum_svd_mem_reduction_2 if eigen else tsvm.compute_and_sum_svd_mem_reduction
    return plus_base(family, merge(task_vectors(family), accelerator="cpu"), scaling)


def fb_iso_c(family: Family, scaling: float) -> State:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c

    return plus_base(family, iso_c(task_vectors(family), accelerator="cpu"), scaling)


def fb_iso_cts(family: Family, scaling: float, common: float) -> State:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts

    return plus_base(family, iso_cts(task_vectors(family), common, accelerator="cpu"), scaling)


def fb_wudi(family: Family, steps: int) -> State:
    from fusion_bench.method.wudi.wudi import wudi_merging

    return plus_base(family, wudi_merging(task_vectors(family), accelerator="cpu", iter_num=steps))


def fb_opcm(family: Family, alpha: float) -> State:
    opcm = fusion_bench_module("opcm", "opcm_general")
    algorithm = opcm.OPCM(alpha=alpha, shuffle_order=False, save_on_every_step=False)
    algorithm._fabric_instance = SimpleNamespace(device=torch.device("cpu"), log=lambda *a, **k: None, _loggers=[])
    return dict(algorithm.run(pool(family)).state_dict())


def fb_doge_ta(family: Family, subspace: int, density_percent: int, scaling: float) -> State:
    from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm

    algorithm = DOGE_TA_Algorithm(subspace, density_percent, scaling)
    algorithm._fabric_instance = SimpleNamespace(device=torch.device("cpu"), backward=lambda loss: loss.backward())
    return dict(algorithm.run(pool(family)).state_dict())


def fb_regmean(family: Family, ratio: float) -> State:
    regmean = fusion_bench_module("regmean", "regmean")
    weights = {name: [expert[name] for expert in family.experts] for name in family.base}
    grams = [{name.removesuffix(".weight"): gram for name, gram in own.items()} for own in family.grams]
    return regmean.merging_with_regmean_weights(weights, grams, reduce_non_diagonal_ratio=ratio)


def fb_fisher(family: Family, normalize: bool, coefficients: Sequence[float]) -> State:
    fisher = fusion_bench_module("fisher_merging", "fisher_merging")
    weights = {name: [expert[name] for expert in family.experts] for name in family.base}
    return fisher.merging_with_fisher_weights(weights, family.fishers, torch.tensor(coefficients), normalize)


def fb_knots_ties(family: Family, scaling: float, threshold: float) -> State:
    """FusionBench has the alignment alone; its own TIES then merges the coordinates of the whole model."""
    from fusion_bench.method.knots.knots_utils import subspace_alignment
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    bases, coordinates = {}, {}
    for name in family.base:
        taus = [tau[name] for tau in task_vectors(family)]
        coordinates[name] = torch.stack(taus)
        if name.endswith(".weight"):
            bases[name], s, vs = subspace_alignment(taus)
            coordinates[name] = torch.stack([s[:, None] * v for v in vs])
    flat = torch.cat([c.flatten(1) for c in coordinates.values()], dim=1)
    parts = ties_merging(flat, threshold, "mean").split([c[0].numel() for c in coordinates.values()])
    merged = {name: part.reshape(c.shape[1:]) for (name, c), part in zip(coordinates.items(), parts)}
    return plus_base(family, {name: bases[name] @ m if name in bases else m for name, m in merged.items()}, scaling)


def fb_consensus(family: Family, scaling: float, threshold: float, least: int) -> State:
    """FusionBench's TALL masks, counted as its consensus does (which itself reads masks from files)."""
    from fusion_bench.method.tall_mask.utils import generate_task_masks

    def flat(state: State) -> Tensor:
        return torch.cat([state[name].reshape(-1) for name in family.base])

    base, tuned = flat(family.base), torch.stack([flat(expert) for expert in family.experts])
    masks = generate_task_masks(tuned - base, tuned, base, tall_mask_lambda=threshold)
    kept = (masks.sum(dim=0) >= least) * (tuned - base).sum(dim=0)
    parts = (base + scaling * kept).split([value.numel() for value in family.base.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(family.base.items(), parts)}


MAKERS: dict[str, Callable[..., State]] = {
    "task_arithmetic": fb_task_arithmetic,
    "ties": fb_ties,
    "magmax": fb_magmax,
    "model_stock": fb_model_stock,
    "slerp": fb_slerp,
    "tsv_m": fb_tsv_m,
    "iso_c": fb_iso_c,
    "iso_cts": fb_iso_cts,
    "wudi": fb_wudi,
    "opcm": fb_opcm,
    "doge_ta": fb_doge_ta,
    "regmean": fb_regmean,
    "fisher": fb_fisher,
    "knots_ties": fb_knots_ties,
    "consensus": fb_consensus,
}


@dataclass(frozen=True)
class Case:
    """What the peer ran, and in which dtype (float64 where its float32 result is more rounding than mathematics)."""

    peer: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def name(self) -> str:
        given = ",".join(f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in self.parameters.items())
        return f"{self.peer}.{self.method}({given})" + ("" if self.dtype == "float32" else f"@{self.dtype}")

    def run(self, family: Family) -> State:
        family = family.to(getattr(torch, self.dtype))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            maker = partial(mergekit, method=self.method) if self.peer == "mergekit" else MAKERS[self.method]
            merged = maker(family, **self.parameters)
        return {name: merged[name].detach() for name in family.base}


def mk(method: str, dtype: str = "float32", **parameters: Any) -> Case:
    return Case("mergekit", method, parameters, dtype)


def fb(method: str, dtype: str = "float32", **parameters: Any) -> Case:
    return Case("fusion_bench", method, parameters, dtype)


WEIGHTS = [1.0, 0.5, 2.0]
CASES = [
    mk("linear", base=False, weight=WEIGHTS),
    mk("linear", base=False, weight=WEIGHTS, normalize=False),
    mk("task_arithmetic", weight=WEIGHTS, lambda_=0.7),
    mk("task_arithmetic", weight=WEIGHTS, normalize=True),
    mk("ties", weight=1.0, density=0.3),
    mk("ties", weight=WEIGHTS, density=[0.2, 0.5, 1.0], lambda_=0.8),
    mk("ties", weight=WEIGHTS, density=0.3, normalize=False),
    mk("dare_ties", weight=WEIGHTS),
    mk("dare_linear", weight=WEIGHTS),
    mk("breadcrumbs", weight=WEIGHTS, density=0.6, gamma=0.05),
    mk("breadcrumbs_ties", weight=WEIGHTS, density=0.6, gamma=0.05),
    mk("sce"),
    mk("sce", select_topk=0.4),
    mk("ram", epsilon=0.01),
    mk("ramplus_tl", epsilon=0.01, r=0.3, alpha=0.5),
    mk("slerp", experts=1, t=0.3),
    mk("nuslerp", experts=2, weight=[1.0, 3.0]),
    mk("nuslerp", experts=2, base=False, weight=[1.0, 3.0]),
    mk("nuslerp", experts=2, weight=[1.0, 3.0], nuslerp_flatten=False),
    mk("nuslerp", experts=2, weight=[1.0, 3.0], nuslerp_flatten=False, nuslerp_row_wise=True),
    mk("multislerp", weight=WEIGHTS),
    mk("multislerp", base=False, weight=WEIGHTS, normalize_weights=False),
    mk("karcher", base=False),
    mk("karcher"),
    mk("model_stock"),
    mk("model_stock", filter_wise=True),
    mk("nearswap", experts=1, t=0.005),
    mk("arcee_fusion", "float64", experts=1),
    mk("passthrough", base=False, experts=1, scale=0.5),
    fb("task_arithmetic", scaling=0.3),
    fb("ties", scaling=0.3, threshold=20, merge_func="sum"),
    fb("ties", scaling=1.0, threshold=20, merge_func="mean"),
    fb("magmax", scaling=0.5),
    fb("model_stock", experts=2),
    fb("model_stock", experts=3),
    fb("slerp", t=0.3),
    fb("tsv_m", "float64", scaling=1.0, eigen=False),
    fb("tsv_m", "float64", scaling=1.0, eigen=True),
    fb("iso_c", scaling=1.3),
    fb("iso_cts", scaling=1.0, common=0.8),
    fb("wudi", "float64", steps=100),
    fb("opcm", "float64", alpha=0.5),
    fb("doge_ta", "float64", subspace=6, density_percent=30, scaling=0.07),
    fb("regmean", "float64", ratio=0.9),
    fb("fisher", normalize=True, coefficients=WEIGHTS),
    fb("fisher", normalize=False, coefficients=WEIGHTS),
    fb("knots_ties", scaling=0.6, threshold=20),
    fb("consensus", scaling=0.5, threshold=0.4, least=2),
]


# What mergekit computes in bfloat16 when the checkpoints are (it merges linear and slerp in float32).
BFLOAT16 = [
    mk("task_arithmetic", weight=WEIGHTS, lambda_=0.7),
    mk("ties", weight=WEIGHTS),
    mk("sce", select_topk=0.4),
    mk("multislerp", weight=WEIGHTS),
    mk("karcher", base=False),
    mk("model_stock"),
]


def flatten(family: Family) -> State:
    """The family under the keys that reference.safetensors has it by."""
    flat = {f"base/{name}": value for name, value in family.base.items()}
    for kind in ("experts", "grams", "fishers"):
        for t, state in enumerate(getattr(family, kind)):
            flat |= {f"{kind}/{t}/{name}": value for name, value in state.items()}
    return flat


def main() -> None:
    from safetensors.torch import save_file

    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    family = make_family()
    tensors = flatten(family)
    for index, case in enumerate(CASES):
        for name, value in case.run(family).items():
            tensors[f"case/{index}/{name}"] = value.float().contiguous()
    half = family.to(torch.bfloat16)
    for index, case in enumerate(BFLOAT16):
        for dtype in ("bfloat16", "float64"):
            for name, value in replace(case, dtype=dtype).run(half).items():
                kept = value if dtype == "bfloat16" else value.float()
                tensors[f"half/{index}/{dtype}/{name}"] = kept.contiguous()
    metadata = {
        "versions": {package: version(package) for package in ("mergekit", "fusion-bench", "torch")},
        "python": sys.version.split()[0],
        "cases": [{"name": case.name, **asdict(case)} for case in CASES],
        "half": [{"name": case.name, **asdict(case)} for case in BFLOAT16],
    }
    save_file(tensors, FILE, metadata={"reference": json.dumps(metadata)})
    print(f"{FILE.name}: {len(CASES)} cases, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
