"""Calibrations, which go with any rule: on the weights of linear modules, before the rule (its experts) or after it (its merge).

One after the rule is a function of the merge and of the experts, `(delta, taus) -> delta`, with `delta = W - W_0` and `tau_t = W_t - W_0`, all
(out, in) in float64; it must not write into what it gets. The one before it, `larv`, finds a scale of the task vectors for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from bmm_engine.anchors.calibration.subspace_boost import subspace_boost
from bmm_engine.anchors.calibration.svc import svc

AFTER: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {"svc": svc, "subspace_boost": subspace_boost}
