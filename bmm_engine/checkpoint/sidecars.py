"""The files beside the weights: configuration, tokenizer, preprocessor."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bmm_engine.checkpoint.layout import WEIGHT_SUFFIXES, contained
from bmm_engine.errors import CheckpointError

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


def sidecar_files(directory: Path, config: dict[str, Any] | None) -> list[Path]:
    """The files of `directory` that a merged model needs beside its weights; Python files only where the config has an
    auto_map.

    Raises CheckpointError for a link that leads out of the directory and for anything that is not a regular file.
    """
    patterns = (*PATTERNS, "*.py") if config and config.get("auto_map") else PATTERNS
    files = []
    for name in sorted(path.name for path in directory.iterdir()):
        if name.endswith(WEIGHT_SUFFIXES) or not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        path = contained(directory, name, asked_by=str(directory))
        if not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file; remove it or replace it by a copy of the file")
        files.append(path)
    return files
