"""What is not ours is never deleted or replaced: refused by name, or kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bmm_engine import merge
from bmm_engine.checkpoint.staging import StagedDirectory
from bmm_engine.disk.files import clean_retired, matches, read_identity, remove_own, retire, write_whole
from bmm_engine.errors import OutputExistsError
from tests.killed import models

OWN = matches(r"mine|also|folder/(mine)?")


def merged(path: Path, *, experts: int = 2, **options: object) -> Path:
    base, *tuned = models()
    result = merge(base, tuned[:experts], modules=["a", "b"], output=path, progress=False, **options)
    assert result.path is not None
    return result.path


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_only_our_own_entries_go_and_no_link_is_followed(tmp_path: Path) -> None:
    theirs = make(tmp_path / "theirs", "mine")
    folder = make(tmp_path / "ours", "mine", "also", "folder/mine", "folder/notes")
    (folder / "link").symlink_to(theirs)
    assert retire(folder, OWN, ["also"]) == ["folder/notes", "link"]
    assert len(names(folder)) == 6
    assert not remove_own(folder, OWN, ["also"])
    assert names(folder) == ["also", "folder", "folder/notes", "link"]
    (folder / "link").unlink()
    (folder / "folder" / "notes").unlink()
    assert retire(folder, OWN, ["also"]) == []
    assert names(tmp_path) == ["theirs", "theirs/mine"]
    (tmp_path / "link").symlink_to(theirs)
    (theirs / "folder").symlink_to(theirs)
    assert not remove_own(theirs, OWN)
    assert (theirs / "folder").is_symlink()


def test_a_removal_that_was_killed_is_finished_where_it_is_known_for_ours(tmp_path: Path) -> None:
    for name in ("0000000a", "0000000b", "theirs"):
        make(tmp_path / f".x.removing-{name}", "mine")
    (tmp_path / ".x.removing-0000000c").mkdir()
    (tmp_path / ".x.removing-0000000d").symlink_to(make(tmp_path / "theirs", "mine"))
    clean_retired(tmp_path / "x", OWN, (), lambda left: left.name.endswith("a"))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".x.removing-0000000b", ".x.removing-0000000d", ".x.removing-theirs", "theirs"]
    assert (tmp_path / "theirs" / "mine").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', "[" * 100_000, "\xff"])
def test_an_identity_is_a_regular_file_of_our_format(tmp_path: Path, text: str) -> None:
    path = tmp_path / "identity.json"
    path.write_text(text, encoding="latin-1")
    assert read_identity(path, "ours") is None
    path.write_text('{"format": "ours"}')
    assert read_identity(path, "ours") == {"format": "ours"}
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    assert [read_identity(tmp_path / name, "ours") for name in ("link", "pipe", "absent")] == [None] * 3


def test_a_file_is_replaced_whole_and_what_killed_writers_left_goes(tmp_path: Path) -> None:
    ours = make(tmp_path, ".a.json.999999999.tmp", f".a.json.{os.getppid()}.tmp", ".a.json.notes.tmp")
    write_whole(tmp_path / "a.json", b"new")
    assert names(ours) == [f".a.json.{os.getppid()}.tmp", ".a.json.notes.tmp", "a.json"]


@pytest.mark.parametrize("theirs", ["notes.txt", "results/scores.json", "tokenizer_notes.json", "mine.py", "link"])
def test_overwrite_refuses_what_the_earlier_merge_did_not_write(tmp_path: Path, theirs: str) -> None:
    out = merged(tmp_path / "out", experts=1)
    if theirs == "link":
        (out / theirs).symlink_to(tmp_path)
    else:
        make(out, theirs)
    before = names(tmp_path)
    with pytest.raises(OutputExistsError, match=rf"would remove: '{theirs.split('/')[0]}/?'; move it elsewhere"):
        merged(out, overwrite=True)
    assert names(tmp_path) == before


def test_a_record_lists_its_files_and_one_without_a_list_is_known_by_names(tmp_path: Path) -> None:
    out = merged(tmp_path / "out", experts=1)
    record = json.loads((out / "bmm_merge.json").read_text())
    assert record.pop("files") == sorted(names(out)) == ["README.md", "bmm_merge.json", "model.safetensors"]
    (out / "bmm_merge.json").write_text(json.dumps(record))
    make(out, "config.json")
    merged(out, overwrite=True)
    assert names(tmp_path / "out") == ["README.md", "bmm_merge.json", "model.safetensors"]


def test_a_file_that_comes_during_the_merge_is_not_lost(tmp_path: Path) -> None:
    out = merged(tmp_path / "out", experts=1)
    stage = StagedDirectory(out, overwrite=True, needed_bytes=0)
    stage.create()
    (stage.out / "bmm_merge.json").write_text((out / "bmm_merge.json").read_text())
    make(out, "notes")
    with pytest.raises(OutputExistsError, match="'notes'"):
        stage.publish()
    stage.discard()
    assert "notes" in names(out)


def test_stages_that_are_empty_or_dead_are_cleaned_and_live_ones_never(tmp_path: Path) -> None:
    dead, live = 999_999_999, os.getppid()
    for name in (f"{dead}-ab", f"{live}-cd", "notes", f"{dead}-ef"):
        (tmp_path / f".out.partial-{name}").mkdir()
    (tmp_path / f".out.partial-{dead}-ef" / "bmm-partial.json").write_text('{"pi')  # killed while it wrote that
    make(tmp_path, f".out.partial-{dead}-aa/notes", f".out.partial-{live}-bb/bmm-partial.json")
    (tmp_path / f".out.partial-{dead}-0a").symlink_to(tmp_path)
    merged(tmp_path / "out")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(
        [
            f".out.partial-{dead}-0a",
            f".out.partial-{dead}-aa",
            f".out.partial-{live}-bb",
            f".out.partial-{live}-cd",
            "out",
        ]
    )


def test_after_a_kill_at_its_end_a_merge_may_be_repeated_but_no_other_takes_its_place(tmp_path: Path) -> None:
    out = merged(tmp_path / "out", experts=1)
    before = (out / "model.safetensors").read_bytes()
    stage = tmp_path / ".out.partial-999999999-ab"
    for other in (True, False):
        stage.mkdir()
        if other:
            with pytest.raises(OutputExistsError, match="holds an earlier merge"):
                merged(out)
        else:
            merged(out, experts=1)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (out / "model.safetensors").read_bytes() == before
