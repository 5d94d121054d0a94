"""Code that a recipe names runs only where its reader says so."""

from __future__ import annotations

import pytest

from bmm_engine.errors import ConfigError
from bmm_engine.recipe.code import check_code
from bmm_engine.recipe.recipe import Recipe


def recipe(**own):
    return Recipe.parse({"base": "b", "experts": ["x"], **own})


JUDGED = {"evaluation": {"kind": "function", "function": "timeit:timeit", "tasks": ["import os"]}}


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (JUDGED, r"evaluation\.function = 'timeit:timeit'.*--allow-code.*BMM_ALLOW_CODE=timeit$"),
        ({"search": {"objective": "os:system"}}, r"search\.objective = 'os:system'.*BMM_ALLOW_CODE=os$"),
        (
            {"evaluation": {"kind": "lm_eval", "tasks": ["t"], "include_path": "tasks"}},
            r"evaluation\.include_path = 'tasks'.*BMM_ALLOW_CODE=tasks$",
        ),
        (
            {**JUDGED, "search": {"objective": "own.goals:least"}},
            r"evaluation\.function.*search\.objective.*=timeit,own\.goals$",
        ),
        ({"search": {"objective": f"{'x' * 5000}:f"}}, r"search\.objective = 'xxx.*characters"),
    ],
)
def test_what_a_recipe_would_run_is_told_and_refused(monkeypatch, own, words):
    monkeypatch.delenv("BMM_ALLOW_CODE", raising=False)
    with pytest.raises(ConfigError, match=words) as caught:
        check_code(recipe(**own), allowed=False)
    assert len(str(caught.value)) <= 1500
    check_code(recipe(**own), allowed=True)


@pytest.mark.parametrize(
    ("listing", "allowed"),
    [
        ("own", True),
        ("own.goals", True),
        ("a, own.goals ,b", True),
        ("own.goal", False),
        ("ow", False),
        ("", False),
        (",", False),
    ],
)
def test_modules_are_listed_with_the_packages_they_are_in(monkeypatch, listing, allowed):
    monkeypatch.setenv("BMM_ALLOW_CODE", listing)
    named = recipe(search={"objective": "own.goals:least"})
    if allowed:
        return check_code(named, allowed=False)
    with pytest.raises(ConfigError, match=r"own\.goals:least"):
        check_code(named, allowed=False)
    return None


def test_recipes_without_code_need_no_leave(monkeypatch):
    monkeypatch.delenv("BMM_ALLOW_CODE", raising=False)
    check_code(recipe(), allowed=False)
    check_code(recipe(search={"objective": "cvar@0.5"}, evaluation={"kind": "lm_eval", "tasks": ["t"]}), allowed=False)
