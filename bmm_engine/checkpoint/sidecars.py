"""The files beside the weights: all that a model needs to be used, by a rule that says what stays behind.

Families of tokenizers, processors and licences are too many to list, and a list is silent about what it lacks. So every small file of the directory
comes along, but for kinds that never belong to a model in use. Of folders only those come that the model itself names, or that have a known purpose:
a project's folder may hold anything.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bmm_engine.checkpoint.guard import parse_json, read_bytes, read_json_object
from bmm_engine.checkpoint.layout import WEIGHT_SUFFIXES, boundary, contained, is_plain_name
from bmm_engine.errors import CheckpointError, listed, shown

logger = logging.getLogger(__name__)

# Names that are read when a model is loaded: one that cannot be copied is an error.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "bpe.codes",
    "*.spm",
    "normalizer.json",
    "*.model",
    "*.tiktoken",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "*.jinja",
)
MOST_BYTES = 128 * 2**20  # of one file; the largest tokenizers have 40 MB
MOST_FILES = 2000  # of one folder

_LICENCE = re.compile(r"(?i)(.*[_-])?(licen[cs]e|notice|copying|copyright|use_policy)([._-].*)?")
_WEIGHTS = (
    *WEIGHT_SUFFIXES,
    *(
        ".index.json",
        ".tflite",
        ".mlmodel",
        ".pkl",
        ".pickle",
        ".joblib",
        ".engine",
        ".onnx_data",
        ".pdparams",
        ".nemo",
    ),
)
# Training states, their logs and results; data; pictures of the card; archives and programs.
_NEVER = re.compile(
    r"""(?ix) \..* | ~.* | .*~ | (readme|model_?card|changelog)(\..*)? | bmm_merge\.json | bmm-partial\.json
    | mergekit_(moe_)?config\.ya?ml | adapter_(config|model)\..* | rust_model\..* | latest
    | (optimizer|scheduler|scaler|rng_state|random_states|trainer_state|training_args|trainer_log|zero_to_fp32)\b.*
    | (all|train|eval|test|predict|benchmark)_results?(_.*)?\.(json|txt) | events\.out\..* | nohup\.out
    | .*\.(log|out|err|tmp|lock|part|incomplete|csv|parquet|arrow|jsonl|feather|sqlite3?|db|png|jpe?g|gif|webp|bmp|svg|mp4|avi|mov|pdf|ipynb|sh
        |bat|exe|so|o|pyc|zip|tar|t?gz|bz2|xz|zst|7z)"""
)
_MODULE_FOLDER = re.compile(r"\d+_\w+")  # of sentence-transformers: 1_Pooling
_OWN_FOLDERS = re.compile(
    r"(?i)(additional_)?chat_templates?|(slow_|fast_)?tokenizer|(image_|video_|audio_)?processor|feature_extractor|(speaker|voice)\w*"
)
_VOICES = re.compile(r"(?i)(speaker|voice)")


@dataclass(frozen=True)
class Sidecars:
    """`files`: what comes along, by its path within the directory, with slashes. `modules`: those of them that are weights of modules that stand
    beside the model (sentence-transformers' `2_Dense`). `left_out`: of the rest, what might be missed, and why."""

    files: dict[str, Path]
    modules: tuple[str, ...]
    left_out: dict[str, str]


def sidecar_files(directory: Path, config: dict[str, Any] | None) -> Sidecars:
    """What a merged model needs beside its weights; Python files only where the configs say that the model runs them.

    Raises CheckpointError for a file of a known name that leads out of the directory, is no regular one, or is damaged where it must be read.
    """
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    modules = _module_paths(directory)
    code = _runs_code(directory, config, modules)
    for name in _entries(directory):
        if stays_behind(name, code=code) or (directory / name).is_dir():
            continue
        path = _checked(directory, name, left_out)
        if path is not None:
            files[name] = path
    named = _named_folders(directory)
    weights: list[str] = []
    for folder in (name for name in _entries(directory) if (directory / name).is_dir()):
        inside = [path for path in modules if path.split("/")[0] == folder]
        if folder not in named and not may_come(folder) and not inside and not code:
            continue
        whole = bool(folder in named or may_come(folder) or inside)
        for name in _walk(directory, folder, left_out):
            weight = name.endswith(_WEIGHTS) and any(name.startswith(f"{path}/") for path in inside)
            if weight and _is_second(directory, name):
                continue
            if not weight and not _comes(name, folder, whole, code):
                continue
            path = _checked(directory, name, left_out, weight=weight)
            if path is not None:
                files[name] = path
                weights += [name] if weight else []
    return Sidecars(files, tuple(weights), left_out)


def stays_behind(name: str, *, code: bool = False) -> bool:
    """Whether a file of that path never comes along, by its name. `code`: the model runs the Python files beside it."""
    last = name.rsplit("/", 1)[-1]
    if any(part.startswith(".") or part == "__pycache__" for part in name.split("/")) or last.endswith(_WEIGHTS):
        return True
    if last.endswith(".py") or last.endswith(".pyi"):
        return not code
    return bool(_NEVER.fullmatch(last)) and not _LICENCE.fullmatch(last)


def _comes(name: str, folder: str, whole: bool, code: bool) -> bool:
    """Whether a file within a folder comes along. `whole`: the folder is one of the model's; else its Python files may be."""
    if _VOICES.search(folder):
        return "/." not in name  # a voice may be a tensor in a file of its own
    return not stays_behind(name, code=code) and (whole or name.endswith(".py"))


def may_come(folder: str) -> bool:
    """Whether a folder comes along by its name alone."""
    return bool(_MODULE_FOLDER.fullmatch(folder) or _OWN_FOLDERS.fullmatch(folder))


def _is_known(name: str) -> bool:
    """Whether a file is read when a model is loaded, or must go with it, so that it cannot be left out."""
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS) or bool(_LICENCE.fullmatch(name)) or "/" in name


def _entries(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if is_plain_name(name))


def _walk(directory: Path, folder: str, left_out: dict[str, str]) -> Iterator[str]:
    """The files under a folder; links to folders are not followed."""
    found: list[str] = []
    for here, folders, names in os.walk(directory / folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in folders:
            if (Path(here) / name).is_symlink():
                left_out[(Path(here) / name).relative_to(directory).as_posix()] = "it is a link to a folder"
        found += [(Path(here) / name).relative_to(directory).as_posix() for name in names if is_plain_name(name)]
        if len(found) > MOST_FILES:
            left_out[folder] = f"it holds more than {MOST_FILES} files"
            return
    yield from sorted(found)


def _checked(directory: Path, name: str, left_out: dict[str, str], *, weight: bool = False) -> Path | None:
    """The file, or None for one that stays behind, with the reason in `left_out`. Raises CheckpointError for one that may not."""
    path = directory / name
    try:
        path = contained(path.parent, path.name, asked_by=str(directory), within=boundary(directory))
        if not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file; remove it or replace it by a copy of the file")
    except CheckpointError as error:
        if _is_known(name):
            raise
        left_out[name] = str(error)
        return None
    size = path.stat().st_size
    if size > MOST_BYTES and not weight and not _is_known(name):
        left_out[name] = f"it has {size} bytes, more than the {MOST_BYTES} of a file that comes along unasked"
        return None
    return path


def _module_paths(directory: Path) -> list[str]:
    """The folders that sentence-transformers' modules.json names. Raises CheckpointError where it is damaged."""
    modules = _modules(directory)
    paths = [module.get("path") for module in modules]
    for path in paths:
        if not isinstance(path, str) or (path and not all(is_plain_name(part) for part in path.split("/"))):
            raise CheckpointError(
                f"{directory / 'modules.json'}: names the folder {shown(path)}, which is no path inside {directory}; correct it"
            )
    return [str(path) for path in paths if path]


def _modules(directory: Path) -> list[dict[str, Any]]:
    path = directory / "modules.json"
    if not os.path.lexists(path):
        return []
    found = parse_json(read_bytes(contained(directory, "modules.json", asked_by=str(directory))), str(path))
    listed_modules = found if isinstance(found, list) else []
    return [
        own for own in listed_modules if isinstance(own, dict) and isinstance(own.get("type"), str) and "path" in own
    ]


def _runs_code(directory: Path, config: dict[str, Any] | None, modules: list[str]) -> bool:
    """Whether some config has an auto_map, or a module is of a class of its own: then the Python files are part of the model."""
    if config and config.get("auto_map"):
        return True
    if any(not module["type"].startswith("sentence_transformers.") for module in _modules(directory)):
        return True
    return any(content.get("auto_map") for content in _small_objects(directory))


def _small_objects(directory: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects beside the weights that are configs; one that cannot be read names nothing."""
    for name in _entries(directory):
        if not name.endswith(".json") or stays_behind(name) or name in ("tokenizer.json", "vocab.json"):
            continue
        path = directory / name
        try:
            if path.stat().st_size <= 2**20:
                yield read_json_object(contained(directory, name, asked_by=str(directory)))
        except (CheckpointError, OSError):
            continue


def _named_folders(directory: Path) -> set[str]:
    """The folders that a config names a file of: `speaker_embeddings/de.npy`."""
    folders = {name for name in _entries(directory) if (directory / name).is_dir() and not name.startswith(".")}
    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for own in value.values():
                look(own)
        elif isinstance(value, list):
            for own in value:
                look(own)
        elif isinstance(value, str) and "/" in value:
            found.update({value.removeprefix("./").split("/")[0]} & folders)

    for content in _small_objects(directory):
        # Where it came from is a path too, and of another model.
        look({key: value for key, value in content.items() if "name_or_path" not in key and not key.startswith("_")})
    return {name for name in found if not _holds_model(directory / name)}


def _holds_model(folder: Path) -> bool:
    return any(name.endswith(_WEIGHTS) for name in os.listdir(folder))


def _is_second(directory: Path, name: str) -> bool:
    """Whether a module's weights are there in a better form: safetensors beside a pickle."""
    folder = (directory / name).parent
    return not name.endswith(".safetensors") and any(own.endswith(".safetensors") for own in os.listdir(folder))


def tell(directory: Path, sidecars: Sidecars) -> None:
    """The log hears of what was left out, and of modules that were not merged."""
    if sidecars.modules:
        logger.warning(
            "%s: the modules beside the model are copied from the base, not merged: %s",
            directory,
            listed(sidecars.modules),
        )
    for name, reason in sidecars.left_out.items():
        logger.warning("%s: %s is left out: %s", directory, name, reason)
