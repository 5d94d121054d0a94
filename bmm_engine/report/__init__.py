"""A study as one HTML page and pictures."""

from __future__ import annotations

from bmm_engine.report.page import write_report

__all__ = ["write_report"]
