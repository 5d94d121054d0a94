"""RegMean++: RegMean on the activations that the merged model's lower layers give (arXiv 2508.03121)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.regmean import Ridge, Shrink, Weight, normal_equations, solve
from bmm_engine.anchors.settings import PerExpert, each


@anchor(scope="module", needs="sequential_grams", paper="Nguyen et al. 2025, arXiv 2508.03121")
def regmean_plusplus(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    shrink: Shrink = 0.95,
    weight: PerExpert[Weight] = each(1.0),
    ridge: Ridge = 0.0,
) -> Tensor:
    """RegMean whose Grams come from each expert's block reading what the merged blocks below it give, measured block by block.

    The algebra is RegMean's; the Grams must be those of `collect_sequential` with the same parameters. `shrink`: what entries off a Gram's
    diagonal are multiplied by (0.95 for CLIP, 0.1 for language models in its authors' settings). `weight`, `ridge`: as in regmean.
    """
    return solve(normal_equations(experts, site.grams, weight, shrink, site.name), ridge, site.name).to(base.dtype)
