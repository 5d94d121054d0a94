"""The option `calibrate` at work: on the anchor's linear modules, whatever the rule; all else passes as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from bmm_engine.anchors import Site
from bmm_engine.anchors.calibration import AFTER
from bmm_engine.anchors.calibration.larv import Diagnosis, diagnose, layer_scales
from bmm_engine.anchors.polar import low_rank_of, task_vectors
from bmm_engine.errors import NonFiniteWeightError
from bmm_engine.merging.inputs import Inputs
from bmm_engine.solving.solve import check_finite


class Calibrator:
    """Calibrates a merge's sites. `modules`: by its weight's name, each linear module that is meant; empty without the option."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        name = inputs.settings.calibrate
        self.modules = {} if name is None else {m.weight: m for m in inputs.plan.linear.values()}
        self._after = AFTER.get(name or "")
        self._scales: dict[str, float] = {}

    @property
    def looks_first(self) -> bool:
        """Whether all modules must be seen before the first is merged."""
        return bool(self.modules) and self._after is None

    def diagnosis(self, name: str) -> Callable[[], tuple[str, list[Diagnosis]]]:
        """What finds out about a module's task vectors, those of zeros left out."""

        def work() -> tuple[str, list[Diagnosis]]:
            base = self.inputs.load(self.inputs.base, name)
            taus = (tau for e in self.inputs.experts for tau in task_vectors(base, [self.inputs.load(e, name)]))
            return name, [found for tau in taus if (found := diagnose(base, tau)) is not None]

        return work

    def settle(self, found: Iterable[tuple[str, list[Diagnosis]]]) -> None:
        """The scales of the layers, from the diagnoses of all modules."""
        layer_of = {name: layer for name in self.modules if (layer := self.inputs.depth.layer(name)) is not None}
        layers: dict[tuple[str, int, int], list[Diagnosis]] = {}
        for name, own in found:
            if name in layer_of:
                layers.setdefault(layer_of[name], []).extend(own)
        scales = layer_scales(layers)
        self._scales = {name: scales[layer] for name, layer in layer_of.items() if layer in scales}

    def takes_whole(self, name: str) -> bool:
        """Whether a tensor must come in one part."""
        return self._after is not None and name in self.modules

    def before(self, site: Site) -> Site:
        """The site as the rule is to see it."""
        scale = self._scales.get(site.name, 1.0)
        if scale == 1:
            return site
        experts = [(site.base + scale * tau).to(self.inputs.dtype) for tau in task_vectors(site.base, site.experts)]
        low_rank = [None if product is None else product.scale(scale) for product in low_rank_of(site)]
        return replace(site, experts=experts, low_rank=low_rank)

    def after(self, site: Site, merged: Tensor) -> Tensor:
        """The rule's merge of the site, calibrated; oriented as the site is. Raises `NonFiniteWeightError`."""
        if self._after is None or site.name not in self.modules:
            return merged
        turned = self.modules[site.name].transposed and not site.linear
        for tensor in (site.base, *site.experts):
            check_finite(tensor, f"tensor {site.name!r}")
        if count := int((~merged.isfinite()).sum()):
            settings = self.inputs.settings
            raise NonFiniteWeightError(
                f"calibrate {settings.calibrate!r}: of tensor {site.name!r}, as anchor {settings.anchor!r} merges it, {count} of {merged.numel()}"
                " values are NaN or infinite. Give the anchor smaller parameters."
            )
        base, *others = ((t.mT if turned else t).double() for t in (site.base, merged, *site.experts))
        delta, *taus = task_vectors(base, others)
        found = base + self._after(delta, taus)
        return (found.mT if turned else found).to(merged.dtype)
