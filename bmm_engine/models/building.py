"""A checkpoint's config, and the model that transformers builds of it without its weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm_engine.errors import BmmError, CheckpointError
from bmm_engine.models.bounds import Held

if TYPE_CHECKING:
    import torch
    from torch import nn


_NAME_THEM = (
    "Give the linear modules in the recipe: `modules: [...]`, and every 2-D weight whose name matches one of its patterns is taken"
    " as (out, in)."
)


def load_config(path: Path, held: Held, overrides: Mapping[str, Any] | None = None) -> Any:
    """The transformers config of a checkpoint directory whose files hold `held`, with some keys replaced.

    Raises `CheckpointError` if transformers cannot read it, or if it has more layers or labels than the files can account for.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, local_files_only=True)
        held.check_counts(raw, f"{path}/config.json")
        names = raw.get("architectures") or []
        if not isinstance(names, (str, list)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"architectures={str(names)[:100]} is no list of names")
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False, **(overrides or {}))
    except BmmError:
        raise
    except ImportError as error:
        raise _lacking(path, error) from error
    except Exception as error:  # whatever a config class makes of odd values
        kind = _model_type(path)
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            raise CheckpointError(
                f"{path / 'config.json'}: transformers makes no {kind} of it ({told(error)}). Correct the config, or download it again."
            ) from error
        raise UnknownArchitectureError(
            f"{path}: transformers cannot read its config.json ({told(error)}). {_NAME_THEM}"
        ) from error


def _model_type(path: Path) -> Any:
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


class UnknownArchitectureError(CheckpointError):
    """transformers does not know the architecture: names and shapes in the files have to tell."""


def _lacking(path: Path, error: ImportError) -> UnknownArchitectureError:
    return UnknownArchitectureError(
        f"{path}: its architecture needs a library that is not installed ({told(error)}). Install it; or, for a merge that runs no model:"
        f" {_NAME_THEM}"
    )


def model_class(config: Any) -> Any:
    """The transformers class that a config's `architectures` names, or AutoModel where it names none that is known.

    Raises `CheckpointError` for a name that is no model's."""
    import transformers

    return named_class(config) or transformers.AutoModel


def named_class(config: Any) -> Any:
    """The transformers class that a config's `architectures` names, or None where it names none that is known. Raises `CheckpointError`."""
    import transformers
    from torch import nn

    names = getattr(config, "architectures", None) or ()
    for name in [names] if isinstance(names, str) else names:
        if isinstance(name, str) and hasattr(transformers, name):
            found = getattr(transformers, name)
            model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
            if not model or found.config_class is None or found.forward is nn.Module.forward:
                raise CheckpointError(
                    f"{getattr(config, '_name_or_path', '') or 'config.json'}: `architectures` of its config names {name!r}, which is no model that"
                    " can be built. Name the class that the weights are of."
                )
            return found
    return None


def meta_model(path: Path, held: Held, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """The architecture of a checkpoint directory on the meta device: shapes and names, no memory. Raises `CheckpointError`, also for one that
    is far larger than what the files hold."""
    import torch

    config = load_config(path, held, overrides)
    with torch.device("meta"), held.limiting(str(path / "config.json")):
        return _built(path, config)


def _built(path: Path, config: Any) -> Any:
    """A model of that config. Raises `CheckpointError`."""
    import transformers

    cls = model_class(config)
    try:
        return transformers.AutoModel.from_config(config) if cls is transformers.AutoModel else cls(config)
    except BmmError:
        raise
    except ImportError as error:
        raise _lacking(path, error) from error
    except Exception as error:  # whatever a model class makes of odd values
        raise CheckpointError(
            f"{path / 'config.json'}: transformers builds no {cls.__name__} of it ({told(error)}). Correct the config: its `architectures`,"
            " sizes and counts."
        ) from error


def weightless_model(
    path: Path, dtype: torch.dtype, held: Held, overrides: Mapping[str, Any] | None = None
) -> nn.Module:
    """The architecture of a checkpoint directory in evaluation mode: its parameters on the meta device, its buffers as they are made
    (rotary frequencies, position ids), so that it runs with tensors that stand in for the parameters (`torch.func.functional_call`).

    Raises `CheckpointError` as `meta_model` does.
    """
    import torch

    meta_model(path, held, overrides)  # too large a one would fill memory before its parameters go to the meta device
    config = load_config(path, held, overrides)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _parameters_on_meta():
            model: nn.Module = _built(path, config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def made_parameter(model: nn.Module, name: str) -> torch.Tensor | None:
    """What the architecture itself makes of a parameter that checkpoints leave out (sinusoidal positions), in float32; None where chance makes it."""
    import torch

    path, _, leaf = name.rpartition(".")
    init: Any = getattr(model, "_init_weights", None)
    if init is None or not path:
        return None
    made = []
    for seed in (0, 1):
        own = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu").float()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for parameter in own.parameters():
                parameter.fill_(torch.nan if seed else 0)
            init(own)
        made.append(own.get_parameter(leaf).detach())
    return made[0] if torch.equal(*made) else None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made meanwhile lose each parameter's data as soon as they register it."""
    from torch import nn

    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # one that is on it already is tied to another module's
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def told(error: BaseException) -> str:
    """What an error of transformers says, in a line: its first, or the one that says more than which class it was about."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    line = lines[0] if len(lines) == 1 or not lines[0].endswith(":") else f"{lines[0]} {lines[1]}"
    return line if len(line) <= 300 else f"{line[:280]} ..."
