"""Stage 5: a checkpoint directory written tensor by tensor, in any order, in the memory of one tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

import torch

from bmm_engine.checkpoint.layout import is_plain_name
from bmm_engine.checkpoint.reader import Checkpoint
from bmm_engine.checkpoint.safetensors_io import byte_view
from bmm_engine.checkpoint.shards import INDEX_FILENAME, Shard, index_json, parse_size, plan_shards
from bmm_engine.checkpoint.sidecars import sidecar_files, tell
from bmm_engine.checkpoint.source import TensorSpec, row_span
from bmm_engine.checkpoint.staging import StagedDirectory, sync_path
from bmm_engine.errors import CheckpointError, ConfigError, MissingTensorError, OutputWriteError, ShapeMismatchError

_FLUSH_BYTES = 64 * 2**20
_COPY_BYTES = 4 * 2**20


class CheckpointWriter:
    """Writes `specs` as safetensors under a temporary name beside `destination`; `commit` checks and renames.

    Use as a context manager: leaving it without `commit`, for whatever reason, removes all that was written. The
    destination may be missing, an empty directory or, with `overwrite`, an earlier merge without other files. The stored
    order within a shard is wide dtypes first.

    Raises OutputExistsError, OutputWriteError (no permission, no space) or ConfigError (specs, size) before any work.
    """

    def __init__(
        self,
        destination: str | Path,
        specs: Sequence[TensorSpec],
        *,
        max_shard_bytes: int | str = 5_000_000_000,
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
    ):
        self._specs = {spec.name: spec for spec in specs}
        self._shards = plan_shards(specs, parse_size(max_shard_bytes), metadata)
        self._shard_of: dict[str, Shard] = {name: shard for shard in self._shards for name in shard.offsets}
        # Row ranges per tensor, sorted and disjoint; a scalar counts as one row.
        self._written: dict[str, list[tuple[int, int]]] = {}
        self._descriptors: dict[str, int] = {}
        self._flusher: ThreadPoolExecutor | None = None
        self._flushing: list[Future[None]] = []
        self._unflushed = 0
        self._open = False
        self._beside: set[str] = set()  # names of the files that are no weights
        self._stage = StagedDirectory(
            destination, overwrite=overwrite, needed_bytes=sum(shard.nbytes for shard in self._shards)
        )

    def __enter__(self) -> CheckpointWriter:
        try:
            self._stage.create()
            with self._stage.reporting():
                for shard in self._shards:
                    descriptor = os.open(self._stage.out / shard.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                    self._descriptors[shard.file] = descriptor
                    os.ftruncate(descriptor, shard.nbytes)
                    _write_at(descriptor, memoryview(shard.header), 0)
        except BaseException:
            self._abandon()
            raise
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon()

    def write(self, name: str, tensor: torch.Tensor, rows: slice | None = None) -> None:
        """Store a tensor, or the `rows` of it that `tensor` holds, on any device, in any order, every row once.

        Raises ConfigError for an unknown name, another dtype than the spec's (nothing is cast) or rows written twice,
        ShapeMismatchError for another shape, OutputWriteError when the disk does not take it.
        """
        self._check_open()
        spec = self._specs.get(name)
        if spec is None:
            raise ConfigError(
                f"{self._stage.destination}: tensor {name!r} is not among the planned specs; list it when making the "
                "writer"
            )
        shape, first, span = spec.shape, 0, (0, spec.shape[0] if spec.shape else 1)
        if rows is not None:
            span = row_span(name, shape, rows)
            shape, first = (span[1] - span[0], *shape[1:]), span[0]
        if tuple(tensor.shape) != shape:
            where = "" if rows is None else f" for rows {span[0]}:{span[1]} of {spec.shape}"
            raise ShapeMismatchError(
                f"tensor {name!r}: has shape {tuple(tensor.shape)}, planned is {shape}{where}; write what was planned"
            )
        if tensor.dtype != spec.dtype:
            raise ConfigError(
                f"tensor {name!r}: has dtype {tensor.dtype}, planned is {spec.dtype}; cast it before writing"
            )
        spans = self._with(name, span)
        row_bytes = spec.nbytes // spec.shape[0] if spec.shape and spec.shape[0] else 0
        shard = self._shard_of[name]
        view = byte_view(tensor.detach().to("cpu").contiguous())
        with self._writing():
            _write_at(self._descriptors[shard.file], view, shard.offsets[name] + first * row_bytes)
            self._unflushed += len(view)
            if self._unflushed >= _FLUSH_BYTES:
                self._flush(self._descriptors[shard.file])
        self._written[name] = spans

    def _flush(self, descriptor: int) -> None:
        """Have the disk begin on what was written, beside the work that goes on, so that `commit` need not wait for all of it."""
        self._flusher = self._flusher or ThreadPoolExecutor(1, "bmm-flush")
        for flushed in self._flushing:
            if flushed.done():
                flushed.result()  # raises what the disk said
        self._flushing = [f for f in self._flushing if not f.done()]
        self._flushing.append(self._flusher.submit(os.fdatasync, descriptor))
        self._unflushed = 0

    def write_json(self, filename: str, obj: object) -> None:
        """Store `obj` as a JSON file beside the weights. Raises ConfigError for what JSON lacks (infinity, objects)."""
        try:
            text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{filename}: cannot be written as JSON ({error}); use plain values, and text for infinity"
            ) from error
        self.write_text(filename, text + "\n")

    def write_text(self, filename: str, text: str) -> None:
        """Store a text file beside the weights, replacing one of that name. Raises ConfigError for another place."""
        self._check_open()
        reserved = {shard.file for shard in self._shards} | {INDEX_FILENAME}
        if not is_plain_name(filename) or filename in reserved:
            raise ConfigError(f"{filename!r}: is not a free plain file name in the output directory; choose another")
        with self._writing():
            _write_file(self._stage.out / filename, text.encode("utf-8", "backslashreplace"))
        self._beside.add(filename)

    def copy_sidecars(
        self, source: Checkpoint, *, changed: Mapping[str, bytes | None] | None = None
    ) -> tuple[str, ...]:
        """Copy what `source` has beside its weights (see `sidecars.py`) and return the names. `changed`: what files of some names hold instead, also
        further ones; None for those that stay behind.

        Files already written here stay as they are. Raises CheckpointError for a link that leads outside the source.
        """
        self._check_open()
        if not source.path.is_dir():
            return ()
        found = sidecar_files(source.path, source.config)
        tell(source.path, found)
        changed = changed or {}
        names = [name for name in {**found.files, **changed} if changed.get(name, b"") is not None]
        wanted = [name for name in names if not (self._stage.out / name).exists()]
        if wanted:
            with self._writing():
                self._stage.claim(wanted)
        for name in wanted:
            with self._writing():
                (self._stage.out / name).parent.mkdir(parents=True, exist_ok=True)
                content = changed.get(name)
                if content is not None:
                    _write_file(self._stage.out / name, content)
            if content is None:
                _copy_file(found.files[name], self._stage.out / name, self._writing)
            self._beside.add(name)
        with self._writing():
            for folder in sorted({(self._stage.out / name).parent for name in wanted}):
                sync_path(folder)
        return tuple(wanted)

    @property
    def files(self) -> list[str]:
        """Names of what the directory holds, or will hold at the `commit`, so far."""
        index = [INDEX_FILENAME] if len(self._shards) > 1 else []
        return sorted({*(shard.file for shard in self._shards), *index, *self._beside})

    def commit(self, then: Callable[[], None] = lambda: None) -> Path:
        """Check that every row was written, flush to disk, and give the directory its name, which is returned.

        `then`: what belongs to the same run and comes after it. A run that is killed in it can be repeated as it was,
        also without `overwrite`.
        Raises MissingTensorError with the names that are incomplete, OutputExistsError, OutputWriteError.
        """
        self._check_open()
        incomplete = [name for name, spec in self._specs.items() if not self._is_complete(spec)]
        if incomplete:
            more = f" and {len(incomplete) - 5} more" if len(incomplete) > 5 else ""
            raise MissingTensorError(
                f"{self._stage.destination}: {len(incomplete)} of {len(self._specs)} tensors were not written "
                f"completely: {', '.join(incomplete[:5])}{more}; write every row before commit"
            )
        with self._writing():
            if len(self._shards) > 1:
                index = index_json(self._shards, list(self._specs.values()))
                _write_file(
                    self._stage.out / INDEX_FILENAME, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
                )
            for flushed in self._flushing:
                flushed.result()
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
        self._close_files()
        path = self._stage.publish(then)
        self._open = False
        return path

    def _with(self, name: str, span: tuple[int, int]) -> list[tuple[int, int]]:
        """The ranges of `name` once `span` is added, neighbours joined. Raises ConfigError for rows written before."""
        if span[0] == span[1] and self._specs[name].shape[0]:
            return self._written.get(name, [])
        joined: list[tuple[int, int]] = []
        for start, stop in sorted([*self._written.get(name, []), span]):
            if joined and (start < joined[-1][1] or (start, stop) == joined[-1]):
                raise ConfigError(
                    f"tensor {name!r}: rows {span[0]}:{span[1]} are written a second time; write every row once"
                )
            if joined and start == joined[-1][1]:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        return joined

    def _is_complete(self, spec: TensorSpec) -> bool:
        return self._written.get(spec.name) == [(0, spec.shape[0] if spec.shape else 1)]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._stage.reporting():
                yield
        except OutputWriteError:
            self._abandon()
            raise

    def _check_open(self) -> None:
        if not self._open:
            raise ConfigError(
                f"{self._stage.destination}: the writer is not open; use it inside `with` and before commit"
            )

    def _abandon(self) -> None:
        self._open = False
        self._close_files()
        self._stage.discard()

    def _close_files(self) -> None:
        if self._flusher is not None:
            self._flusher.shutdown(wait=True, cancel_futures=True)  # it holds descriptors
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):  # the system writes at most 2 GiB at once
        done += os.pwrite(descriptor, view[done:], offset + done)


def _copy_file(source: Path, path: Path, writing: Callable[[], AbstractContextManager[None]]) -> None:
    """In blocks, flushed. Raises CheckpointError for a source that cannot be read; what the disk says is for `writing` to tell."""
    try:
        file = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read ({error.strerror}); correct its permissions") from error
    with file, writing(), path.open("wb") as copy:
        while block := file.read(_COPY_BYTES):
            copy.write(block)
        copy.flush()
        os.fsync(copy.fileno())


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
