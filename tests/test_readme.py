"""The README's table of rules is the registry's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmm_engine.anchors import table

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.is_file(), reason="the README is not beside the tests")
def test_the_readme_holds_the_table_that_the_registry_prints():
    assert table.markdown() in README.read_text(encoding="utf-8"), "replace it by what `bmm anchors --markdown` prints"
