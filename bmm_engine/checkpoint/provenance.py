"""Where a merge came from: `bmm_merge.json` for machines, the model card for people."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event
from typing import Any

import torch

from bmm_engine.checkpoint.adapter import AdapterSource
from bmm_engine.checkpoint.guard import read_bytes
from bmm_engine.checkpoint.reader import Checkpoint
from bmm_engine.checkpoint.source import TensorSource
from bmm_engine.disk.files import read_identity
from bmm_engine.errors import CheckpointError, ConfigError

RECORD_FILENAME = "bmm_merge.json"
RECORD_FORMAT = "bmm-merge"
RECORD_VERSION = 1


def is_merge_directory(path: Path) -> bool:
    """True when `path` holds a `bmm_merge.json` of this engine's format, as a file of its own (no link)."""
    return read_identity(path / RECORD_FILENAME, RECORD_FORMAT) is not None


def read_merge_record(path: Path) -> dict[str, Any]:
    """A `bmm_merge.json`, which may hold NaN (what was measured may be). Raises CheckpointError for what is no JSON object."""
    try:
        record = json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is not valid JSON ({error}); carry out the merge again") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(record).__name__}, no record; carry out the merge again")
    return record


def input_record(role: str, source: TensorSource, stop: Event | None = None) -> dict[str, Any]:
    """One entry of `inputs`: role ("base", "expert 'math'"), where it came from, and SHA-256 and size of its files.

    Reads every file of a Checkpoint once; of an adapter its own files, and it names the base. A source in memory has no files.
    Raises InterruptedError once `stop` is set.
    """
    if not isinstance(source, (Checkpoint, AdapterSource)):
        return {"role": role, "source": source.label, "files": {}}
    sizes = source.shard_sizes()
    record: dict[str, Any] = {"role": role, "source": source.hub_id or source.label}
    if source.revision is not None:
        record["revision"] = source.revision
    if isinstance(source, AdapterSource):
        record["adapter_of"] = source.base.label
    hashes = source.sha256(stop)
    record["files"] = {
        name: {"sha256": digest, "bytes": sizes.get(name) or (source.path / name).stat().st_size}
        for name, digest in hashes.items()
    }
    return record


class InputRecords:
    """The records of a merge's inputs, hashed on threads of their own while the merge is at work; use as a context manager.

    A source that is listed several times is hashed once. Left without `result`, whatever the reason, nothing is waited for.
    """

    def __init__(self, inputs: Sequence[tuple[str, TensorSource]], threads: int):
        self._inputs = inputs
        self._stop = Event()
        self._pool = ThreadPoolExecutor(max(1, min(threads, len(inputs))), "bmm-hash")
        self._hashed: dict[int, Future[dict[str, Any]]] = {}

    def __enter__(self) -> InputRecords:
        for role, source in self._inputs:
            if id(source) not in self._hashed:
                self._hashed[id(source)] = self._pool.submit(input_record, role, source, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def result(self) -> list[dict[str, Any]]:
        """A record for each input, in their order. Raises CheckpointError for a file that cannot be read."""
        return [{**self._hashed[id(source)].result(), "role": role} for role, source in self._inputs]


def merge_record(
    recipe: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]],
    modules: Mapping[str, Any] | Sequence[Any] | None = None,
) -> dict[str, Any]:
    """The content of `bmm_merge.json`: versions, time (SOURCE_DATE_EPOCH if set), recipe, inputs and a summary of the
    modules.

    Paths and dtypes become text, and so do infinity and NaN, which JSON lacks. Raises ConfigError for values that are
    no plain data.
    """
    return {
        "format": RECORD_FORMAT,
        "format_version": RECORD_VERSION,
        "created": _created(),
        "versions": {"bmm_engine": _engine_version(), "torch": torch.__version__, "python": platform.python_version()},
        "recipe": _plain(recipe, "recipe"),
        "inputs": _plain(inputs, "inputs"),
        "modules": _plain(modules, "modules"),
    }


def model_card(record: Mapping[str, Any], *, name: str, architecture: str | None = None) -> str:
    """README.md of a merged model: front matter, the recipe, its inputs and how to load it.

    `record` is what `merge_record` returns; inputs that have a revision are hub models and become `base_model`.
    `architecture` is the transformers class that loads the model (`config["architectures"][0]`).
    """
    import yaml

    base_models = list(dict.fromkeys(entry["source"] for entry in record["inputs"] if "revision" in entry))
    front: dict[str, Any] = {"base_model": base_models} if base_models else {}
    front |= {"library_name": "transformers", "tags": ["merge", "bmm-engine"]}
    loader = architecture or "AutoModel"
    inputs = "\n".join(
        f"* {entry['role']}: `{entry['source']}`" + (f" at `{entry['revision']}`" if "revision" in entry else "")
        for entry in record["inputs"]
    )
    versions = record["versions"]
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name}

Merged from fine-tuned models in closed form by Bayesian Model Merging (arXiv 2605.12843), with bmm-engine
{versions["bmm_engine"]} and torch {versions["torch"]}, {record["created"]}. `{RECORD_FILENAME}` holds the hashes of
all inputs.

## Inputs

{inputs}

## Recipe

```yaml
{yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True).strip()}
```

## Use

```python
from transformers import {loader}

model = {loader}.from_pretrained("path/to/this/directory")
```
"""


def _created() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        moment = datetime.now(timezone.utc)
    else:
        try:
            moment = datetime.fromtimestamp(int(epoch), timezone.utc)
        except (ValueError, OverflowError, OSError) as error:
            raise ConfigError(
                f"SOURCE_DATE_EPOCH={epoch!r} is not a number of seconds since 1970; correct or unset it"
            ) from error
    return moment.replace(microsecond=0).isoformat()


def _engine_version() -> str:
    try:
        return version("bmm-engine")
    except PackageNotFoundError:
        return "not installed (source checkout)"


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON data. Raises ConfigError that names the key of what is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Path, torch.dtype)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ConfigError(
        f"{where}: a {type(value).__name__} cannot be recorded; give it as a number, text, list or mapping"
    )
