"""DELLA: drop entries at random, the smaller of a row the likelier (arXiv 2406.11617), before TIES or task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bmm_engine.anchors.contract import Site, anchor
from bmm_engine.anchors.domains import Elect, NonNegative, Rescale, Share
from bmm_engine.anchors.settings import PerExpert, each
from bmm_engine.anchors.sparse import Masks, blend_masked, linear_scale, restore_l1, without_l1
from bmm_engine.errors import ConfigError

_PAPER = "Deep et al. 2024, arXiv 2406.11617"


@anchor(scope="tensor", elementwise=without_l1, stored=True, paper=_PAPER)
def della(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    density: PerExpert[Share] = each(0.5),
    epsilon: PerExpert[NonNegative] = each(0.15),
    weight: PerExpert[float] = each(1.0),
    scaling: float = 1.0,
    rescale: Rescale = "inverse",
    elect: Elect = "sum",
    normalize: bool = True,
    seed: int = 0,
) -> Tensor:
    """Keep an entry with probability `p = density - epsilon + 2 epsilon r`, r its rank in its row, divide it by p; then elect signs as in TIES.

    r goes from 0 for the smallest magnitude to 1; a vector is one row. Needs 0 < density - epsilon and density + epsilon < 1 (density: 1 keeps
    all, 0 none). `rescale`: 1 / p (the authors), what restores the tensor's L1 norm (mergekit), or none. `weight`: a factor of each task
    vector. `elect`: the sign of the sum, or of the number of signs; plus where that is 0. `normalize`: divide by the weights of those that
    agree. `seed`: of the random choice.
    """
    return blend_masked(
        site,
        _thinned(site),
        combine=f"elect_{elect}",
        weights=weight,
        inverse=rescale == "inverse",
        normalize=normalize,
        scaling=scaling,
    )


@anchor(scope="tensor", elementwise=without_l1, stored=True, paper=_PAPER)
def della_linear(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    site: Site,
    density: PerExpert[Share] = each(0.5),
    epsilon: PerExpert[NonNegative] = each(0.15),
    weight: PerExpert[float] = each(1.0),
    scaling: float = 1.0,
    rescale: Rescale = "inverse",
    normalize: bool = False,
    seed: int = 0,
) -> Tensor:
    """DELLA without the election: `W = W_0 + scaling sum_t w_t tau~_t`, tau~ thinned by the magnitudes' ranks and rescaled.

    `normalize`: divide by the sum of the weights. The others: see della.
    """
    scale = linear_scale(weight, scaling, normalize)
    return blend_masked(site, _thinned(site), weights=weight, inverse=rescale == "inverse", scaling=scale)


def _thinned(site: Site) -> Masks:
    given = site.parameters
    masks = Masks.all_of(len(site.experts))
    masks.seeds[:] = [site.seed(given["seed"], t) for t in range(len(site.experts))]
    for t, (density, epsilon) in enumerate(zip(given["density"], given["epsilon"], strict=True)):
        low, high = density - epsilon, density + epsilon
        sampled = 0 < density < 1
        if sampled and not (low > 0 and high < 1):
            raise ConfigError(
                f"anchor della, tensor {site.name!r}, expert {t}: density {density} and epsilon {epsilon} give probabilities from {low:g} to"
                f" {high:g}; they must lie within 0 and 1, so epsilon below {min(density, 1 - density):g}."
            )
        masks.keep[t] = (low, high) if sampled else 1.0
        masks.scales[t] = 1.0 if density else 0.0
    if given["rescale"] == "l1":
        restore_l1(site, masks, [0 < density < 1 for density in given["density"]])
    return masks
