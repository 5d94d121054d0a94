"""What was measured on one expert: a tensor for each of its modules or parameters, in memory or in a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from bmm_engine.checkpoint.safetensors_io import SafetensorsFile
from bmm_engine.errors import MissingTensorError
from bmm_engine.models.names import unwrapped
from bmm_engine.statistics.fingerprints import check_weight
from bmm_engine.statistics.records import Record, check_names, check_tensors, read_record, write_record

Self = TypeVar("Self", bound="MeasuredSet")


@dataclass
class MeasuredSet:
    """Name of a module or parameter -> what was measured there.

    `fingerprints`: name -> hash of its weight in `weights_dtype`, by which a measurement of another model is told. `aliases`: other names (in the
    checkpoint's files, of tied weights). Fields that a subclass adds are saved as JSON.
    """

    tensors: dict[str, Tensor]
    fingerprints: dict[str, str] = field(default_factory=dict)
    weights_dtype: str = "float32"
    calibration: str = ""
    aliases: dict[str, str] = field(default_factory=dict)
    _file: SafetensorsFile | None = None  # where they still are
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of those in it

    KEY: ClassVar[str]  # its tensors are KEY.NAME in a file of the format bmm-KEY, made by `bmm collect --KEY`
    VERSION: ClassVar[int] = 1
    TITLE: ClassVar[str]
    RECORD: ClassVar[type[Record]] = Record

    @property
    def names(self) -> list[str]:
        return list(self.tensors) + list(self._shapes)

    @property
    def where(self) -> str:
        return str(self._file.path) if self._file else f"{self.TITLE} of {self.calibration or 'a live model'}"

    def resolve(self, name: str) -> str | None:
        """What `name` (a live name or a name in the checkpoint) is called here, or None."""
        for own in (name, unwrapped(name)):
            own = self.aliases.get(own, own)
            if own in self.tensors or own in self._shapes:
                return own
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `MissingTensorError`."""
        own = self._known(name)
        return self._shapes[own] if own in self._shapes else tuple(self.tensors[own].shape)

    def get(self, name: str, rows: slice | None = None) -> Tensor:
        """What was measured at `name`, or some rows of it, read from disk if the set was loaded. Raises `MissingTensorError`."""
        own = self._known(name)
        if self._file is None:
            return self.tensors[own] if rows is None else self.tensors[own][rows]
        found = self._file.read(f"{self.KEY}.{own}", rows)
        self.check_values(own, found)
        return found

    def check_values(self, name: str, values: Tensor) -> None:
        """Raise unless `values`, or some rows of them, read from a file, can have been measured. Raises `CheckpointError`, `NonFiniteGramError`."""

    @classmethod
    def check_shape(cls, path: Path, name: str, shape: tuple[int, ...]) -> None:
        """Raise `CheckpointError` unless what was measured at `name` can have that shape."""

    @classmethod
    def check_record(cls, path: Path, record: Any, names: list[str]) -> None:
        """Raise `CheckpointError` unless what the record says besides fits `names`, which were measured."""

    @property
    def on_disk(self) -> bool:
        """Was it read from a file?"""
        return self._file is not None

    def check(
        self, name: str, weight: Tensor, label: str, others: Mapping[str, Callable[[], Tensor]] | None = None
    ) -> None:
        """Raise `GramMismatchError` unless it was measured on this very `weight` (as stored) of the expert called `label`; `others` as in
        `check_weight`."""
        recorded = self.fingerprints.get(self._known(name))
        check_weight(self.where, self.TITLE, name, recorded, self.weights_dtype, weight, label, others)

    def _known(self, name: str) -> str:
        own = self.resolve(name)
        if own is None:
            raise MissingTensorError(
                f"{self.where}: holds no {self.TITLE} of {name!r}; it has {len(self.names)}, such as {', '.join(self.names[:3])}. Collect it"
                " from this expert."
            )
        return own

    def digest(self) -> str:
        """SHA-256 of the tensors and of the weights that they were measured on."""
        digest = hashlib.sha256()
        for name in sorted(self.names):
            digest.update(f"{name} {self.fingerprints.get(name, '')}\0".encode())
            digest.update(self.get(name).cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: a tensor for each name, the rest as metadata. Raises `OutputWriteError`."""
        tensors = {f"{self.KEY}.{name}": self.get(name).detach().cpu().contiguous() for name in self.names}
        record = {name: getattr(self, name) for name in self._recorded()}
        record = {"format": self._format(), "version": self.VERSION, **record}
        return write_record(Path(path), tensors, self._format(), record, self.TITLE)

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """Open a saved set: names and shapes now, each tensor when it is asked for. Raises `CheckpointError`."""
        path = Path(path)
        maker = f"`bmm collect --{cls.KEY}`"
        record, file = read_record(path, cls._format(), cls.VERSION, cls.TITLE, maker, cls.RECORD)
        stored = file.specs
        names = [own.removeprefix(f"{cls.KEY}.") for own in stored if own.startswith(f"{cls.KEY}.")]
        check_tensors(path, stored, (f"{cls.KEY}.{name}" for name in names), maker)
        check_names(path, "fingerprints", record.fingerprints, names, maker)
        check_names(path, "aliases", record.aliases.values(), names, maker)
        cls.check_record(path, record, names)
        shapes = {name: stored[f"{cls.KEY}.{name}"].shape for name in names}
        for name, shape in shapes.items():
            cls.check_shape(path, name, shape)
        known = {name: getattr(record, name) for name in cls._recorded()}
        return cls(tensors={}, **known, _file=file, _shapes=shapes)

    @classmethod
    def _format(cls) -> str:
        return f"bmm-{cls.KEY}"

    @classmethod
    def _recorded(cls) -> list[str]:
        return [own.name for own in fields(cls) if own.name not in ("tensors", "_file", "_shapes")]
