"""A PEFT LoRA adapter over its base as a source of tensors: `W = W_base + scaling B A` (arXiv 2106.09685), made when asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from bmm_engine.checkpoint.adapter_changes import Delta, find_changes, stored_spec
from bmm_engine.checkpoint.adapter_config import CONFIG_FILENAME, LoraSettings
from bmm_engine.checkpoint.adapter_kinds import check_neighbours, tell_base
from bmm_engine.checkpoint.adapter_names import match_names
from bmm_engine.checkpoint.layout import contained, full_weights
from bmm_engine.checkpoint.quantised import refuse_quantised
from bmm_engine.checkpoint.reader import WeightFile, file_sha256, locate, open_file
from bmm_engine.checkpoint.source import TensorSource, TensorSpec
from bmm_engine.checkpoint.vocabulary import config_of_rows
from bmm_engine.errors import CheckpointError, MissingTensorError
from bmm_engine.ops.lowrank import LowRank

WEIGHT_FILENAMES = ("adapter_model.safetensors", "adapter_model.bin")
# Elements of a tensor that are taken at a time where DoRA needs norms over all rows, or two tensors are compared.
_BLOCK_ELEMENTS = 2**22


class AdapterSource(TensorSource):
    """The tensors of `base` with a LoRA adapter in them, by the base's names; only what is asked for is ever read.

    Adapted weights are computed in float32 (float64 where the base's are), for the rows asked for, and come in that dtype. Trained biases
    and `modules_to_save` come from the adapter as they are stored; those that the base lacks (a task head) are further names. DoRA
    (arXiv 2402.09353) and convolutions are applied as PEFT does.

    `live_names`: live parameter name -> name in the base's files, for architectures where they differ. `transposed`: names of the base's
    weights that are stored as (in, out), as GPT-2's; without it the shapes tell, and for a square weight the adapter's `fan_in_fan_out`.
    In both, as in the adapter, the base model's prefix may be there or not.

    Raises CheckpointError (also MissingTensorError), with the remedy, for what cannot be applied exactly, and ShapeMismatchError.
    """

    def __init__(
        self,
        base: TensorSource,
        path: Path,
        *,
        label: str | None = None,
        hub_id: str | None = None,
        live_names: Mapping[str, str] | None = None,
        transposed: Collection[str] | None = None,
    ):
        self.base = base
        self.path = path
        self.label = label or str(path)
        self.hub_id = hub_id
        self.settings = LoraSettings.read(path)
        refuse_quantised(base)
        self._file = _open_weights(path)
        self._square_norms: dict[str, Tensor] = {}
        self._changes = find_changes(base, self._file.specs, self.settings, self.label, live_names or {}, transposed)
        if not self._changes.deltas and not self._changes.saved:
            raise CheckpointError(f"{self._file.path}: holds no tensors; save the adapter again or download it again")
        self._check_ties()
        self._config = config_of_rows(
            base, {name: self.spec(name).shape for name in self._changes.saved if name in base}
        )

    @property
    def revision(self) -> str | None:
        """The commit of a hub snapshot, else None."""
        return self.path.name if self.hub_id is not None else None

    @property
    def trained_on(self) -> str | None:
        """The base model that the adapter's config names."""
        return self.settings.trained_on

    @property
    def config(self) -> dict[str, Any] | None:
        """The base's, with the number of tokens that the adapter's embeddings have."""
        return self._config

    @property
    def aliases(self) -> dict[str, str]:
        return self.base.aliases

    @property
    def weight_file(self) -> str:
        return self._file.path.name

    @property
    def changed(self) -> tuple[str, ...]:
        """The base's names whose tensors the adapter changes."""
        return tuple(name for name in self.base.names() if name in self._changes)

    def names(self) -> tuple[str, ...]:
        return (*self.base.names(), *(name for name in self._changes.saved if name not in self.base))

    def __contains__(self, name: object) -> bool:
        return name in self._changes.saved or name in self.base

    def spec(self, name: str) -> TensorSpec:
        held = self.aliases.get(name, name)
        spec = self._stored_spec(held)
        computed = held in self._changes.deltas or held in self._changes.biases
        return replace(spec, name=name, dtype=_wide(spec.dtype) if computed else spec.dtype)

    def load(self, name: str, rows: slice | None = None) -> Tensor:
        held = self.aliases.get(name, name)
        stored = self._load_stored(held, rows)
        wide = _wide(stored.dtype)
        if held in self._changes.biases:
            key, scaling = self._changes.biases[held]
            return (stored.double() + scaling * self._trained(key, rows).double()).to(wide)
        delta = self._changes.deltas.get(held)
        if delta is None:
            return stored
        if delta.magnitude is not None:
            return self._dora(held, delta, stored.double(), rows).to(wide)
        weight = stored.to(wide)
        self._factors(delta, wide, rows).add_to(_matrix(weight))
        return weight

    def low_rank(self, name: str) -> LowRank | None:
        """`load(name) - base.load(name)` as factors, `scaling` in the left one; None where it is not of low rank, or not a matrix.

        A linear weight's is (out, in), whichever way round the base stores it; an embedding's is as stored. In float32, or float64 where
        the base's tensor is.
        """
        held = self.aliases.get(name, name)
        delta = self._changes.deltas.get(held)
        if delta is None or delta.magnitude is not None or held in self._changes.saved:
            return None
        spec = self.base.spec(held)
        if len(spec.shape) != 2:
            return None
        factors = self._factors(delta, _wide(spec.dtype))
        return factors.mT if delta.transposed and not delta.embedding else factors

    def live_tensors(self, live_names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """`(live name, tensor)` of each parameter that the adapter changes, for a live model of the base that is to become the expert.

        `live_names`: live parameter name -> name in a checkpoint, with or without the prefix. Raises MissingTensorError where none fits.
        """
        known = {name: name for name in (*self.names(), *self.aliases)}
        found = match_names(set(live_names.values()), known)
        # A base may be stored under its live names.
        found |= {live: known[live] for live, file in live_names.items() if file not in found and live in known}
        targets = {live: found.get(file, found.get(live, "")) for live, file in live_names.items()}
        changed = {live: name for live, name in targets.items() if self.aliases.get(name, name) in self._changes}
        if not changed:
            example = next(iter(live_names.values()), "nothing")
            raise MissingTensorError(
                f"{self.label}: changes {self.changed[0]!r} and others, none of which the live model has (it has {example!r}); load the"
                f" architecture of {self.base.label}"
            )
        for live, name in changed.items():
            yield live, self.load(name)

    def shard_sizes(self) -> dict[str, int]:
        """Base name of the adapter's weight file -> its size in bytes."""
        return {self._file.path.name: self._file.path.stat().st_size}

    def sha256(self, stop: Event | None = None) -> dict[str, str]:
        """Base name -> hex SHA-256 of the adapter's two files. `stop`: as in `file_sha256`."""
        return {path.name: file_sha256(path, stop) for path in (self._file.path, self.settings.path)}

    # Reading

    def _read(self, key: str, rows: slice | None = None) -> Tensor:
        return self._file.read(key, rows)

    def _trained(self, key: str, rows: slice | None = None) -> Tensor:
        """What is multiplied or added. Raises `CheckpointError` for NaN and infinity, which would be taken for the base's."""
        tensor = self._read(key, rows)
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise CheckpointError(
                f"{self._file.path}: {key!r} holds {bad} values that are NaN or infinite; train the adapter again, or download it again"
            )
        return tensor

    def _stored_spec(self, name: str) -> TensorSpec:
        return stored_spec(name, self.base, self._file.specs, self._changes.saved)

    def _load_stored(self, name: str, rows: slice | None) -> Tensor:
        saved = self._changes.saved.get(name)
        return self.base.load(name, rows) if saved is None else self._read(saved, rows)

    def _factors(self, delta: Delta, dtype: torch.dtype, rows: slice | None = None) -> LowRank:
        """The change of the weight (of its `rows`) in the order in which the base stores it, as a matrix."""
        if delta.transposed:
            a = self._trained(delta.a)
            left, right = (a if rows is None else a[:, rows]).mT, self._trained(delta.b).mT
        else:
            left, right = _matrix(self._trained(delta.b, rows)), _matrix(self._trained(delta.a))
        return LowRank((left.double() * delta.scaling).to(dtype), right.to(dtype))

    def _dora(self, name: str, delta: Delta, weight: Tensor, rows: slice | None) -> Tensor:
        """`m (W + scaling B A) / ||W + scaling B A||`, the norm over each output's row; `weight`: these rows of W, float64."""
        assert delta.magnitude is not None
        magnitude = self._trained(delta.magnitude).reshape(-1).double()
        matrix = self._factors(delta, torch.float64, rows).add_to(_matrix(weight))
        if delta.transposed:
            matrix *= magnitude / self._column_norms(name, delta)
        else:
            matrix *= ((magnitude if rows is None else magnitude[rows]) / matrix.norm(dim=1))[:, None]
        return weight

    def _column_norms(self, name: str, delta: Delta) -> Tensor:
        if name not in self._square_norms:
            height, width = self._stored_spec(name).shape
            total = torch.zeros(width, dtype=torch.float64)
            for rows in _blocks(height, width):
                block = self._load_stored(name, rows).double()
                total += self._factors(delta, torch.float64, rows).add_to(block).pow(2).sum(0)
            self._square_norms[name] = total
        return self._square_norms[name].sqrt()

    def _check_ties(self) -> None:
        """A tensor that the base holds under several names must change under all of them alike, else it is no longer one."""
        tied: dict[str, list[str]] = {}
        for alias, holder in self.aliases.items():
            tied.setdefault(holder, [holder]).append(alias)
        for holder, names in tied.items():
            changed = [name for name in names if name in self._changes]
            if not changed:
                continue
            if len(changed) != len(names) or not all(self._same_change(holder, name) for name in names[1:]):
                others = [name for name in names if name not in changed]
                what = f"but not {', '.join(map(repr, others))}" if others else "but not alike"
                raise CheckpointError(
                    f"{self.label}: changes {', '.join(map(repr, changed))} {what}, and {self.base.label} ties"
                    f" {' and '.join(map(repr, names))} to one tensor. In the trained model they differ: save the base with both"
                    " tensors and tie_word_embeddings: false, and pass that as the base"
                )

    def _same_change(self, first: str, second: str) -> bool:
        deltas, saved, biases = self._changes.deltas, self._changes.saved, self._changes.biases
        if any((first in changes) != (second in changes) for changes in (deltas, saved, biases)):
            return False
        if first in biases:
            (one_bias, one_scaling), (other_bias, other_scaling) = biases[first], biases[second]
            return one_scaling == other_scaling and self._same_tensor(one_bias, other_bias)
        if first in saved and not self._same_tensor(saved[first], saved[second]):
            return False
        if first not in deltas:
            return True
        one, other = deltas[first], deltas[second]
        if one.magnitude is not None or other.magnitude is not None:
            return False  # the norms run along different axes
        ours, theirs = self._factors(one, torch.float64), self._factors(other, torch.float64)
        return torch.equal(ours.left, theirs.left) and torch.equal(ours.right, theirs.right)

    def _same_tensor(self, first: str, second: str) -> bool:
        one, other = self._file.specs[first], self._file.specs[second]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        height, size = (one.shape or (1,))[0], math.prod(one.shape)
        return all(
            torch.equal(self._read(first, rows), self._read(second, rows))
            for rows in (_blocks(height, size // max(1, height)) if one.shape else [None])
        )


def is_adapter(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> bool:
    """True for a directory, or a model on the hub, that holds a PEFT adapter.

    Raises CheckpointError where there is nothing at all, or a full model as well.
    """
    path, _ = locate(path_or_hub_id, revision, cache_dir, local_files_only)
    if not os.path.lexists(path / CONFIG_FILENAME):
        return False
    full = full_weights(path)
    if full is not None:
        raise CheckpointError(
            f"{path_or_hub_id}: holds a PEFT adapter ({CONFIG_FILENAME}) and a full model ({full}); copy the files of the one that"
            " is meant to a directory of its own"
        )
    return True


def open_adapter(
    path_or_hub_id: str | Path,
    base: TensorSource,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    label: str | None = None,
    live_names: Mapping[str, str] | None = None,
    transposed: Collection[str] | None = None,
) -> AdapterSource:
    """Open an adapter, in a directory or on the hub, over its `base`. `live_names`, `transposed` and errors: see `AdapterSource`."""
    try:
        path, hub_id = locate(path_or_hub_id, revision, cache_dir, local_files_only)
        source = AdapterSource(
            base,
            path,
            label=label or str(path_or_hub_id),
            hub_id=hub_id,
            live_names=live_names,
            transposed=transposed,
        )
        check_neighbours(path, source.weight_file)
        tell_base(source.label, source.trained_on, source.settings.revision, base)
        return source
    except OSError as error:
        raise CheckpointError(
            f"{path_or_hub_id}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def _open_weights(path: Path) -> WeightFile:
    for name in WEIGHT_FILENAMES:
        if os.path.lexists(path / name):
            return open_file(contained(path, name, asked_by="the directory"))
    raise CheckpointError(
        f"{path}: has {CONFIG_FILENAME}, but neither {' nor '.join(WEIGHT_FILENAMES)}; save the adapter with save_pretrained or"
        " download it again"
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matrix(tensor: Tensor) -> Tensor:
    """(out, all else), on the same memory."""
    return tensor.flatten(1)


def _blocks(height: int, width: int) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    return [slice(start, start + step) for start in range(0, height, step)]
