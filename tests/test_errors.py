"""Messages stay short whatever is put into them, and say what they are about at the start and what to do at the end."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine.errors import (
    LONGEST_MESSAGE,
    BmmError,
    ConfigError,
    NonFiniteGramError,
    OutputWriteError,
    cut,
    listed,
    shown,
)


@given(st.text(max_size=600), st.integers(40, 300))
def test_what_is_cut_keeps_its_start_and_end(text, limit):
    found = cut(text, limit)
    assert len(found) <= limit
    assert found == text or (len(text) > limit and " characters ... " in found)
    assert found[:5] == text[:5]
    assert found[-2:] == text[-2:]


def test_how_much_was_left_out_is_said():
    found = cut("a" * 500 + "b" * 500)
    start, left_out, end = found.partition(" ... 832 characters ... ")
    assert left_out
    assert len(start) + len(end) == 168


def test_values_that_cannot_be_shown_are_named_by_their_type():
    class Odd:
        def __repr__(self):
            raise RuntimeError

    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(Odd()) == "a value of type Odd"
    assert shown(10**5000) == "a value of type int"
    assert shown(nested) == "a value of type list"
    assert shown("x") == "'x'"
    assert len(shown({"a": "b" * 10_000})) <= 200
    while nested:
        nested = nested[0]  # freed level by level


def test_lists_of_names_say_how_many_more_there_are():
    assert listed(["a", "b"]) == "a, b"
    assert listed([]) == ""
    found = listed(f"module.{i}" for i in range(10_000))
    assert found.startswith("module.0, module.1, ")
    assert found.endswith(" more")
    assert len(found) < 330
    assert len(listed(["x" * 5000])) <= 100


@pytest.mark.parametrize(
    "make",
    [
        BmmError,
        ConfigError,
        OutputWriteError,
        lambda text: NonFiniteGramError(text, module="m", count=1),
    ],
)
def test_no_message_is_longer_than_the_limit(make):
    error = make("file.yaml: " + "x" * 100_000 + "; do this.")
    assert len(str(error)) <= LONGEST_MESSAGE
    assert str(error).startswith("file.yaml: ")
    assert str(error).endswith("; do this.")
    assert str(make("short")) == "short"
    if make is not None and isinstance(make, type):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
