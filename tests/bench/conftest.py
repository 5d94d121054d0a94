from __future__ import annotations

import pytest

from bench import peak, timing


@pytest.fixture
def known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks that need no measuring, on a machine without bfloat16 arithmetic."""
    rates = {"fp32": 1.0, "fp64": 0.5, "bf16": None, "copy": 10.0}
    monkeypatch.setattr(peak, "measured", lambda device, kind: rates[kind])


@pytest.fixture
def quick(known_peaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a sample, and no pauses: for tests of what is done with times, not of the times."""
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)
    monkeypatch.setattr(timing, "MAX_CALLS", 1)
