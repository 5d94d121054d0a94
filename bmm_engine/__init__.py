"""Bayesian Model Merging: merge fine-tuned models in closed form (arXiv 2605.12843)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that holds it. Loaded when first used: `import bmm_engine` costs no more than torch.
_PUBLIC = {
    "merge": "bmm_engine.merging.merge",
    "plan_merge": "bmm_engine.merging.merge",
    "MergeResult": "bmm_engine.merging.merge",
    "collect_grams": "bmm_engine.statistics.collect",
    "collect_fisher": "bmm_engine.statistics.fisher",
    "FisherSet": "bmm_engine.statistics.fisher",
    "collect_sensitivity": "bmm_engine.statistics.sensitivity",
    "SensitivitySet": "bmm_engine.statistics.sensitivity",
    "collect_sequential": "bmm_engine.statistics.sequential_grams",
    "ContinualMerge": "bmm_engine.merging.continual",
    "GramAccumulator": "bmm_engine.statistics.grams",
    "GramSet": "bmm_engine.statistics.grams",
    "merge_sequential": "bmm_engine.sequential.run",
    "solve_map": "bmm_engine.solving.solve",
    "MapSolution": "bmm_engine.solving.solve",
    "accumulate_gram": "bmm_engine.ops.gram",
    "accumulate_grams": "bmm_engine.ops.gram",
    "accumulate_cross_gram": "bmm_engine.ops.cross_gram",
    "assemble": "bmm_engine.ops.assemble",
    "residual": "bmm_engine.ops.residual",
    "apply_spectral": "bmm_engine.ops.spectral",
    "kth_largest_magnitude": "bmm_engine.ops.select",
    "spectral_path": "bmm_engine.solving.spectral",
    "SpectralPath": "bmm_engine.solving.spectral",
    "Filter": "bmm_engine.solving.filters",
    "blend": "bmm_engine.ops.blend",
    "magnitude_ranks": "bmm_engine.ops.ranks",
    "solve_drift": "bmm_engine.sequential.solve",
    "DriftAccumulator": "bmm_engine.sequential.accumulators",
    "ProjectedAccumulator": "bmm_engine.sequential.accumulators",
    "alignment": "bmm_engine.solving.moments",
    "LowRank": "bmm_engine.ops.lowrank",
    "search": "bmm_engine.searching.run",
    "search_recipe": "bmm_engine.searching.run",
    "SearchResult": "bmm_engine.searching.run",
    "Study": "bmm_engine.searching.study",
    "Score": "bmm_engine.evaluators.scores",
    "Posterior": "bmm_engine.solving.posterior",
    "anchor": "bmm_engine.anchors",
    "get_anchor": "bmm_engine.anchors",
    "registered_anchors": "bmm_engine.anchors",
    "Checkpoint": "bmm_engine.checkpoint",
    "Recipe": "bmm_engine.recipe.recipe",
    "BmmError": "bmm_engine.errors",
    "NumericalWarning": "bmm_engine.errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from bmm_engine.anchors import anchor, get_anchor, registered_anchors
    from bmm_engine.checkpoint import Checkpoint
    from bmm_engine.errors import BmmError, NumericalWarning
    from bmm_engine.evaluators.scores import Score
    from bmm_engine.merging.continual import ContinualMerge
    from bmm_engine.merging.merge import MergeResult, merge, plan_merge
    from bmm_engine.ops.assemble import assemble
    from bmm_engine.ops.blend import blend
    from bmm_engine.ops.cross_gram import accumulate_cross_gram
    from bmm_engine.ops.gram import accumulate_gram, accumulate_grams
    from bmm_engine.ops.lowrank import LowRank
    from bmm_engine.ops.ranks import magnitude_ranks
    from bmm_engine.ops.residual import residual
    from bmm_engine.ops.select import kth_largest_magnitude
    from bmm_engine.ops.spectral import apply_spectral
    from bmm_engine.recipe.recipe import Recipe
    from bmm_engine.searching.run import SearchResult, search, search_recipe
    from bmm_engine.searching.study import Study
    from bmm_engine.sequential.accumulators import DriftAccumulator, ProjectedAccumulator
    from bmm_engine.sequential.run import merge_sequential
    from bmm_engine.sequential.solve import solve_drift
    from bmm_engine.solving.filters import Filter
    from bmm_engine.solving.moments import alignment
    from bmm_engine.solving.posterior import Posterior
    from bmm_engine.solving.solve import MapSolution, solve_map
    from bmm_engine.solving.spectral import SpectralPath, spectral_path
    from bmm_engine.statistics.collect import collect_grams
    from bmm_engine.statistics.fisher import FisherSet, collect_fisher
    from bmm_engine.statistics.grams import GramAccumulator, GramSet
    from bmm_engine.statistics.sensitivity import SensitivitySet, collect_sensitivity
    from bmm_engine.statistics.sequential_grams import collect_sequential


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bmm_engine' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
