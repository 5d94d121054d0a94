"""Odd calibration and labelled files: what is no text is an error with file and line, never the word for it, never a wait."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bmm_engine.errors import BmmError, CheckpointError, ConfigError, DataError, EmptyCalibrationError
from bmm_engine.evaluators.contract import TaskData
from bmm_engine.evaluators.data import read_labelled
from bmm_engine.recipe.sections import EvaluationRecipe
from bmm_engine.statistics.calibration import read_calibration

LONG = "x" * 200_000
DEEP = '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}"
GOOD = '{"text": "a b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", GOOD + '{"text": null}', r"d\.jsonl, line 2: 'text' is null, not text"),
        ("d.jsonl", "null\n", r"d\.jsonl, line 1 is null; a line is a mapping with text"),
        ("d.jsonl", '{"text": 3}', r"line 1: 'text' is a number, not text \(3\)"),
        ("d.jsonl", '{"text": true}', r"line 1: 'text' is a boolean"),
        ("d.jsonl", '{"text": NaN}', r"line 1: 'text' is a number, not text \(nan\)"),
        ("d.jsonl", '{"text": ["a"]}', r"line 1: 'text' is a list"),
        ("d.jsonl", '{"text": {"a": 1}}', r"line 1: 'text' is a mapping"),
        ("d.jsonl", '{"text": "a", "text": "b"}', r"line 1: .*the key 'text' is there twice"),
        ("d.jsonl", '{"texts": "a"}', r"line 1 has no column 'text' \(it has: texts\)"),
        ("d.jsonl", "\n\n[1]\n", r"line 3 is a list"),
        ("d.jsonl", GOOD + DEEP, r"line 2: cannot be read \(it nests too deeply\)"),
        ("d.jsonl", '{"text": ' + "9" * 5000 + "}", r"line 1: cannot be read"),
        ("d.jsonl", '{"text": "a\\ud800"}', r"line 1: 'text' holds '\\ud800', which is no character"),
        ("d.jsonl", '{"text": "a\\u0000"}', r"line 1: 'text' holds '\\x00'"),
        ("d.txt", "a\nb\0\n", r"d\.txt, line 2: 'text' holds '\\x00'"),
        ("d.txt", b"a\n\xff\xfe\n", r"d\.txt, line 2: the file cannot be read \(byte 0xff at 1\)"),
        ("d.txt", "a b".encode("utf-16"), r"looks like UTF-16.*save it as that"),
        ("d.txt", b"a\n\xed\xa0\x80\n", r"line 2: the file cannot be read \(byte 0xed"),  # a lone surrogate's bytes
        ("d.csv", "id,text\n1,a\n2\n", r"d\.csv, line 3: 1 cells under 2 columns \(id, text\)"),
        ("d.csv", "id,text\n1,a,b\n", r"d\.csv, line 2: 3 cells under 2 columns"),
        ("d.csv", "text,text\na,b\n", r"d\.csv: the column 'text' is there 2 times"),
        ("d.csv", f'text\na\n"{LONG}"\n', r"d\.csv, line 3: not valid CSV \(field larger than field limit.*\.jsonl"),
        ("d.csv", 'text\n"a\n' + "b\n" * 100_000, r"not valid CSV.*Close the quote"),
        ("d.csv", "text\na\0b\n", "line 2"),
        ("d.tsv", "id\ttext\n1\n", r"d\.tsv, line 2: 1 cells under 2 columns"),
        ("d.tsv", "text\ttext\na\tb\n", r"the column 'text' is there 2 times"),
        ("d.tsv", "id\n1\n", r"d\.tsv has no column 'text' \(it has: id\)"),
        ("d.tsv", ",".join(f"c{i}" for i in range(100_000)) + "\n1\n", "has no column 'text'"),
    ],
)
def test_what_is_no_text_is_an_error_with_its_line(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words) as caught:
        read_calibration(path)
    assert name in str(caught.value)
    assert len(str(caught.value)) <= 1500


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.txt", "a b\n\nc\n"),
        ("d.jsonl", '{"text": "a b"}\n\n{"text": ""}\n{"text": "c"}\n'),
        ("d.csv", "text,label\r\na b,1\r\n\r\nc,2\r\n"),
        ("d.tsv", "label\ttext\n1\ta b\n\n2\tc\n"),
    ],
)
def test_byte_order_marks_are_no_part_of_the_first_text(tmp_path, name, content):
    for mark in ("", "\ufeff"):
        (tmp_path / name).write_text(mark + content, encoding="utf-8", newline="")
        assert read_calibration(tmp_path / name).texts == ("a b", "c")


def test_cells_of_tables_are_text_numbers_included(tmp_path):
    (tmp_path / "d.csv").write_text("text,n\n1.5,\nnull,2\nNone,3\n")
    assert read_calibration(tmp_path / "d.csv").texts == ("1.5", "null", "None")
    (tmp_path / "d.tsv").write_text("n\ttext\n1\ta\tb\n")
    assert read_calibration(tmp_path / "d.tsv").texts == ("a\tb",)  # the last column may hold tabs
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": LONG}))
    assert read_calibration(tmp_path / "d.jsonl").texts == (LONG,)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".safetensors"])
def test_what_is_no_regular_file_is_refused_unopened(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    for name, words in (("pipe", "a named pipe"), ("zero", "it is a device"), ("loop", "does not exist")):
        for read in (read_calibration, lambda path: labelled(path)):
            with pytest.raises(ConfigError, match=f"{words}|a .txt file has no labels"):
                read(tmp_path / f"{name}{suffix}")
    with pytest.raises(EmptyCalibrationError):
        read_calibration(tmp_path / f"folder{suffix}")
    for path in ("x" * 300 + suffix, f"\udcff{suffix}", f"a\0{suffix}"):
        with pytest.raises(ConfigError, match=r"too long|not UTF-8|zero byte"):
            read_calibration(tmp_path / path)


def test_images_that_are_none(tmp_path):
    pytest.importorskip("PIL")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ConfigError, match=r"pipe\.png: the image cannot be read \(it is a named pipe\)"):
        read_calibration(tmp_path)


def test_inputs_without_samples(tmp_path):
    save_file({"input_ids": torch.tensor(3)}, tmp_path / "d.safetensors")
    with pytest.raises(ConfigError, match=r"d\.safetensors: input_ids has no dimensions"):
        read_calibration(tmp_path / "d.safetensors")
    (tmp_path / "d.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"d\.safetensors: is empty"):
        read_calibration(tmp_path / "d.safetensors")


def labelled(path, **options):
    (path.parent / "model").mkdir(exist_ok=True)
    task = TaskData("t", path, path.parent / "model")
    return read_labelled(task, EvaluationRecipe(kind="text_classification", **options))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", '{"text": "a", "label": null}', r"d\.jsonl, line 1: 'label' is null"),
        ("d.jsonl", '{"text": "a", "label": true}', r"line 1: 'label' is a boolean"),
        (
            "d.jsonl",
            '{"text": "a", "label": 1.0}',
            r"line 1: 'label' is a number \(1\.0\); a label is a class number or a name",
        ),
        ("d.jsonl", '{"text": "a", "label": [1]}', r"line 1: 'label' is a list"),
        ("d.jsonl", '{"text": null, "label": 1}', r"line 1: 'text' is null"),
        ("d.csv", "text,label\na,\n", r"d\.csv, line 2: 'label' is empty"),
        ("d.tsv", "text\tlabel\na\n", r"d\.tsv, line 2: 1 cells under 2 columns"),
        ("d.csv", f"text,label\na,{'y' * 5000}\n", r"d\.csv: the label 'yyy.* has 5000 characters"),
    ],
)
def test_labels_that_are_none(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises((ConfigError, DataError), match=words) as caught:
        labelled(tmp_path / name)
    assert len(str(caught.value)) <= 1500


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("labels.json", "[", r"labels\.json: cannot be read"),
        ("labels.json", '["a", "a"]', "a list of different names"),
        ("model/config.json", "{", r"config\.json: cannot be read"),
        ("model/config.json", '{"label2id": [1]}', r"config\.json: label2id = \[1\]: it must map"),
        ("model/config.json", '{"label2id": {"good": "x"}}', "it must map names to class numbers"),
        ("model/config.json", "[]", r"labels\.json|label2id"),
    ],
)
def test_lists_of_names_that_are_none(tmp_path, file, content, words):
    (tmp_path / "d.csv").write_text("text,label\na,good\n")
    (tmp_path / "model").mkdir()
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=words):
        labelled(tmp_path / "d.csv")


def test_labels_beyond_any_head(tmp_path):
    from bmm_engine.evaluators.data import check_labels

    (tmp_path / "d.csv").write_text(f"text,label\na,{'9' * 900}\n")
    with pytest.raises(DataError, match=r"d\.csv: labels run from"):
        check_labels(labelled(tmp_path / "d.csv"), 3, TaskData("t", tmp_path / "d.csv", tmp_path))
    save_file({"input_ids": torch.ones(2, 3), "label": torch.tensor([0.0, 1.5])}, tmp_path / "d.safetensors")
    with pytest.raises(ConfigError, match=r"d\.safetensors: its labels are torch\.float32"):
        labelled(tmp_path / "d.safetensors")


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([".txt", ".jsonl", ".csv", ".tsv"]),
    st.lists(
        st.sampled_from([b"text", b"label", b",", b"\t", b"\n", b'"', b"\xef\xbb\xbf", b"\0", b"\xff", b"{", b"}", b":", b"null", b"[", b"]", b"\r"]),
        max_size=30,
    ),
)  # fmt: skip
def test_any_bytes_are_texts_or_a_typed_error(tmp_path_factory, suffix, parts):
    path = tmp_path_factory.mktemp("bytes") / f"data{suffix}"
    path.write_bytes(b"".join(parts))
    for read in (read_calibration, labelled):
        said = ""
        try:
            read(path)
        except BmmError as error:
            said = str(error)
        assert said == "" or f"data{suffix}" in said
        assert len(said) <= 1500


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.txt", "the cat\nsat on\n"),
        ("D.TXT", "the cat\r\nsat on\r\n"),
        ("d.jsonl", '{"text": "the cat", "label": 0}\n{"text": "sat on", "label": 1}\n'),
        ("d.csv", "text,label\nthe cat,0\nsat on,1\n"),
        ("d.CSV", '"text","label"\n"the cat",0\n"sat on",1\n'),
        ("d.tsv", "text\tlabel\nthe cat\t0\nsat on\t1\n"),
    ],
)
def test_a_byte_order_mark_changes_nothing(tmp_path, name, content, mark):
    path = tmp_path / name
    path.write_text(mark + content, encoding="utf-8", newline="")
    assert read_calibration(path).texts == ("the cat", "sat on")
    assert read_calibration(path, samples=1).texts == ("the cat",)
    if "txt" not in name.lower():
        (tmp_path / "config.json").write_text("{}")
        found = read_labelled(TaskData("t", path, tmp_path), EvaluationRecipe(kind="text_classification"))
        assert (found.inputs.texts, found.labels.tolist()) == (("the cat", "sat on"), [0, 1])


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    from bmm_engine.recipe.recipe import Recipe

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "d.txt").write_text("the cat\n")
    keys = ("calibration", "grams", "fisher", "sensitivity", "validation", "test", "head")
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({"base": "b", "experts": [{"model": "m", **dict.fromkeys(keys, "~/d.txt")}]})
    )
    expert = Recipe.load(tmp_path / "recipe.yaml").experts[0]
    assert [getattr(expert, key) for key in keys] == [str(tmp_path / "home" / "d.txt")] * len(keys)
    assert read_calibration(type(tmp_path)("~/d.txt")).texts == ("the cat",)
    with pytest.raises(ConfigError, match=r"home/none\.txt does not exist"):
        read_calibration(type(tmp_path)("~/none.txt"))
    # A folder that is called so is still itself.
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "d.txt").write_text("sat on\n")
    assert Recipe.load(tmp_path / "recipe.yaml").experts[0].calibration == str(tmp_path / "~" / "d.txt")
