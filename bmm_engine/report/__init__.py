"""A study, or a sequential merge, as one HTML page and pictures."""

from __future__ import annotations

from bmm_engine.report.drift import write_merge_report
from bmm_engine.report.page import write_report

__all__ = ["write_merge_report", "write_report"]
