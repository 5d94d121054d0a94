"""The destination holds a complete merge or what it held before, whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bmm_engine.checkpoint import RECORD_FILENAME, Checkpoint, CheckpointWriter, StateDictSource, merge_record
from bmm_engine.errors import OutputExistsError, OutputWriteError

TENSORS = {"w": torch.ones(8, 4), "b": torch.ones(8)}
SOURCE = StateDictSource(TENSORS)
SPECS = [SOURCE.spec(name) for name in TENSORS]


def merge_to(path: Path, value: float = 1.0, *, overwrite: bool = False) -> Path:
    with CheckpointWriter(path, SPECS, overwrite=overwrite) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor * value)
        writer.write_json(RECORD_FILENAME, merge_record({"value": value}, []))
        return writer.commit()


def value_in(path: Path) -> float:
    return Checkpoint.open(path).load("w")[0, 0].item()


def tree(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


@pytest.mark.parametrize("name", ["out", "deep/er/out"])
def test_new_destination(tmp_path: Path, name: str) -> None:
    assert merge_to(tmp_path / name) == tmp_path / name
    assert value_in(tmp_path / name) == 1
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == [RECORD_FILENAME, "model.safetensors"]
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == ["out"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = merge_to(tmp_path / "out")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750
    assert (path / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_empty_directory_and_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert merge_to(tmp_path / "link") == tmp_path / "empty"
    assert (tmp_path / "link").is_symlink()
    assert value_in(tmp_path / "link") == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_content_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "notes").write_text("precious")
    for name, record in (("other", {"format": "other"}), ("list", []), ("text", "x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECORD_FILENAME).write_text(json.dumps(record))
    before = tree(tmp_path)
    for name in ("file", "dir", "other", "list", "text"):
        with pytest.raises(OutputExistsError, match=rf"{name}: exists and is .*choose another path"):
            CheckpointWriter(tmp_path / name, SPECS, overwrite=overwrite)
    assert tree(tmp_path) == before


def test_overwrite(tmp_path: Path) -> None:
    merge_to(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError, match="earlier merge; pass overwrite=True"):
        CheckpointWriter(tmp_path / "out", SPECS)
    assert tree(tmp_path) == before
    merge_to(tmp_path / "out", 2.0, overwrite=True)
    assert value_in(tmp_path / "out") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def failing_rename(monkeypatch: pytest.MonkeyPatch, fails: Callable[[Path, Path], BaseException | None]) -> None:
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        error = fails(Path(source), Path(target))
        if error is not None:
            raise error
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_failing_replacement_puts_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    merge_to(tmp_path / "out")
    before = tree(tmp_path)
    failing_rename(monkeypatch, lambda source, _: error if source.name == "out" and "partial" in str(source) else None)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputWriteError):
        merge_to(tmp_path / "out", 2.0, overwrite=True)
    assert tree(tmp_path) == before


def test_destination_made_by_someone_else_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").write_text("precious")
        with pytest.raises(OutputExistsError, match="choose another path"):
            writer.commit()
    assert tree(tmp_path) == {"out": None, "out/notes": b"precious"}


def test_destination_made_between_check_and_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_to(tmp_path / "out")

    def interfere(source: Path, target: Path) -> None:
        if "partial" in str(source) and source.name == "out":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "notes").write_text("precious")

    failing_rename(monkeypatch, interfere)
    with pytest.raises(OutputExistsError, match="was created by someone else meanwhile"):
        merge_to(tmp_path / "out", 2.0, overwrite=True)
    assert tree(tmp_path / "out") == {"notes": b"precious"}
    kept = [p for p in tmp_path.rglob("old")]
    assert len(kept) == 1
    assert value_in(kept[0]) == 1


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1)])
def test_any_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def interrupted() -> None:
        with CheckpointWriter(tmp_path / "deep" / "out", SPECS) as writer:
            writer.write("w", TENSORS["w"])
            writer.write_text("README.md", "text")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS) as writer:
        writer.write("w", TENSORS["w"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "open", "mkdir"])
def test_errors_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str) -> None:
    real, allowed = getattr(os, call), {"pwrite": 2, "fsync": 0, "open": 0, "mkdir": 1}[call]
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > allowed and not (call == "open" and args[1] == os.O_RDONLY):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    message = rf"out: cannot be written \({os.strerror(code)}.* needs \d+ bytes, \d+ are free there; free some space"
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        with pytest.raises(OutputWriteError, match=message) as caught:
            merge_to(tmp_path / "out")
    assert caught.value.errno == code
    assert list(tmp_path.iterdir()) == []


def test_after_a_failed_write_the_writer_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with CheckpointWriter(tmp_path / "out", SPECS) as writer:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)
            with pytest.raises(OutputWriteError):
                writer.write("w", TENSORS["w"])
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ValueError, match="not open"):
            writer.commit()


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: real(fd, view[:5], offset))
    merge_to(tmp_path / "out", 3.0)
    assert torch.equal(Checkpoint.open(tmp_path / "out").load("w"), TENSORS["w"] * 3)


def test_too_little_space_is_seen_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(OutputWriteError, match=r"not enough space.* needs \d{3} bytes, 100 are free there"):
        CheckpointWriter(tmp_path / "out", SPECS)
    assert list(tmp_path.iterdir()) == []


def test_no_permission_is_seen_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(os, "supports_effective_ids", set())
    with pytest.raises(OutputWriteError, match=r"no write permission.*change the permissions") as caught:
        CheckpointWriter(tmp_path / "a" / "out", SPECS)
    assert caught.value.errno == errno.EACCES
    assert list(tmp_path.iterdir()) == []


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_real_full_disk(tmp_path: Path) -> None:
    big = StateDictSource({"w": torch.ones(300, 1024)})  # 1.2 MB: fits until someone else fills the disk
    with mounted(tmp_path / "small", "size=2m") as disk:
        with CheckpointWriter(disk / "out", [big.spec("w")]) as writer:
            (disk / "filler").write_bytes(bytes(1_500_000))
            with pytest.raises(OutputWriteError, match=r"No space left.* needs \d+ bytes, \d+ are free") as caught:
                writer.write("w", big.load("w"))
            assert caught.value.errno == errno.ENOSPC
            assert [p.name for p in disk.iterdir()] == ["filler"]
        with pytest.raises(OutputWriteError, match="not enough space"):
            CheckpointWriter(disk / "out", [big.spec("w")])
        assert [p.name for p in disk.iterdir()] == ["filler"]


def test_real_read_only_disk(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "fixed", "ro") as disk,
        pytest.raises(OutputWriteError, match="out: cannot be written") as e,
    ):
        CheckpointWriter(disk / "out", SPECS)
    assert e.value.errno == errno.EROFS


HANG = """
import sys, time, torch
from bmm_engine.checkpoint import CheckpointWriter, StateDictSource
source = StateDictSource({"w": torch.ones(8, 4), "b": torch.ones(8)})
with CheckpointWriter(sys.argv[1], [source.spec(name) for name in source.names()], overwrite=True) as writer:
    writer.write("w", source.load("w"))
    print("half", flush=True)
    time.sleep(60)
"""


def killed_while_writing(destination: Path) -> Path:
    """Run a writer in a process, kill it half-way, and return the stage it leaves."""
    process = subprocess.Popen([sys.executable, "-c", HANG, str(destination)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "half\n"
        (stage,) = destination.parent.glob(f".{destination.name}.partial-{process.pid}-*")
        # A live writer's stage is nobody else's to clean.
        with pytest.raises(RuntimeError), CheckpointWriter(destination, SPECS, overwrite=True):
            raise RuntimeError
        assert (stage / "out" / "model.safetensors").exists()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    return stage


def test_killed_run(tmp_path: Path) -> None:
    stage = killed_while_writing(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [stage.name]
    (tmp_path / ".out.partial-notes").mkdir()  # alike in name only
    (tmp_path / ".out.partial-notes" / "notes").write_text("precious")
    other_host = tmp_path / ".out.partial-1-ab"
    shutil.copytree(stage, other_host)
    marker = other_host / "bmm-partial.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"host": "elsewhere"}))

    merge_to(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out", ".out.partial-notes", other_host.name}
    assert value_in(tmp_path / "out") == 1

    # Killed between the two renames of a replacement: the earlier merge is in the stage only, and comes back.
    shutil.copytree(other_host, stage)
    (stage / "bmm-partial.json").write_text(marker.read_text().replace("elsewhere", os.uname().nodename))
    (tmp_path / "out").rename(stage / "old")
    with pytest.raises(OutputExistsError, match="earlier merge"):
        CheckpointWriter(tmp_path / "out", SPECS)
    assert value_in(tmp_path / "out") == 1
    assert not stage.exists()


def test_a_flush_that_fails_in_the_background_fails_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Much output is flushed while the merge goes on; what the disk says then must not be lost."""
    monkeypatch.setattr("bmm_engine.checkpoint.writer._FLUSH_BYTES", 1)
    assert value_in(merge_to(tmp_path / "good")) == 1

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(OutputWriteError, match="input/output error"):
        merge_to(tmp_path / "bad")
    assert [p.name for p in tmp_path.iterdir()] == ["good"]
