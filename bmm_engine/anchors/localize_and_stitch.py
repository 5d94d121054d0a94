"""Localize-and-Stitch without data: each task's largest entries over the model, averaged where they meet (arXiv 2408.13656)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from bmm_engine.anchors.contract import Model, Site, anchor
from bmm_engine.anchors.domains import PositiveShare
from bmm_engine.anchors.select import just_above, kth_smallest_magnitudes, over
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.ops.blend import blend

_LAYER = re.compile(r"(?:^|\.)\d+(?=\.|$)")


def localize(model: Model) -> tuple[float, ...]:
    """Per task the least magnitude that is stitched."""
    layers_only = model.constant("layers_only")

    def stitched(site: Site) -> list[list[tuple[Tensor, Tensor]]]:
        return [[(expert, site.base) for expert in site.experts]] if _stitched(site.name, layers_only) else []

    ranks = [partial(_last_of, share) for share in model.constant("density")]
    thresholds = kth_smallest_magnitudes(over(model, stitched), ranks)
    return tuple(just_above(threshold) for threshold in thresholds)


@anchor(scope="model", elementwise=True, stored=True, reduce=localize, paper="He et al. 2024, arXiv 2408.13656")
def localize_and_stitch(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    state: tuple[float, ...],
    density: PerExpert[PositiveShare] = each(0.1),
    scaling: float = 1.0,
    layers_only: bool = False,
) -> Tensor:
    """`W = W_0 + scaling m`, m the mean of the task vectors that have there one of their top `density` share of the model's entries.

    An entry counts if it is larger than the last one of the share, as in the authors' code. `layers_only`: tensors outside the numbered layers
    (embeddings, head) stay the base's and do not count, as in the authors' experiments with language models.
    """
    if not _stitched(site.name, layers_only):
        return blend(base, [base])
    return blend(base, experts, combine="mean_kept", lower=state, scaling=scaling)


def _last_of(share: float, n: int) -> int:
    """The rank of the least of the `share` largest of n magnitudes."""
    return n + 1 - max(1, int(n * share))


def _stitched(name: str, layers_only: bool) -> bool:
    return not layers_only or _LAYER.search(name) is not None
