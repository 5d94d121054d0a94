"""Was it measured on this very weight? The hash that a measurement keeps of each weight, compared with the weight's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bmm_engine.errors import GramMismatchError
from bmm_engine.statistics.grams import weight_fingerprint


def check_weight(
    where: str,
    what: str,
    name: str,
    recorded: str | None,
    weights_dtype: str,
    weight: Tensor,
    label: str,
    others: Mapping[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Raise `GramMismatchError` unless `what` (a Gram, ...) of the set `where` was measured on the `weight` called `name` of the model `label`.

    `recorded`: the hash of the weight that it was measured on, in `weights_dtype`; None where it keeps none. `others`: label -> what loads the same
    tensor of the merge's other models, by which a wrong order is told.
    """
    if recorded is None:
        return
    dtype = getattr(torch, weights_dtype)
    found = weight_fingerprint(weight, dtype)
    if found == recorded:
        return
    fits = next(
        (other for other, load in (others or {}).items() if weight_fingerprint(load(), dtype) == recorded), None
    )
    belongs = "Collect it again from this expert" if fits is None else f"It fits {fits}"
    raise GramMismatchError(
        f"{where}: measured on another model than {label}: the weight of {name!r} has hash {found}, the {what} was measured with"
        f" {recorded}. {belongs}; list such files in the order of the experts."
    )
