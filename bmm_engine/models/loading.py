"""What transformers would make of a checkpoint's tensors, found on the meta device: names and shapes, no memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bmm_engine.models.bounds import Held
from bmm_engine.models.building import meta_model, named_class
from bmm_engine.progress import quiet_transformers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loading:
    """`missing`: parameters that the tensors leave to chance; `unexpected`: tensors that are dropped; `mismatched`: name -> (shape of the tensor, of
    the parameter). `named`: the config names the class `model`; else it is the bare model, and heads are not known."""

    model: str
    named: bool
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def loading_of(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], overrides: Mapping[str, Any] | None = None
) -> Loading | None:
    """How the architecture of the directory `path` loads `tensors`: name -> (shape, dtype). transformers' own loading is asked, with all that it
    renames, fuses, ties and ignores; None where this version cannot be asked. `overrides`: keys of the config that differ from the file's.

    Raises `CheckpointError` for a config of which nothing can be built.
    """
    model: Any = meta_model(path, Held.of({name: shape for name, (shape, _) in tensors.items()}), overrides)
    meta: Any = torch.device("meta")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        conversions: Any = get_model_conversion_mapping(model)
        with quiet_transformers():
            found = convert_and_load_state_dict_in_model(
                model,
                {name: torch.empty(shape, dtype=dtype, device=meta) for name, (shape, dtype) in tensors.items()},
                LoadStateDictConfig(
                    ignore_mismatched_sizes=True,
                    device_map={"": meta},
                    weight_mapping=conversions,
                ),
            )
        info = found[0] if isinstance(found, tuple) else found
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
    except ImportError as error:  # an older transformers: it has no such parts
        logger.info("%s: how its tensors load was not checked (%s)", path, error)
        return None
    except (
        AttributeError,
        TypeError,
        NotImplementedError,
    ) as error:  # a newer one, or a class that loads in a way of its own
        logger.warning("%s: how its tensors load was not checked (%s: %s)", path, type(error).__name__, error)
        return None
    buffers = {name for name, _ in model.named_buffers()}  # those that no file needs are no loss
    return Loading(
        type(model).__name__,
        named_class(model.config) is not None,
        tuple(sorted(info.missing_keys)),
        tuple(name for name in tensors if name in info.unexpected_keys and name not in buffers),
        {name: (tuple(ours), tuple(built)) for name, ours, built in sorted(info.mismatched_keys)},
    )
