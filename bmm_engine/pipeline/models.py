"""The models that a recipe names: opened, each once, and made live."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm_engine.checkpoint import AdapterSource, Checkpoint, TensorSource, open_adapter
from bmm_engine.checkpoint.compose import LayerRange, StackedSource, root_checkpoint
from bmm_engine.checkpoint.tokenizer import has_processor, has_tokenizer
from bmm_engine.errors import CheckpointError, NonFiniteWeightError
from bmm_engine.executors.devices import check_device
from bmm_engine.merging.sources import Models, adapter_options, open_expert
from bmm_engine.models.architecture import checkpoint_names, load_config, meta_model, model_class, told
from bmm_engine.models.bounds import Held
from bmm_engine.progress import Report, quiet_transformers
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.references import ExpertRecipe, ModelRecipe, StackRecipe

if TYPE_CHECKING:
    from torch import nn


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
    `reports`: let transformers say what the files lack.

    Raises `CheckpointError` for what transformers cannot load, `ConfigError` for a device that is not there.
    """
    import torch

    check_device(device)
    path, held = model_folder(source), held_by(source)
    meta_model(path, held)  # one that the files do not account for would fill memory
    cls = cls or model_class(load_config(path, held))
    _root(source).check_unchanged()
    try:
        with quiet_transformers(reports):
            live, told_of = cls.from_pretrained(
                path, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # of a config or file that it did not foresee, transformers may raise anything
        raise CheckpointError(
            f"{path}: transformers cannot load it as {cls.__name__} ({told(error)}); correct its config.json, or download it again"
        ) from error
    _check_whole(path, live, told_of["missing_keys"])
    if isinstance(source, AdapterSource):
        _fit_tokens(live, source)
        with torch.no_grad():
            for name, tensor in source.live_tensors(checkpoint_names(live)):
                live.get_parameter(name).copy_(tensor)
    return live.to(device), path


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
