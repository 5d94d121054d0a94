"""Stage 0: a checkpoint on disk or on the hub as a source of tensors, read lazily."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import torch
from torch import nn

from bmm_engine.checkpoint import hub
from bmm_engine.checkpoint.adapter_kinds import check_no_adapter
from bmm_engine.checkpoint.guard import read_json_object, regular_file
from bmm_engine.checkpoint.layout import Layout, contained, find_weights
from bmm_engine.checkpoint.safetensors_io import SafetensorsFile
from bmm_engine.checkpoint.source import StateDictSource, TensorSource, TensorSpec, missing_tensor
from bmm_engine.checkpoint.ties import architecture_ties, config_ties
from bmm_engine.checkpoint.torch_bin import TorchBinFile
from bmm_engine.errors import CheckpointError, ConfigError
from bmm_engine.models.architecture import naming_of, ties_by_default
from bmm_engine.models.bounds import Held
from bmm_engine.models.naming import Naming

logger = logging.getLogger(__name__)

_HASH_BLOCK_BYTES = 4 * 2**20


class WeightFile(Protocol):
    """One open weight file of either format."""

    @property
    def path(self) -> Path: ...
    @property
    def specs(self) -> dict[str, TensorSpec]: ...
    @property
    def aliases(self) -> dict[str, str]: ...
    @property
    def stamp(self) -> tuple[int, int, int]: ...
    def read(self, name: str, rows: slice | None = None) -> torch.Tensor: ...


class Checkpoint(TensorSource):
    """A checkpoint whose headers have been checked and whose tensors are read when asked for; see `Checkpoint.open`."""

    def __init__(
        self,
        path: Path,
        files: list[WeightFile],
        *,
        label: str,
        config: dict[str, Any] | None = None,
        hub_id: str | None = None,
    ):
        self.path = path
        self.label = label
        self.hub_id = hub_id
        self._config = config
        self._files = files
        self._holder = {name: file for file in files for name in file.specs}

    @classmethod
    def open(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        label: str | None = None,
    ) -> Checkpoint:
        """Open a Hugging Face directory, one .safetensors or .bin file, or a model on the hub.

        A string that is no existing path and has the form of a hub id is one; a `Path` never is. A file has no config
        and no sidecars. A tensor that a shard holds and the index does not list is part of the checkpoint, as it is for
        `from_pretrained`. Raises CheckpointError, with the remedy, for what cannot be read as it stands.
        """
        try:
            path, hub_id = locate(path_or_hub_id, revision, cache_dir, local_files_only)
            label = label or str(path_or_hub_id)
            if not path.is_dir():
                file = open_file(path)
                check_no_adapter(path, file.specs)
                return cls(path, [file], label=label)
            layout = find_weights(path)
            files = [open_file(file) for file in layout.files]
            _check_consistent(layout, files)
            if len(files) == 1:
                check_no_adapter(files[0].path, files[0].specs)
            config = None
            if (path / "config.json").exists() or (path / "config.json").is_symlink():
                config = read_json_object(contained(path, "config.json", asked_by="the directory"))
        except OSError as error:
            raise CheckpointError(
                f"{path_or_hub_id}: cannot be read ({error.strerror or error}); check its permissions"
            ) from error
        return cls(path, files, label=label, config=config, hub_id=hub_id)

    @property
    def revision(self) -> str | None:
        """The commit of a hub snapshot, else None."""
        return self.path.name if self.hub_id is not None else None

    @property
    def config(self) -> dict[str, Any] | None:
        return self._config

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Tied name -> the name that holds its data; compares the bytes of a tied pair that is stored twice, once."""
        stored = {name: holder for file in self._files for name, holder in file.aliases.items()}
        specs = {name: file.specs[name] for name, file in self._holder.items() if name not in stored}
        config, naming = self._config, self._naming(specs)
        if config is not None and not config.get("architectures") and ties_by_default(config):
            config = config | {"tie_word_embeddings": True}
        known = config_ties(config, specs, self._read)
        if naming is not None:
            own = architecture_ties(naming, specs, self._read)
            there = {*naming.known(specs).values(), *naming.known(own).values()}
            more = {t: held for t, held in known.items() if t in specs or naming.known([t]).get(t) not in there}
            known = own | {t: held for t, held in more.items() if held not in own and t not in own.values()}
        return known | stored

    def _naming(self, specs: Mapping[str, TensorSpec]) -> Naming | None:
        """What the architecture calls its tensors, where transformers knows it."""
        if self._config is None or not isinstance(self._config.get("model_type"), str):
            return None
        try:
            return naming_of(self.path, Held.of({name: spec.shape for name, spec in specs.items()}))
        except (
            Exception
        ) as error:  # whatever a model class makes of odd values, or no transformers: then the known pairs have to do
            logger.info("%s: what its architecture ties is not known (%s)", self.path, error)
            return None

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._holder if name not in self.aliases)

    def __contains__(self, name: object) -> bool:
        return name in self._holder or name in self.aliases

    def spec(self, name: str) -> TensorSpec:
        held = self._resolve(name)
        spec = self._holder[held].specs[held]
        return spec if held == name else replace(spec, name=name)

    def load(self, name: str, rows: slice | None = None) -> torch.Tensor:
        return self._read(self._resolve(name), rows)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor in the files."""
        return {name: file.specs[name].shape for name, file in self._holder.items()}

    def shard_sizes(self) -> dict[str, int]:
        """Base name of each weight file -> its size in bytes."""
        return {file.path.name: file.path.stat().st_size for file in self._files}

    def sha256(self, stop: Event | None = None) -> dict[str, str]:
        """Base name -> hex SHA-256 of each weight file and of config.json, read in blocks. `stop`: as in `file_sha256`."""
        paths = [file.path for file in self._files]
        if self._config is not None:
            paths.append(self.path / "config.json")
        return {path.name: file_sha256(path, stop) for path in paths}

    def _resolve(self, name: str) -> str:
        if name in self._holder:
            return name
        if name in self.aliases:
            return self.aliases[name]
        raise missing_tensor(name, self.label, self._holder)

    def _read(self, name: str, rows: slice | None) -> torch.Tensor:
        return self._holder[name].read(name, rows)


def open_source(
    model: str | Path | Mapping[str, torch.Tensor] | nn.Module | TensorSource, label: str | None = None
) -> TensorSource:
    """Any model that the engine accepts as a TensorSource: a path or hub id, a state dict, a module (by reference), or
    a source.

    Raises ConfigError for another type, CheckpointError for what cannot be read.
    """
    if isinstance(model, (str, Path)):
        return Checkpoint.open(model, label=label)
    if isinstance(model, nn.Module):
        to_dict = getattr(getattr(model, "config", None), "to_dict", None)
        config = to_dict() if to_dict is not None else None
        return StateDictSource(model.state_dict(), label=label or type(model).__name__, config=config)
    if isinstance(model, Mapping):
        return StateDictSource(model, label=label or "state dict")
    # Looked up on the class: on the instance this would compute `aliases`, which may read tensors.
    if all(hasattr(type(model), member) for member in ("names", "spec", "load", "config", "aliases")):
        return model
    raise ConfigError(
        f"{label or 'model'}: type {type(model).__name__} is no model; pass a path, a hub id, a state dict, a torch "
        "module or a TensorSource"
    )


def locate(
    path_or_hub_id: str | Path, revision: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> tuple[Path, str | None]:
    """The local path, and the hub id where it was one. Raises CheckpointError where there is neither."""
    text = str(path_or_hub_id)
    if not text or "\0" in text:
        raise CheckpointError(
            f"{text!r} is not the path of a checkpoint; pass a directory, a .safetensors file or a hub id"
        )
    path = Path(text).expanduser()
    if path.exists():
        if revision is not None:
            raise ConfigError(
                f"{text}: is a local path, which has no revision (given: {revision!r}); drop the revision"
            )
        return path, None
    if isinstance(path_or_hub_id, Path) or not hub.looks_like_hub_id(text):
        raise CheckpointError(
            f"{text}: no such file or directory; check the path (a hub id has the form 'organisation/name')"
        )
    return hub.fetch(text, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only), text


def open_file(path: Path) -> WeightFile:
    """Check and open one weight file, by its suffix."""
    if path.suffix not in (".safetensors", ".bin"):
        raise CheckpointError(
            f"{path}: is neither a directory nor a .safetensors or .bin file; save the model with save_pretrained"
        )
    return SafetensorsFile.open(path) if path.suffix == ".safetensors" else TorchBinFile(path)


def _check_consistent(layout: Layout, files: list[WeightFile]) -> None:
    """Every tensor in one file only, and every tensor of the index where the index says."""
    holder: dict[str, WeightFile] = {}
    for file in files:
        for name in file.specs:
            if name in holder:
                raise CheckpointError(
                    f"{layout.index}: tensor {name!r} is both in {holder[name].path.name} and in {file.path.name}; "
                    "the shards are not of one checkpoint, download it again"
                )
            holder[name] = file
    for name, shard in (layout.weight_map or {}).items():
        if name not in holder or holder[name].path.name != shard:
            found = f"; it is in {holder[name].path.name}" if name in holder else ""
            raise CheckpointError(
                f"{layout.index}: lists tensor {name!r} in {shard}, but that file does not hold it{found}; download "
                "the checkpoint again"
            )


def file_sha256(path: Path, stop: Event | None = None) -> str:
    """Hex SHA-256 of a file, read in blocks. Raises InterruptedError once `stop` is set: nobody waits for the result then."""
    digest = hashlib.sha256()
    regular_file(path)
    try:
        with path.open("rb") as file:
            while block := file.read(_HASH_BLOCK_BYTES):
                digest.update(block)
                if stop is not None and stop.is_set():
                    raise InterruptedError
    except InterruptedError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
