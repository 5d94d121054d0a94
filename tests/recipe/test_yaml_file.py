"""A recipe's YAML means what it seems to: the core rules of YAML 1.2, and nothing that repeats, nests or grows without bound."""

from __future__ import annotations

import math
import os
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm_engine.errors import ConfigError
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.yaml_file import MOST_BYTES, dump_yaml, load_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("0777", 777),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("inf", "inf"),
        ("2024-01-01", "2024-01-01"),
        ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("=", "="),
        ("~", None),
        ("null", None),
        ("", None),
        ("'true'", "true"),
        ('"1e-3"', "1e-3"),
        ("[a, 1, .inf]", ["a", 1, math.inf]),
        ("{filter: mlp, value: 0.5}", {"filter": "mlp", "value": 0.5}),
    ],
)
def test_values_are_those_of_the_core_rules(text, value):
    found = parse_yaml(f"key: {text}\n", "r.yaml")["key"]
    assert (found, type(found)) == (value, type(value))
    assert math.isnan(parse_yaml("key: .nan", "r.yaml")["key"])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join(['*' + before] * 3)}]\n" for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "base: b\nexperts: [x]\nalpha: 1\nexperts: [y]\n",
            r"line 4: the key 'experts' is there twice, on line 2 and on line 4",
        ),
        ("a:\n  b: 1\n  'b': 2\n", "line 3: the key 'b' is there twice, on line 2 and on line 3"),
        ("a: 1\n1: x\n", "line 2: the key 1 is no text"),
        ("~: x\n", "the key None is no text"),
        ("? [a]\n: x\n", "a list or a mapping is no key"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not read",
        ),
        ("a: !!str 3\n", "is not read; write the plain value"),
        ("a: ! x\n", "the tag '!' is not read"),
        ("a: 1\n---\nb: 2\n", "line 2: a second document"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", r"line 3: merge keys \(<<\)"),
        ("a: &x [*x]\n", "stands inside of what it repeats"),
        ("a: *x\n", "line 1: not valid YAML: found undefined alias"),
        (BOMB, "the alias 'f' is one of more than 16"),
        ("[" * 500_000, "it nests more than 32 deep"),
        ("- " * 50_000, "it nests more than 32 deep"),
        ("{a: " * 5_000, "it nests more than 32 deep"),
        ("a:\n\t- b\n", "line 2: not valid YAML: .*Indent with spaces, not tabs"),
        ("a: \0\n", "line 1: not valid YAML: the character 0 may not stand there"),
        ('a: "\\0"\n', "holds the character"),
        ('a: "\\e[31m"\n', "holds the character"),
        ('a: "\\ud800"\n', "holds the character"),
        ('a: "\\U7fffffff"\n', "line 1: not valid YAML"),
        ("a: 9007199254740993\n", r"9007199254740993' is too large; integers go to 2\^53"),
        (f"a: {'9' * 5000}\n", "is too large"),
        (f"a: 0x{'f' * 5000}\n", "is too large"),
        ("a: 1e999\n", "the number '1e999' is too large; infinity is written .inf"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_what_is_refused_names_file_line_and_remedy(text, words):
    started = time.monotonic()
    with pytest.raises(ConfigError, match=words) as caught:
        parse_yaml(text, "some/r.yaml")
    assert str(caught.value).startswith("some/r.yaml, line ")
    assert len(str(caught.value)) <= 1500
    assert time.monotonic() - started < 5


def test_values_are_counted_with_what_aliases_repeat(monkeypatch):
    monkeypatch.setattr("bmm_engine.recipe.yaml_file.MOST_VALUES", 1000)
    many = f"a: &a [{', '.join(['x'] * 300)}]\n"
    assert len(parse_yaml(many + "b: [*a, *a]\n", "r")["b"]) == 2
    with pytest.raises(ConfigError, match="line 2: it holds more than 1000 values"):
        parse_yaml(many + "b: [*a, *a, *a]\n", "r")
    with pytest.raises(ConfigError, match="it holds more than 1000 values"):
        parse_yaml(f"[{'1,' * 200_000}]", "r")


def test_a_few_aliases_are_values_of_their_own():
    found = parse_yaml("a: &x [1, {b: 2}]\nc: *x\n", "r")
    assert found == {"a": [1, {"b": 2}], "c": [1, {"b": 2}]}
    assert found["a"] is not found["c"]


def test_files(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfbase: b\r\nexperts: [x]\r\n")
    assert load_yaml(path) == {"base": "b", "experts": ["x"]}
    assert Recipe.load(path).base == "b"
    for content, words in (
        (b"base: b\nname: \xff\n", r"r\.yaml, line 2: the recipe cannot be read \(byte 0xff"),
        ("base: b\n".encode("utf-16"), r"r\.yaml, line 1: .*looks like UTF-16.*save it as that"),
        (b"\x93NUMPY\x01\0", r"r\.yaml, line 1: the recipe cannot be read"),
        (b"#" * (MOST_BYTES + 1), f"has {MOST_BYTES + 1} bytes, and at most {MOST_BYTES} are read"),
        (b"", "holds a NoneType"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            Recipe.load(path)


def test_what_is_no_regular_file_is_refused_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name, words in (
        (tmp_path / "pipe.yaml", "it is a named pipe"),
        (tmp_path / "folder.yaml", "it is a folder"),
        (tmp_path / "loop.yaml", "Too many levels of symbolic links"),
        ("/dev/zero", "it is a device"),
        (tmp_path / ("x" * 300), "is too long"),
        (tmp_path / "y\udcff.yaml", "is not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=words):
            Recipe.load(name)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("x" * 300, "is too long"),
        ("a/" * 3000, "is too long"),
        ("", "is empty"),
        ("\0", "zero byte"),
        ("\udcff", "not UTF-8"),
    ],
)
@pytest.mark.parametrize("key", ["base", "model", "grams", "calibration", "test"])
def test_paths_that_no_file_can_have_are_refused_when_the_recipe_is_read(tmp_path, key, path, words):
    expert = {"model": "x", **({} if key == "base" else {key: path})}
    recipe = Recipe.parse({"base": path if key == "base" else "b", "experts": [expert]})
    with pytest.raises(ConfigError, match=words) as caught:
        recipe._resolved(tmp_path)
    assert ("base" if key == "base" else f"experts.0.{key}") in str(caught.value)
    if "\0" not in path and "\udcff" not in path:
        (tmp_path / "r.yaml").write_text(
            dump_yaml({"base": "b", "experts": [expert]} | ({"base": path} if key == "base" else {}))
        )
        with pytest.raises(ConfigError, match=r"r\.yaml: .*" + words):
            Recipe.load(tmp_path / "r.yaml")


def test_mergekits_files_are_read_by_the_same_rules(tmp_path):
    path = tmp_path / "config.yml"
    text = "merge_method: ties\nbase_model: b\ndtype: bfloat16\nparameters: {normalize: true, density: 5e-1, weight: 1.0}\nmodels: [{model: x}]\n"
    path.write_text(text)
    recipe = Recipe.load(path)
    assert recipe.anchor.parameters["normalize"] is True
    assert recipe.anchor_parameters["density"] == [0.5]
    path.write_text(text.replace("true", "yes"))  # text to YAML 1.2; mergekit's word for true all the same
    assert Recipe.load(path).anchor.parameters["normalize"] is True
    path.write_text(text + "models: [{model: y}]\n")
    with pytest.raises(ConfigError, match=r"config\.yml, line 6: the key 'models' is there twice, on line 5"):
        Recipe.load(path)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.sampled_from(
        [
            "1e-3",
            "0o7",
            "0777",
            "yes",
            "1:30",
            "2024-01-01",
            "<<",
            "=",
            "~",
            "",
            ".inf",
            "null",
            "- a",
            "a: b",
            "#",
            "é\U0001f600",
            "0x1f",
            "*a",
            "!x",
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "yes", "1", "1e-3", "<<", "~"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(plain)
def test_what_is_written_reads_back_the_same_by_either_version(value):
    text = dump_yaml({"key": value})
    assert parse_yaml(text, "r") == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("ab:-,[]{}&*!|>'\"%@`#?~<\\ \n\t\0\x851e.\ud7ff\ufeff")))
def test_any_text_is_a_value_or_a_typed_error(text):
    said = ""
    try:
        parse_yaml(text, "r.yaml")
    except ConfigError as error:
        said = str(error)
    assert said == "" or said.startswith("r.yaml")
    assert len(said) <= 1500
