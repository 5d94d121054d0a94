"""What the tensors of a merge are called in a live model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from bmm_engine.errors import CheckpointError
from bmm_engine.merging.align import Alignment
from bmm_engine.models.names import modern_name
from bmm_engine.models.naming import checkpoint_names


def live_names(alignment: Alignment, expert: int | None, model: nn.Module) -> dict[str, str]:
    """Base tensor name -> its name in the state dict of `model`, of the base's own architecture (None) or an expert's; some may have none there.

    Raises `CheckpointError` for a merged tensor that the live model lacks.
    """
    state = model.state_dict(keep_vars=True)
    by_file = {modern_name(file): live for live, file in checkpoint_names(model).items()}
    by_file = {**{name: name for name in state}, **by_file}  # a base that is itself live goes by live names
    prefix = getattr(model, "base_model_prefix", "")
    found, missing = {}, []
    for name in (*alignment.merged, *alignment.kept):
        own = name if expert is None else alignment.experts[expert].mapping.get(name, name)
        live = next((by_file[n] for n in _spellings((own, name), prefix) if n in by_file), None)
        if live is not None:
            found[name] = live
        elif name in alignment.merged and name not in alignment.base.aliases:
            missing.append(name)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{missing[0]!r}{more} is merged, but the live {type(model).__name__} has no such tensor of its own (transformers fuses or splits some"
            " between file and model). Keep it from the base (keep_base), or merge without running the model: no search, and mode plain."
        )
    return found


def _spellings(names: Sequence[str], prefix: str) -> Iterable[str]:
    for name in map(modern_name, names):
        yield name
        if prefix:
            yield name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else f"{prefix}.{name}"
