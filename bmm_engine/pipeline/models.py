"""The models that a recipe names: opened, each once, and made live."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm_engine.checkpoint import AdapterSource, Checkpoint, TensorSource, open_adapter
from bmm_engine.checkpoint.compose import LayerRange, StackedSource, root_checkpoint
from bmm_engine.checkpoint.tokenizer import has_processor, has_tokenizer
from bmm_engine.disk.files import named
from bmm_engine.errors import BmmError, CheckpointError, NonFiniteWeightError
from bmm_engine.executors.devices import check_device
from bmm_engine.merging.sources import Models, adapter_options, open_expert
from bmm_engine.models.bounds import Held
from bmm_engine.models.building import load_config, meta_model, model_class, told
from bmm_engine.models.naming import Naming, checkpoint_names
from bmm_engine.progress import Report, quiet_transformers
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.references import ExpertRecipe, ModelRecipe, StackRecipe

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)


def open_models(recipe: Recipe, local_files_only: bool = False) -> Models:
    """A recipe's base and experts. Raises what opening them raises."""
    opener = ModelOpener(local_files_only)
    base = opener.source(recipe.base)
    return Models(base, tuple(opener.expert(base, expert) for expert in recipe.experts))


class ModelOpener:
    """Opens what a recipe calls models, each checkpoint once."""

    def __init__(self, local_files_only: bool = False):
        self.local_files_only = local_files_only
        self._open: dict[tuple[str | None, ...], TensorSource] = {}

    def source(self, model: str | ModelRecipe | StackRecipe) -> TensorSource:
        """A full model, or one with its adapter."""
        if isinstance(model, StackRecipe):
            return StackedSource([LayerRange(self.source(part), *part.layers) for part in model.slices])
        if isinstance(model, str):
            model = ModelRecipe(model=model)
        key = (model.model, model.revision, model.adapter, model.adapter_revision)
        if key not in self._open:
            self._open[key] = self._opened(model)
        return self._open[key]

    def expert(self, base: TensorSource, expert: ExpertRecipe) -> TensorSource:
        """An expert, which may be an adapter of `base`."""
        if not isinstance(expert.model, str):
            return self.source(expert.model)
        return open_expert(expert.model, base, expert.label, self.local_files_only)

    def _opened(self, model: ModelRecipe) -> TensorSource:
        if model.adapter is None:
            return Checkpoint.open(model.model, revision=model.revision, local_files_only=self.local_files_only)
        base = self.source(ModelRecipe(model=model.model, revision=model.revision))
        return open_adapter(
            model.adapter,
            base,
            revision=model.adapter_revision,
            local_files_only=self.local_files_only,
            **adapter_options(base),
        )


def live_model(
    source: TensorSource, *, cls: Any = None, dtype: str = "float32", device: str = "cpu", reports: bool = True
) -> tuple[nn.Module, Path]:
    """A checkpoint, or an adapter on one, as a live model of its own architecture (or of the class `cls`); and where its tokenizer lies.
    `reports`: the log hears of what the files lack, and of what has no place in the model.

    Raises `CheckpointError` for what transformers cannot load, `ConfigError` for a device that is not there.
    """
    import torch

    check_device(device)
    path, held = model_folder(source), held_by(source)
    meta_model(path, held)  # one that the files do not account for would fill memory
    config = load_config(path, held)
    cls = cls or model_class(config)
    tensors = _Tensors(_root(source))
    try:
        with quiet_transformers(reports=False):
            live, told_of = cls.from_pretrained(
                None, config=config, state_dict=tensors.by_name(), dtype=getattr(torch, dtype), output_loading_info=True
            )
    except Exception as error:  # of a config or file that it did not foresee, transformers may raise anything
        if tensors.failed is not None:
            raise tensors.failed from None
        raise CheckpointError(
            f"{path}: transformers cannot load it as {cls.__name__} ({told(error)}); correct its config.json, or download it again"
        ) from error
    missing = _filled(live, _root(source), told_of["missing_keys"])
    _check_whole(path, live, missing)
    if reports:
        _report(path, live, {**told_of, "missing_keys": missing})
    if isinstance(source, AdapterSource):
        _fit_tokens(live, source)
        with torch.no_grad():
            for name, tensor in source.live_tensors(checkpoint_names(live)):
                live.get_parameter(name).copy_(tensor)
    return live.to(device), path


def _filled(live: nn.Module, source: Checkpoint, missing: Iterable[str]) -> list[str]:
    """What is still missing once the live model has what the files hold under names that transformers does not know: of a wrapped model."""
    import torch

    missing = list(missing)
    if not missing:
        return missing
    files = {name: file for file, name in Naming.of(live).known(source.names()).items()}
    state = live.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in missing:
            if name in files and name in state and state[name].shape == source.spec(files[name]).shape:
                state[name].copy_(source.load(files[name]))
            else:
                files.pop(name, None)
    return [name for name in missing if name not in files]


def _report(path: Path, live: nn.Module, told_of: Mapping[str, Iterable[str]]) -> None:
    for key, what in (
        ("missing_keys", "are not in its files, and are random now"),
        ("unexpected_keys", "have no place in it"),
    ):
        if names := sorted(told_of[key]):
            logger.warning("%s: as %s, %d tensors %s: %s", path, type(live).__name__, len(names), what, named(names))


class _Tensors:
    """The tensors of a checkpoint for transformers, which would map its files: one that is cut meanwhile would end the process."""

    def __init__(self, source: Checkpoint):
        self.source = source
        self.failed: BmmError | None = None

    def by_name(self) -> dict[str, Any]:
        """Each is read when it is asked for, as from files; by older versions of transformers, which ask for tensors, all at once."""
        from importlib.util import find_spec

        lazily = find_spec("transformers.core_model_loading") is not None
        return {name: _Unread(self, name) if lazily else self.source.load(name) for name in self.source.shapes()}

    def read(self, name: str) -> Tensor:
        try:
            return self.source.load(name)
        except BmmError as error:  # transformers makes a list of what went wrong, without a word of ours
            self.failed = error
            raise


@dataclass(frozen=True)
class _Unread:
    tensors: _Tensors
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensors.read(self.name)[index]


def _fit_tokens(live: Any, source: AdapterSource) -> None:
    """Give a base's live model as many rows for tokens as its adapter's embeddings have."""
    for part in (source.config or {}, (source.config or {}).get("text_config") or {}):
        count = part.get("vocab_size")
        if count is None or live.get_input_embeddings() is None:
            continue
        if count != live.get_input_embeddings().weight.shape[0] and source.config is not source.base.config:
            live.resize_token_embeddings(count, mean_resizing=False)
        return


def _check_whole(path: Path, live: nn.Module, missing: Iterable[str]) -> None:
    """Raise `CheckpointError` unless the body of a model that was loaded is what its files hold: transformers makes up what they lack, and takes NaN
    as it is. Heads and poolers may be missing: a bare encoder has none."""
    import torch

    prefix = getattr(live, "base_model_prefix", "")
    bare = not (prefix and hasattr(live, prefix))
    lacking = [name for name in missing if (bare or name.startswith(f"{prefix}.")) and "pooler" not in name]
    if lacking:
        raise CheckpointError(
            f"{path}: its files lack {len(lacking)} tensors that {type(live).__name__} has (the first is {lacking[0]!r}), and a model that is run"
            " needs them all. Correct its config.json or the names in its files, or download it again."
        )
    for name, parameter in live.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteWeightError(
                f"{path}: the weight {name!r} holds NaN or infinity in {str(parameter.dtype).removeprefix('torch.')}, so what is measured would too."
                " Train it again, or run it in a wider dtype."
            )


def model_folder(source: TensorSource) -> Path:
    """Where a model that can be run lies, with its config and tokenizer: of an adapter, its base. Raises `CheckpointError` for a view."""
    return _root(source).path


def preparing_folder(
    source: TensorSource, base: TensorSource | None, *, images: bool = False, report: Report = lambda line: None
) -> Path:
    """Where the tokenizer (or, for `images`, the processor) of a model's data lies: with its adapter, with itself, or, since many are saved without
    one, with the `base` of the merge; `report` hears of that. Where none has one, the model's own folder."""
    own = model_folder(source)
    has, what = (has_processor, "image processor") if images else (has_tokenizer, "tokenizer")
    if isinstance(source, AdapterSource) and has(source.path):
        return source.path
    root = None if base is None else root_checkpoint(base)
    if has(own) or root is None or not has(root.path):
        return own
    report(f"{source.label}: has no {what} of its own; its data are read with that of the base, {root.label}")
    return root.path


def held_by(source: TensorSource) -> Held:
    """What the files of a model that can be run hold. Raises `CheckpointError` for a view."""
    return Held.of(_root(source).shapes())


def _root(source: TensorSource) -> Checkpoint:
    root = source.base if isinstance(source, AdapterSource) else source
    if not isinstance(root, Checkpoint):
        raise CheckpointError(
            f"{source.label}: cannot be run, since it is no checkpoint of its own; save it as one, or name statistics measured before."
        )
    return root
