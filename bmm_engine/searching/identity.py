"""What makes two searches the same study: the recipe without its budget, and the files that it reads."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import bmm_engine
from bmm_engine.checkpoint.compose import checkpoints_of
from bmm_engine.checkpoint.safetensors_io import byte_view
from bmm_engine.measure import Models
from bmm_engine.recipe import Recipe
from bmm_engine.searching.problem import Problem

PROBE_BYTES = 2**20
# Keys of a recipe that do not change what a trial is.
_BESIDE: dict[str, Any] = {"dtype": True, "max_shard_size": True, "device": True, "search": {"trials", "minutes"}}


def identity_of(recipe: Recipe, workers: int, local_files_only: bool) -> dict[str, Any]:
    """Plain values; equal for searches that may go on from one another's trials. Paths are not among them, contents are."""
    plain = recipe.model_copy(update={"base": "", "experts": []}).model_dump(
        exclude=_BESIDE | {"base": True, "experts": True}
    )
    models = Models(local_files_only)
    identity: dict[str, Any] = {
        "recipe": _texts(plain),
        "base": _models_digest(models.source(recipe.base)),
        "experts": [],
    }
    for expert in recipe.experts:
        source = models.expert(recipe, expert)
        # A Gram file that comes of calibration may not be there yet; the calibration stands for it.
        grams = expert.grams if expert.calibration is None else None
        files = [expert.validation, expert.test, expert.head, expert.calibration, expert.fisher, grams]
        identity["experts"].append(
            {
                "name": expert.label,
                "model": _models_digest(source),
                "parameters": _texts(expert.parameters),
                "metric": expert.metric,
                "data": [None if file is None else _path_digest(Path(file)) for file in files],
            }
        )
    if recipe.search.schedule == "synchronous":
        identity["workers"] = workers  # they decide what a batch is
    return identity


def models_of(problem: Problem) -> list[str]:
    """Digests of the base and the experts of a search in memory."""
    alignment = problem.plan.alignment
    return [_digest(_probes(source)) for source in (alignment.base, *(e.source for e in alignment.experts))]


def versions() -> dict[str, str]:
    """Of what a study's numbers depend on."""
    found = {"bmm_engine": bmm_engine.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "nevergrad", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _models_digest(source: Any) -> str:
    return _digest(probe for own in checkpoints_of(source) for probe in _probes(own))


def _digest(probes: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in probes:
        digest.update(f"{name}\0{tensor}".encode())
    return digest.hexdigest()[:16]


def _probes(source: Any) -> Iterable[tuple[str, str]]:
    """Every tensor's name, shape and first values: enough to tell one fine-tune from another without reading all of it."""
    for name in source.names():
        spec = source.spec(name)
        rows = slice(0, 1) if spec.shape else None
        values = source.load(name, rows).contiguous()
        yield name, f"{tuple(spec.shape)} {spec.dtype} {hashlib.sha256(byte_view(values)).hexdigest()}"


def _path_digest(path: Path) -> str:
    """Of a file's size and both its ends; of a folder, the names and sizes of what is in it."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
    elif path.exists():
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as opened:
            digest.update(opened.read(PROBE_BYTES))
            opened.seek(max(0, size - PROBE_BYTES))
            digest.update(opened.read(PROBE_BYTES))
    return digest.hexdigest()[:16]


def _texts(value: Any) -> Any:
    """As JSON holds it: infinity as text, lists for tuples."""
    if isinstance(value, dict):
        return {str(key): _texts(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_texts(item) for item in value]
    return "inf" if value == float("inf") else value
