"""What the tensors of a merge are called in a live model."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from bmm_engine.errors import CheckpointError
from bmm_engine.merging.align import Alignment
from bmm_engine.models.naming import Naming, inner_model


def live_names(
    alignment: Alignment, expert: int | None, model: nn.Module, fused: Collection[str] = ()
) -> dict[str, str]:
    """Base tensor name -> its name in the state dict of `model`, of the base's own architecture (None) or an expert's; some may have none there,
    such as those that are `fused` into others.

    Raises `CheckpointError` for a merged tensor that the live model lacks.
    """
    names = (*alignment.merged, *alignment.kept)
    own = {n: n if expert is None else alignment.experts[expert].own_name(n) or n for n in names}
    naming, (_, wrapped) = Naming.of(model), inner_model(model)
    by_own, by_base = naming.known(own.values()), naming.known(names)
    found, missing = {}, []
    for name in names:
        live = next((live for live in (by_own.get(own[name]), by_base.get(name)) if live in naming.stored), None)
        if live is not None:
            found[name] = f"{wrapped}{live}"
        elif name not in fused and name in alignment.merged and name not in alignment.base.aliases:
            missing.append(name)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{missing[0]!r}{more} is merged, but the live {type(model).__name__} has no such tensor of its own (transformers fuses or splits some"
            " between file and model). Merge without running the model: no search, and mode plain."
        )
    return found
