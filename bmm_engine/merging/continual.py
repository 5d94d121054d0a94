"""Continual merging: one expert after the other joins an already merged model, in memory and time that do not grow with their number.

The rule is OPCM's (arXiv 2501.09522): `S_t = S_{t-1} + (tau_t outside what S_{t-1} uses)`, `W = W_0 + (mean_t ||tau_t|| / ||S_t||) S_t`. What is kept
is `S_t` and one number for each expert; the experts themselves are not needed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bmm_engine.anchors.opcm import add_expert, mean_norm_factor
from bmm_engine.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    TensorSource,
    TensorSpec,
    input_record,
    merge_record,
    open_source,
)
from bmm_engine.checkpoint.compose import root_checkpoint
from bmm_engine.checkpoint.dtypes import float_dtype
from bmm_engine.checkpoint.ownership import WEIGHTS
from bmm_engine.checkpoint.safetensors_io import byte_view
from bmm_engine.checkpoint.staging import STAGE, clean_stages
from bmm_engine.disk.files import foreign, is_file, is_folder, matches, named, remove_own
from bmm_engine.errors import CheckpointError, ConfigError, OutputExistsError, OutputWriteError
from bmm_engine.merging.accounting import check_configs
from bmm_engine.merging.align import AlignedExpert, align
from bmm_engine.merging.output import Target, output_specs, write_record_and_card
from bmm_engine.merging.plan import find_linear_modules
from bmm_engine.merging.sources import Model, open_expert
from bmm_engine.merging.stream import Piece, row_slabs
from bmm_engine.parallel import in_order
from bmm_engine.solving.solve import check_finite

T = TypeVar("T")

STATE_FILENAME = "continual.json"
_FORMAT, _VERSION = "bmm-continual", 1
_LOCK, _STAGED_STATE = ".lock", f".{STATE_FILENAME}.partial"
_is_sum = matches(WEIGHTS)


@dataclass(frozen=True)
class _State:
    """All that is known beside S_t; `folder` holds S_t under the base's tensor names, `linear` maps a linear module's weight to whether it is stored
    transposed. `squares`: `||tau_t||^2` of each expert; `merged`: `||S_t||^2`."""

    alpha: float
    base: str
    linear: dict[str, bool]
    keep_base: list[str]
    folder: str = ""
    squares: list[float] = field(default_factory=list)
    merged: float = 0.0
    inputs: list[dict[str, Any]] = field(default_factory=list)


class ContinualMerge:
    """A merge that experts are added to, kept in the directory `state`; give the same directory to go on with it later.

    `base`: a directory, hub id, state dict, live model or TensorSource, the same each time; experts may also be LoRA adapters of it.
    `alpha` in [0, 1): the share of the singular values of what is merged already that a new expert is kept out of (0.5). `modules`: shell patterns
    of the linear modules, as in `merge`; `keep_base`: patterns of tensors that stay the base's. All three are settled when the directory is new;
    later they may be left out.

    The directory is ours by its `continual.json`; other files that are put into it later stay there.

    Raises `ConfigError` for settings or a base that differ from the directory's, `OutputExistsError` for a directory of something else,
    `CheckpointError` for one that is damaged.
    """

    def __init__(
        self,
        base: Model,
        *,
        state: str | os.PathLike[str],
        alpha: float | None = None,
        modules: Iterable[str] | None = None,
        keep_base: Iterable[str] | None = None,
    ):
        self.path = Path(state).expanduser().resolve()
        self._given = open_source(os.fspath(base) if isinstance(base, os.PathLike) else base)
        if alpha is not None and not 0 <= alpha < 1:
            raise ConfigError(f"alpha must be in [0, 1), not {alpha}.")
        known = self._read_state()
        if known is not None and not known.squares:
            known = None  # begun, and settled by nothing yet
        patterns = known.keep_base if known is not None and keep_base is None else _listed(keep_base) or []
        self._alignment = align(self._given, [], patterns, live=base if isinstance(base, nn.Module) else None)
        self._base = self._alignment.base
        self._dtype = float_dtype(self._base.spec(n).dtype for n in self._alignment.merged)
        linear = known.linear if known is not None else {}
        if known is None or modules is not None:
            found = find_linear_modules(
                self._alignment, base if isinstance(base, nn.Module) else None, _listed(modules)
            )
            linear = {module.weight: module.transposed for module in found.values()}
        asked = _State(
            alpha=known.alpha if known is not None and alpha is None else 0.5 if alpha is None else float(alpha),
            base=_fingerprint(self._base, self._alignment.merged),
            linear=linear,
            keep_base=list(patterns),
        )
        self._state = asked if known is None else self._same(known, asked)

    @property
    def count(self) -> int:
        """How many experts have been added."""
        return len(self._state.squares)

    def add(self, expert: Model, *, unchecked_configs: bool = False) -> None:
        """Merge one more expert in. The directory changes at once when all is written; a run that dies before leaves the old state.
        `unchecked_configs`: also one whose config makes another function of the same weights than the base's.

        Raises `MissingTensorError`, `ShapeMismatchError`, `NonFiniteWeightError`, `CheckpointError`, `OutputWriteError`, or `ConfigError` for such a
        config, and while another process is at work on the directory or has changed it since it was opened.
        """
        source = open_expert(expert, self._given, f"expert {self.count + 1}")
        found = align(self._given, [source], self._state.keep_base)
        if found.merged != self._alignment.merged:
            other = sorted(set(found.merged) ^ set(self._alignment.merged))
            raise ConfigError(
                f"{source.label}: {other[0]!r} is a tensor of its own either there or in the base {self._base.label}, and what has been merged before"
                " cannot change that. Begin in another directory with a base that has it as the expert has, or merge all experts at once."
            )
        check_configs(found, unchecked=unchecked_configs, accept="say `add(expert, unchecked_configs=True)`")
        aligned = found.experts[0]
        with self._locked():
            self._clean()
            folder = f"step-{self.count + 1:05d}"
            specs = [TensorSpec(n, self._base.spec(n).shape, self._dtype, folder) for n in self._alignment.merged]
            previous = Checkpoint.open(self.path / self._state.folder) if self.count else None
            square = merged = 0.0
            with CheckpointWriter(self.path / folder, specs) as writer:
                for piece, own, total in self._at_once(partial(self._step, aligned, previous)):
                    writer.write(piece.name, piece.tensor, piece.rows)
                    square += own
                    merged += total
                writer.commit()
            state = replace(
                self._state,
                folder=folder,
                squares=[*self._state.squares, square],
                merged=merged,
                inputs=[*self._state.inputs, input_record(f"expert {self.count + 1}", source)],
            )
            self._write_state(state)
            self._state = state
            self._clean()

    def tensors(self) -> dict[str, Tensor]:
        """The merged model in memory: name -> tensor, in the base's dtypes. Raises `ConfigError` before the first expert."""
        target = Target(output_specs(self._alignment, None), None, self._alignment.buffers)
        self._fill(target)
        ordered = {name: target.tensors[name] for name in target.specs}
        return ordered | {alias: ordered[name] for alias, name in self._base.aliases.items() if name in ordered}

    def write(
        self, output: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", overwrite: bool = False
    ) -> Path:
        """Write the merged model as a checkpoint with the base's dtypes, configuration and tokenizer, and a record of all inputs.

        Raises `ConfigError` before the first expert, `OutputExistsError`, `OutputWriteError`; then nothing is left on disk.
        """
        self._tidy()
        specs = output_specs(self._alignment, None)
        with CheckpointWriter(
            Path(output), list(specs.values()), max_shard_bytes=max_shard_size, overwrite=overwrite
        ) as writer:
            self._fill(Target(specs, writer, self._alignment.buffers))
            state, base = self._state, self._base
            recipe = {"base": base.label, "continual": {"rule": "opcm", "alpha": state.alpha, "experts": self.count}}
            record = merge_record(recipe, [input_record("base", self._given), *state.inputs])
            root = root_checkpoint(base)
            if base.config is not None and (root is None or base.config != root.config):
                writer.write_json("config.json", base.config)
            if root is not None:
                writer.copy_sidecars(root)
            write_record_and_card(writer, record, base)
            return writer.commit()

    # One tensor, or some rows of it

    def _step(
        self, expert: AlignedExpert, previous: TensorSource | None, name: str, rows: slice | None
    ) -> tuple[Piece, float, float]:
        """S_t, and the squared norms of tau_t and S_t."""
        linear, transposed = name in self._state.linear, self._state.linear.get(name, False)
        tau = self._load(expert, name, rows) - self._load(self._base, name, rows)
        total = tau
        if previous is not None:
            before = previous.load(name, rows).double()
            if transposed:
                total = add_expert(before.mT.contiguous(), tau.mT.contiguous(), self._state.alpha, linear).mT
            else:
                total = add_expert(before, tau, self._state.alpha, linear)
        stored = total.to(self._dtype).contiguous()
        return Piece(name, stored, rows), float(tau.square().sum()), float(total.square().sum())

    def _fill(self, target: Target) -> None:
        if not self.count:
            raise ConfigError(f"{self.path}: no expert has been added yet; add one first.")
        factor = mean_norm_factor(self._state.squares, self._state.merged)
        sums = Checkpoint.open(self.path / self._state.folder)

        def merged(name: str, rows: slice | None) -> Piece:
            if name in self._alignment.kept:
                return target.finish(Piece(name, self._base.load(name, rows), rows))
            total = sums.load(name, rows).double()
            return target.finish(Piece(name, self._load(self._base, name, rows).add_(total, alpha=factor), rows))

        for piece in self._at_once(merged, (*self._alignment.merged, *self._alignment.kept)):
            target.put(piece)

    def _load(self, source: Any, name: str, rows: slice | None) -> Tensor:
        tensor = source.load(name, rows).double()
        check_finite(tensor, f"{source.label}, tensor {name!r}")
        return tensor

    def _at_once(self, work: Callable[[str, slice | None], T], names: Sequence[str] | None = None) -> Iterator[T]:
        parts = [(n, rows) for n in names or self._alignment.merged for rows in self._parts(n)]
        return in_order(((self._bytes(*part), partial(work, *part)) for part in parts), workers=torch.get_num_threads())

    def _parts(self, name: str) -> Iterator[slice | None]:
        return iter([None]) if name in self._state.linear else row_slabs(self._base.spec(name).shape)

    def _bytes(self, name: str, rows: slice | None) -> int:
        shape = self._base.spec(name).shape
        elements = math.prod(shape) if rows is None else math.prod(shape[1:]) * (rows.stop - rows.start)
        return 8 * elements * (8 if name in self._state.linear else 4)

    # The directory

    def _read_state(self) -> _State | None:
        """None where the directory is new."""
        file = self.path / STATE_FILENAME
        try:
            if os.path.lexists(file) and not is_file(file):
                raise ValueError("no regular file")
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("format") != _FORMAT or content.pop("format_version") != _VERSION:
                raise ValueError("another format")
            return _State(**content)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{file}: is no state of a continual merge that can be read ({error}); start another"
            ) from error
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise OutputExistsError(f"{self.path}: exists and is no folder; choose another path.")
        if self.path.is_dir() and (theirs := foreign(self.path, lambda name: name in (_LOCK, _STAGED_STATE))):
            raise OutputExistsError(
                f"{self.path}: exists and is no state of a continual merge, and holds {named(theirs)}; choose another path."
            )
        return None

    def _same(self, known: _State, asked: _State) -> _State:
        for key in ("alpha", "keep_base", "base", "linear"):
            theirs, ours = getattr(known, key), getattr(asked, key)
            if theirs == ours:
                continue
            if key == "base":
                raise ConfigError(
                    f"{self.path}: was begun with another base than {self._base.label} (hash {theirs}, not {ours}); give the same base, or"
                    " start in another directory."
                )
            if key == "linear":
                missing = sorted(set(theirs) ^ set(ours))[:3]
                raise ConfigError(
                    f"{self.path}: was begun with other linear modules (different: {', '.join(missing)}); leave `modules` out to go on with them."
                )
            raise ConfigError(
                f"{self.path}: was begun with {key} = {theirs}, not {ours}; leave it out to go on with it."
            )
        return known

    def _write_state(self, state: _State) -> None:
        text = json.dumps({"format": _FORMAT, "format_version": _VERSION, **asdict(state)}, indent=2) + "\n"
        partial = self.path / _STAGED_STATE
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path / STATE_FILENAME)
            directory = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise OutputWriteError(
                f"{partial}: cannot be written ({error.strerror}); free some space or correct the permissions"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone at work on the directory, which is as this object knows it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK).open("a")
        except OSError as error:
            raise OutputWriteError(f"{self.path}: cannot be written ({error.strerror}); choose another path") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.path}: another process is adding an expert; wait for it.") from None
            found = self._read_state()
            if (found.folder if found is not None else "") != self._state.folder:
                raise ConfigError(f"{self.path}: has been changed since it was opened; open it again.")
            if found is None:
                self._write_state(self._state)  # before the first sum: by its state the folder is known for ours
            yield

    def _clean(self) -> None:
        """Remove sums that are no longer, or were never, the state's, and what killed runs left of them; what is not ours in them is kept."""
        for entry in sorted(self.path.iterdir()):
            if not is_folder(entry) or entry.name == self._state.folder:
                continue
            if re.fullmatch(r"step-\d{5,}", entry.name):
                remove_own(entry, _is_sum)
            elif left := re.fullmatch(rf"\.(step-\d{{5,}})\.{STAGE}", entry.name):
                clean_stages(self.path / left[1])

    def _tidy(self) -> None:
        """Clean up after a run that was killed at its end, unless somebody is at work."""
        try:
            with self._locked():
                self._clean()
        except (ConfigError, OutputWriteError, OSError):
            pass


def _listed(patterns: Iterable[str] | None) -> list[str] | None:
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)


def _fingerprint(base: TensorSource, names: Sequence[str]) -> str:
    """Names, shapes, dtypes, and the first row of each tensor."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        spec = base.spec(name)
        digest.update(f"{name}\0{spec.shape}\0{spec.dtype}\0".encode())
        digest.update(byte_view(base.load(name, slice(0, 1) if spec.shape else None)))
    return digest.hexdigest()
