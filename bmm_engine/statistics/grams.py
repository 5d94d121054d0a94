"""Stage 2: sums of second moments per module, streamed, added, merged, saved and loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bmm_engine.checkpoint.safetensors_io import TAGS, SafetensorsFile
from bmm_engine.errors import (
    CheckpointError,
    ConfigError,
    EmptyCalibrationError,
    GramMismatchError,
    NonFiniteGramError,
    ShapeMismatchError,
)
from bmm_engine.models.names import unwrapped
from bmm_engine.ops.gram import accumulate_gram
from bmm_engine.statistics.records import Record, check_names, check_tensors, read_record, write_record
from bmm_engine.statistics.values import check_gram

FORMAT = "bmm-grams"
FORMAT_VERSION = 1
MAKER = "`bmm collect`"
# Of one expert's calibration; beyond it a count is no count.
MOST_ROWS = 10**15


class GramRecord(Record):
    """What a Gram file says beside its tensors."""

    rows: dict[str, Annotated[int, Field(ge=1, le=MOST_ROWS)]]
    modules: dict[str, str]
    transposed: list[str]
    kind: Literal["expert", "sequential"] = "expert"
    settings: dict[str, Any] = Field(default_factory=dict)


class GramAccumulator:
    """Streaming second moment of one module's input rows.

    After rows `x_1 .. x_n` (each (in,)): `total = sum x x^T` (in, in), `row_sum = sum x` (in,), `rows = n`. Partial accumulators add
    exactly as their rows would. `total` is float32 (float64 for `dtype=torch.float64`); rows may be fp32, bf16, fp16 (fp64 only into fp64).
    """

    def __init__(self, width: int, *, name: str = "", dtype: torch.dtype = torch.float32, device: Any = "cpu"):
        if width < 1:
            raise ConfigError(f"GramAccumulator {name!r}: width must be at least 1, not {width}.")
        self.name = name
        self.total = torch.zeros(width, width, dtype=dtype, device=device)
        self.row_sum = torch.zeros(width, dtype=dtype, device=device)
        self.rows = 0

    @property
    def width(self) -> int:
        return self.total.shape[0]

    def update(self, x: Tensor, *, backend: str = "auto") -> GramAccumulator:
        """Add the rows of `x` (..., in). Nothing is added if any row is not finite.

        Raises `ShapeMismatchError` for another width, `NonFiniteGramError` (module, count of such rows).
        """
        if x.shape[-1] != self.width:
            raise ShapeMismatchError(
                f"{self.name or 'GramAccumulator'}: rows of width {x.shape[-1]} given to a Gram of width {self.width}."
            )
        x = x.detach().reshape(-1, self.width)
        if x.shape[0] == 0:
            return self
        row_sum = x.sum(0, dtype=self.row_sum.dtype)
        if not torch.isfinite(row_sum).all():
            count = int((~torch.isfinite(x).all(-1)).sum())
            what = (
                f"{count} of {x.shape[0]} input rows hold NaN or infinity" if count else "the sum of the rows overflows"
            )
            raise NonFiniteGramError(
                f"{self.name or 'GramAccumulator'}: {what}; nothing was added. Check the calibration batch, or run the model in float32.",
                module=self.name,
                count=count,
            )
        rows = x.to(self.total.dtype) if self.total.dtype == torch.float64 else x
        accumulate_gram(self.total, rows, backend=backend)
        self.row_sum += row_sum
        self.rows += x.shape[0]
        return self

    def merge(self, other: GramAccumulator) -> GramAccumulator:
        """Add another accumulator's rows to this one. Raises `ShapeMismatchError` for another width."""
        if other.width != self.width:
            raise ShapeMismatchError(f"{self.name}: Grams of width {self.width} and {other.width} do not add.")
        self.total += other.total.to(self.total)
        self.row_sum += other.row_sum.to(self.row_sum)
        self.rows += other.rows
        return self

    def mean(self) -> Tensor:
        """`G = total / rows` (in, in). Raises `EmptyCalibrationError` without rows."""
        if self.rows == 0:
            raise EmptyCalibrationError(
                f"{self.name}: no rows were measured; give calibration data that is not all padding."
            )
        return self.total / self.rows


@dataclass
class GramSet:
    """The Grams of a whole expert: one per group of modules that read the same tensor.

    `modules`: module name -> group name (the group's first module). `aliases`: other names of a module (its name in the checkpoint's files).
    `fingerprints`: module -> hash of its weight in `weights_dtype`, by which a Gram of another model is told. `kind`: "expert" where the rows
    are those of the expert itself, "sequential" where each block read what merged blocks below it gave; `settings` then says how they were merged.
    """

    grams: dict[str, GramAccumulator]
    modules: dict[str, str]
    fingerprints: dict[str, str] = field(default_factory=dict)
    weights_dtype: str = "float32"
    calibration: str = ""
    aliases: dict[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()  # modules whose weight is stored (in, out): GPT-2's Conv1D
    kind: str = "expert"
    settings: dict[str, Any] = field(default_factory=dict)
    origin: str = ""  # the model that was measured in this run, for messages
    _file: SafetensorsFile | None = None
    _headers: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # group -> (width, rows), for those still on disk
    _checked: set[str] = field(default_factory=set)  # groups whose values are known to be sound

    def resolve(self, name: str) -> str | None:
        """The module that `name` (a live name or a name in the checkpoint) means, or None."""
        if name in self.modules:
            return name
        plain = unwrapped(name)
        return self.aliases.get(name) or (plain if plain in self.modules else self.aliases.get(plain))

    def group(self, module: str) -> str:
        """The group of `module`. Raises `GramMismatchError` if the set has none."""
        resolved = self.resolve(module)
        if resolved is None:
            raise self.unknown(module)
        return self.modules[resolved]

    def unknown(self, module: str) -> GramMismatchError:
        """The error for a module that this set does not cover."""
        known = ", ".join(list(self.modules)[:3])
        return GramMismatchError(
            f"{self.where}: holds no Gram for module {module!r}; it has {len(self.modules)}, such as {known}. Collect Grams from"
            " this expert with the modules of the merge, or leave the module out with `modules`."
        )

    @property
    def where(self) -> str:
        if self._file is not None:
            return str(self._file.path)
        return f"Grams of {self.origin or 'a live model'}" + (f" on {self.calibration}" if self.calibration else "")

    @property
    def on_disk(self) -> bool:
        """Was it read from a file?"""
        return self._file is not None

    def width(self, module: str) -> int:
        group = self.group(module)
        return self._headers[group][0] if group in self._headers else self.grams[group].width

    def rows(self, module: str) -> int:
        group = self.group(module)
        return self._headers[group][1] if group in self._headers else self.grams[group].rows

    def get(self, module: str) -> GramAccumulator:
        """The Gram of `module`'s group, read from disk if the set was loaded (and not kept: a whole model's Grams may not fit in memory).

        Its values are checked when it is first asked for (`statistics/values.py`). Raises `GramMismatchError`, `NonFiniteGramError`,
        `CheckpointError`."""
        group = self.group(module)
        gram = self._read(group)
        if group not in self._checked and gram.rows:
            check_gram(gram.total, gram.row_sum, gram.rows, self.where, group)
            self._checked.add(group)
        return gram

    def _read(self, group: str) -> GramAccumulator:
        if self._file is None or group not in self._headers:
            return self.grams[group]
        accumulator = GramAccumulator.__new__(GramAccumulator)
        accumulator.name = group
        accumulator.total = self._file.read(f"gram.{group}")
        accumulator.row_sum = self._file.read(f"row_sum.{group}")
        accumulator.rows = self._headers[group][1]
        return accumulator

    def merge(self, other: GramSet) -> GramSet:
        """Add the Grams of another part of the same expert's calibration data. Raises `GramMismatchError` if it is another model's."""
        if self.kind != "expert" or other.kind != "expert":
            raise GramMismatchError(
                f"{self.where} and {other.where} are of the kinds {self.kind!r} and {other.kind!r}: only Grams of an expert's own inputs add, since"
                " the others depend on what was merged below. Collect them in one walk over all calibration data."
            )
        if self.modules != other.modules or self.fingerprints != other.fingerprints:
            changed = [m for m in self.modules if self.fingerprints.get(m) != other.fingerprints.get(m)] or list(
                set(self.modules) ^ set(other.modules)
            )
            raise GramMismatchError(
                f"{self.where} and {other.where} were not measured on the same model: they differ at {changed[0] if changed else 'groups'!r}"
                f" (and {max(len(changed) - 1, 0)} more). Only Grams of one expert add."
            )
        for group in dict.fromkeys(self.modules.values()):
            self.grams[group] = self.get(group).merge(other.get(group))
            self._headers.pop(group, None)
        self.calibration = "; ".join(dict.fromkeys(filter(None, (self.calibration, other.calibration))))
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: `gram.GROUP` (in, in) and `row_sum.GROUP` (in,), the rest as metadata.

        Written under a temporary name and renamed. Raises `OutputWriteError`, and as `get` for values that would be refused when read.
        """
        tensors, rows = {}, {}
        for group in dict.fromkeys(self.modules.values()):
            gram = self.get(group)  # a file that nobody could read again is not written
            tensors[f"gram.{group}"] = gram.total.detach().cpu().contiguous()
            tensors[f"row_sum.{group}"] = gram.row_sum.detach().cpu().contiguous()
            rows[group] = gram.rows
        record = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "rows": rows,
            "modules": self.modules,
            "aliases": self.aliases,
            "fingerprints": self.fingerprints,
            "weights_dtype": self.weights_dtype,
            "calibration": self.calibration,
            "transposed": list(self.transposed),
            "kind": self.kind,
            "settings": self.settings,
        }
        return write_record(Path(path), tensors, FORMAT, record, "Grams")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GramSet:
        """Open a saved set: names and counts now, each matrix when it is asked for. Raises `CheckpointError`."""
        path = Path(path)
        record, file = read_record(path, FORMAT, FORMAT_VERSION, "Gram", MAKER, GramRecord)
        stored = file.specs
        groups = set(record.modules.values())
        check_names(path, "rows", record.rows, groups, MAKER)
        check_names(path, "modules", groups, record.rows, MAKER)
        for key, names in (
            ("fingerprints", record.fingerprints),
            ("aliases", record.aliases.values()),
            ("transposed", record.transposed),
        ):
            check_names(path, key, names, record.modules, MAKER)
        headers = {}
        for group, rows in record.rows.items():
            gram, row_sum = (stored.get(f"{kind}.{group}") for kind in ("gram", "row_sum"))
            shape = None if gram is None else gram.shape
            square = shape is not None and len(shape) == 2 and shape[0] == shape[1] > 0
            if gram is None or shape is None or not square or row_sum is None or row_sum.shape != shape[:1]:
                raise CheckpointError(
                    f"{path}: the Gram of {group!r} has shape {shape}, and its sum of rows {row_sum and row_sum.shape}; a square (in, in) and (in,)"
                    " were expected. Collect it again."
                )
            if gram.dtype != row_sum.dtype:
                raise CheckpointError(
                    f"{path}: the Gram of {group!r} is {TAGS[gram.dtype]}, its sum of rows {TAGS[row_sum.dtype]}. Collect it again."
                )
            headers[group] = (shape[0], rows)
        check_tensors(path, stored, (f"{kind}.{group}" for group in groups for kind in ("gram", "row_sum")), MAKER)
        return cls(
            grams={},
            modules=record.modules,
            fingerprints=record.fingerprints,
            weights_dtype=record.weights_dtype,
            calibration=record.calibration,
            aliases=record.aliases,
            transposed=tuple(record.transposed),
            kind=record.kind,
            settings=record.settings,
            _file=file,
            _headers=headers,
        )


def weight_fingerprint(weight: Tensor, dtype: torch.dtype) -> str:
    """SHA-256 (16 hex digits) of a weight's values in `dtype`, as stored (row-major)."""
    import hashlib

    data = weight.detach().to("cpu", dtype).contiguous()
    return hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().data).hexdigest()[:16]
