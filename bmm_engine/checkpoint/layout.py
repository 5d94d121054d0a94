"""Which files of a directory hold the weights, and whether they may be read at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bmm_engine.checkpoint.guard import read_json_object, regular_file, unreadable
from bmm_engine.errors import CheckpointError, listed

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_SINGLE_OR_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True)
class Layout:
    """The weight files of a checkpoint in canonical order; where there is an `index`, its map from tensor to file."""

    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: dict[str, str] | None = None


def find_weights(directory: Path) -> Layout:
    """The weight files of a Hugging Face directory: safetensors before bin, one whole file before an index (as
    transformers does).

    Raises CheckpointError when there are none, and for an index that is malformed or names a missing or outside file.
    """
    for single, index in _SINGLE_OR_INDEX:
        if os.path.lexists(directory / single):
            return Layout((contained(directory, single, asked_by="the directory"),))
        if os.path.lexists(directory / index):
            return _read_index(directory, contained(directory, index, asked_by="the directory"))
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory}: holds a PEFT adapter, not a full model; an adapter can be an expert, applied to the full model "
            "that is the base, and here a full model is needed: pass the one that the adapter was trained on, or merge the "
            "adapter into it (merge_and_unload, save_pretrained)"
        )
    others = sorted(path.name for path in directory.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if lone := [name for name in others if name.startswith(("adapter_model", "pytorch_lora_weights"))]:
        raise CheckpointError(
            f"{directory}: holds {lone[0]}, the weights of an adapter, but no adapter_config.json that says its rank and scaling. Put that file"
            " beside it (PEFT's save_pretrained writes both), or merge the adapter into its base and pass the result"
        )
    found = f" Found {listed(others)}: pass the path of a .safetensors file itself to read it." if others else ""
    inside = sorted(path.name for path in directory.iterdir() if path.is_dir() and full_weights(path) is not None)
    if inside and not others:
        found = f" Its folder {inside[0]!r} holds a model: pass {directory / inside[0]} to read that."
    raise CheckpointError(
        f"{directory}: no model.safetensors, model.safetensors.index.json, pytorch_model.bin or "
        f"pytorch_model.bin.index.json in this directory.{found} Save the model with save_pretrained"
    )


def full_weights(directory: Path) -> str | None:
    """The name of the file that makes `directory` a full model, or None."""
    return next((name for pair in _SINGLE_OR_INDEX for name in pair if os.path.lexists(directory / name)), None)


def is_plain_name(name: str) -> bool:
    """True for a file name without any path in it, as every system takes it."""
    encoded = name.encode("utf-8", "replace")
    return (
        name not in ("", ".", "..") and not set(name) & set("/\\\0") and encoded.decode() == name and len(encoded) < 256
    )


def boundary(directory: Path) -> Path:
    """What a link in `directory` may not lead out of: itself. The hub cache keeps its snapshots as links to `../../blobs`, so for one of those it is
    the cache folder of that one repository. Raises CheckpointError."""
    try:
        root = directory.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise unreadable(directory, error) from error
    repository = root.parent.parent
    return repository if root.parent.name == "snapshots" and repository.name.startswith("models--") else root


def contained(directory: Path, name: str, *, asked_by: str, within: Path | None = None) -> Path:
    """`directory / name`, once it is known to stay inside `directory`, or `within` what that is a part of; see `boundary`.

    Raises CheckpointError for a name with a path in it and for a link that leads outside.
    """
    path = directory / name
    if not is_plain_name(name):
        raise CheckpointError(
            f"{asked_by} names the file {name[:200]!r}, which is not a plain name inside {directory}; "
            "do not use this checkpoint unless you trust where it came from, and correct the name"
        )
    root = boundary(directory) if within is None else within
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise unreadable(path, error) from error
    if not target.is_relative_to(root):
        raise CheckpointError(f"{path}: is a link to {target}, outside {root}; replace the link by a copy of the file")
    return path


def check_weight_file(path: Path) -> None:
    """Refuse what is no weight file at all. Raises CheckpointError that says what it is instead."""
    info = regular_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(512).lstrip().lower()
    except OSError as error:
        raise unreadable(path, error) from error
    if info.st_size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes); download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is a git-lfs pointer of {info.st_size} bytes, not the weights; run `git lfs pull` in its "
            "repository"
        )
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path}: is a web page (HTML), not weights; download the raw file again")


def file_stamp(file: Path | int) -> tuple[int, int, int]:
    """Size, modification time and inode of a path or open descriptor: equal as long as the file is the same."""
    info = os.stat(file)
    return info.st_size, info.st_mtime_ns, info.st_ino


def _read_index(directory: Path, index: Path) -> Layout:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to file names; download it again")
    files = []
    for name in sorted(set(weight_map.values())):
        tensors = [tensor for tensor, file in weight_map.items() if file == name]
        path = contained(directory, name, asked_by=f"{index} (tensor {tensors[0]!r})")
        if not path.exists():
            raise CheckpointError(
                f"{index}: names the file {name!r} for {len(tensors)} tensors (first {tensors[0]!r}), but it is not in "
                f"{directory}; download the missing shard"
            )
        files.append(path)
    return Layout(tuple(files), index, dict(weight_map))
