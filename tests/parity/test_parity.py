"""Our rules against the numbers of mergekit's and FusionBench's own code: committed ones always, live ones where the packages are installed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bmm_engine.anchors import Site, get_anchor
from tests.parity.make_reference import (
    BFLOAT16,
    CASES,
    FILE,
    LARGE,
    WEIGHTS,
    Case,
    Family,
    State,
    fb,
    flatten,
    make_family,
    mk,
)

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Ours:
    """What of ours gives a peer's result: a rule and its options; `experts` of the family; whether the base is one of the experts.

    `but`: tensors on which the two differ by design, and `why`.
    """

    rule: str
    options: dict[str, Any] = field(default_factory=dict)
    experts: int | None = None
    base_too: bool = False
    but: str = ""
    why: str = ""
    tolerance: float = TOLERANCE


def ours(rule: str, /, **options: Any) -> Ours:
    settings = {key: options.pop(key) for key in ("experts", "base_too", "but", "why", "tolerance") if key in options}
    return Ours(rule, options, **settings)


MERGEKIT_TIES = {"threshold": "tensor", "tie": "positive"}
SCALED_MEAN = "it scales the mean task vector of the tensors that are not matrices; ours gives those the mean"
TABLE: dict[str, Ours] = {
    case.name: found
    for case, found in [
        (mk("linear", base=False, weight=WEIGHTS), ours("average", weight=WEIGHTS)),
        (
            mk("linear", base=False, weight=WEIGHTS, normalize=False),
            ours("average", weight=WEIGHTS, normalize=False),
        ),
        (mk("task_arithmetic", weight=WEIGHTS, lambda_=0.7), ours("task_arithmetic", weight=WEIGHTS, scaling=0.7)),
        (
            mk("task_arithmetic", weight=WEIGHTS, normalize=True),
            ours("task_arithmetic", weight=WEIGHTS, scaling=1.0, normalize=True),
        ),
        (mk("ties", weight=1.0, density=0.3), ours("ties", density=0.3, **MERGEKIT_TIES)),
        (
            mk("ties", weight=WEIGHTS, density=[0.2, 0.5, 1.0], lambda_=0.8),
            ours("ties", weight=WEIGHTS, density=[0.2, 0.5, 1.0], scaling=0.8, **MERGEKIT_TIES),
        ),
        (
            mk("ties", weight=WEIGHTS, density=0.3, normalize=False),
            ours("ties", weight=WEIGHTS, density=0.3, normalize=False, **MERGEKIT_TIES),
        ),
        (
            mk("dare_ties", weight=WEIGHTS),
            ours("dare_ties", density=1.0, trim=1.0, weight=WEIGHTS, rescale="l1", tie="positive", normalize=False),
        ),
        (mk("dare_linear", weight=WEIGHTS), ours("dare_linear", density=1.0, weight=WEIGHTS, rescale="l1")),
        (
            mk("breadcrumbs", weight=WEIGHTS, density=0.6, gamma=0.05),
            ours("breadcrumbs", weight=WEIGHTS, density=0.6, gamma=0.05, scaling=1.0),
        ),
        (
            mk("breadcrumbs_ties", weight=WEIGHTS, density=0.6, gamma=0.05),
            ours("breadcrumbs_ties", weight=WEIGHTS, density=0.6, gamma=0.05, normalize=False),
        ),
        (mk("sce"), ours("sce", epsilon=1e-6)),
        (mk("sce", select_topk=0.4), ours("sce", select_topk=0.4, epsilon=1e-6)),
        (mk("ram", epsilon=0.01), ours("ram", epsilon=0.01)),
        (
            mk("ramplus_tl", epsilon=0.01, r=0.3, alpha=0.5),
            ours("ram_plus", epsilon=0.01, r=0.3, alpha=0.5, extent="tensor"),
        ),
        (mk("slerp", experts=1, t=0.3), ours("slerp", experts=1, t=0.3)),
        (mk("nuslerp", experts=2, weight=[1.0, 3.0]), ours("nuslerp", experts=2, weight=[1.0, 3.0])),
        (
            mk("nuslerp", experts=2, base=False, weight=[1.0, 3.0]),
            ours("nuslerp", experts=2, weight=[1.0, 3.0], origin="zero"),
        ),
        (
            mk("nuslerp", experts=2, weight=[1.0, 3.0], nuslerp_flatten=False),
            ours("nuslerp", experts=2, weight=[1.0, 3.0], vectors="rows"),
        ),
        (
            mk("nuslerp", experts=2, weight=[1.0, 3.0], nuslerp_flatten=False, nuslerp_row_wise=True),
            ours("nuslerp", experts=2, weight=[1.0, 3.0], vectors="columns"),
        ),
        (mk("multislerp", weight=WEIGHTS), ours("multislerp", weight=WEIGHTS)),
        (
            mk("multislerp", base=False, weight=WEIGHTS, normalize_weights=False),
            ours("multislerp", weight=WEIGHTS, normalize=False, origin="zero"),
        ),
        (mk("karcher", base=False), ours("karcher")),
        (mk("karcher"), ours("karcher", base_too=True)),
        (mk("model_stock"), ours("model_stock")),
        (mk("model_stock", filter_wise=True), ours("model_stock", filter_wise=True)),
        (mk("nearswap", experts=1, t=0.005), ours("nearswap", experts=1, t=0.005)),
        (mk("arcee_fusion", "float64", experts=1), ours("arcee_fusion", experts=1)),
        (mk("passthrough", base=False, experts=1, scale=0.5), ours("passthrough", experts=1, scale=0.5)),
        (fb("task_arithmetic", scaling=0.3), ours("task_arithmetic", scaling=0.3)),
        (
            fb("ties", scaling=0.3, threshold=20, merge_func="sum"),
            ours("ties", density=0.2, scaling=0.3, normalize=False),
        ),
        (fb("ties", scaling=1.0, threshold=20, merge_func="mean"), ours("ties", density=0.2)),
        (fb("magmax", scaling=0.5), ours("magmax", scaling=0.5)),
        (fb("model_stock", experts=2), ours("model_stock", experts=2)),
        (fb("model_stock", experts=3), ours("model_stock", average="angle")),
        (fb("slerp", t=0.3), ours("slerp", experts=1, t=0.3)),
        (fb("tsv_m", "float64", scaling=1.0, eigen=False), ours("tsv_m")),
        (fb("tsv_m", "float64", scaling=1.0, eigen=True), ours("tsv_m")),
        (fb("iso_c", scaling=1.3), ours("iso_c", scaling=1.3, but="bias", why=SCALED_MEAN)),
        (fb("iso_cts", scaling=1.0, common=0.8), ours("iso_cts", common_fraction=0.8)),
        (fb("wudi", "float64", steps=100), ours("wudi", solver="adam", steps=100)),
        (fb("opcm", "float64", alpha=0.5), ours("opcm", alpha=0.5)),
        (fb("doge_ta", "float64", subspace=6, density_percent=30, scaling=0.07), ours("doge_ta")),
        (fb("regmean", "float64", ratio=0.9), ours("regmean", shrink=0.9)),
        (
            fb("fisher", normalize=True, coefficients=WEIGHTS),
            ours("fisher", weight=WEIGHTS, floor_by="add"),
        ),
        (
            fb("fisher", normalize=False, coefficients=WEIGHTS),
            ours("fisher", weight=WEIGHTS, normalize=False, floor_by="add"),
        ),
        (fb("knots_ties", scaling=0.6, threshold=20), ours("knots", scaling=0.6, density=0.2)),
        (fb("consensus", scaling=0.5, threshold=0.4, least=2), ours("consensus_ta", dominance=0.4, scaling=0.5)),
    ]
}

HALF = {
    name: TABLE.get(name) or ours("ties", density=1.0, weight=WEIGHTS, **MERGEKIT_TIES)
    for name in (case.name for case in BFLOAT16)
}


class Model:
    """A family as a rule's reduction sees it: all tensors, the weights of linear modules marked."""

    def __init__(self, family: Family, found: Ours):
        self.rule = get_anchor(found.rule)
        experts = [family.base] * found.base_too + family.experts[: found.experts]
        self.rule.check_experts(len(experts))
        self.settings = self.rule.parameters(found.options)
        self.names, self.count = list(family.base), len(experts)
        self._sites = [
            Site(
                name,
                family.base[name],
                [expert[name] for expert in experts],
                self.settings.at(name, 0.0, len(experts)),
                tuple(family.base[name].shape),
                linear=name.endswith(".weight"),
                grams=[g[name] for g in family.grams] if name.endswith(".weight") else (),
                fishers=[f[name] for f in family.fishers],
            )
            for name in family.base
        ]

    def sites(self) -> Iterator[Site]:
        return iter(self._sites)

    def map(self, function: Any) -> Iterator[Any]:
        return map(function, self._sites)

    def constant(self, parameter: str) -> Any:
        return self.settings.constant(parameter, self.names, lambda name: 0.0, self.count)

    def merge(self) -> State:
        state = self.rule.reduce(self) if self.rule.reduce is not None else None
        return {site.name: self._merged(site, state) for site in self._sites}

    def _merged(self, site: Site, state: Any) -> torch.Tensor:
        if self.rule.scope == "module" and not site.linear:
            return site.base if self.rule.others == "base" else sum(site.experts) / len(site.experts)
        return self.rule.apply(site, state)


def assert_parity(family: Family, case: Case, theirs: State) -> None:
    """Frobenius, relative, of each tensor, and of what the merge changed in it."""
    found = TABLE[case.name]
    merged = Model(family, found).merge()
    for name, base in family.base.items():
        if found.but and found.but in name:
            continue
        truth = theirs[name].double()
        error = float((merged[name].double() - truth).norm())
        # A float32 weight has rounding errors of its own, which are all that is allowed where nothing changed.
        rounding = torch.finfo(torch.float32).eps * float(truth.norm())
        assert error <= found.tolerance * float(truth.norm()), f"{case.name}, {name}: {error / float(truth.norm()):.1e}"
        change = float((truth - base.double()).norm())
        assert error <= found.tolerance * change + rounding, f"{case.name}, change of {name}: {error / change:.1e}"


@pytest.fixture(scope="module")
def reference() -> tuple[Family, dict[str, Any], State]:
    with safe_open(FILE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = json.loads(file.metadata()["reference"])
    parts: dict[str, Any] = {"base": {}, "experts": [{}, {}, {}], "grams": [{}, {}, {}], "fishers": [{}, {}, {}]}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "base":
            parts["base"][rest] = value
        elif kind in parts:
            t, _, name = rest.partition("/")
            parts[kind][int(t)][name] = value
    return Family(**parts), metadata, tensors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_committed_numbers(case, reference):
    family, metadata, tensors = reference
    index = [entry["name"] for entry in metadata["cases"]].index(case.name)
    assert_parity(family, case, {name: tensors[f"case/{index}/{name}"] for name in family.base})


@pytest.mark.parametrize("index", range(len(BFLOAT16)), ids=lambda index: BFLOAT16[index].name)
def test_bfloat16_checkpoints_are_merged_in_float32_and_rounded_once(index, reference):
    """Beside mergekit's own code in float64 on the same bfloat16 weights; its bfloat16 arithmetic loses entries that ours rounds right."""
    family, metadata, tensors = reference
    case = BFLOAT16[index]
    assert metadata["half"][index]["name"] == case.name
    merged = Model(family.to(torch.bfloat16).to(torch.float32), HALF[case.name]).merge()

    def flat(state: State) -> torch.Tensor:
        return torch.cat([state[name].reshape(-1) for name in family.base])

    truth, theirs = (
        flat({name: tensors[f"half/{index}/{dtype}/{name}"] for name in family.base})
        for dtype in ("float64", "bfloat16")
    )
    best = truth.bfloat16()
    got = flat(merged).bfloat16()

    def error(rounded: torch.Tensor) -> float:
        return float((rounded.double() - truth.double()).norm())

    def misrounded(rounded: torch.Tensor) -> float:
        return float((rounded != best).float().mean())

    assert theirs.dtype == torch.bfloat16
    assert misrounded(got) <= 0.002  # float32 rounding on the edge between two bfloat16
    assert misrounded(theirs) > 0.09
    assert error(got) <= 1.001 * error(best)
    assert error(theirs) > 1.03 * error(got)


def test_the_file_is_what_the_script_writes(reference):
    _, metadata, tensors = reference
    assert [entry["name"] for entry in metadata["cases"]] == [case.name for case in CASES] == list(TABLE)
    assert metadata["versions"]["mergekit"] == "0.1.5"
    assert metadata["versions"]["fusion-bench"] == "0.2.33"
    for key, value in flatten(make_family()).items():
        torch.testing.assert_close(tensors[key], value, rtol=1e-6, atol=0)
    assert FILE.stat().st_size < 400_000


@pytest.mark.peers
@pytest.mark.parametrize("layout", [None, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_packages_themselves(case, seed, layout):
    if case.peer not in packages_distributions():
        pytest.skip(f"{case.peer} is not installed")
    family = make_family(seed=seed) if layout is None else make_family(layout, experts=3, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        theirs = case.run(family)
    assert_parity(family, case, theirs)
