"""Kill a piece of work at each of its file events and transactions, and do it again: `python -m tests.kills FOLDER SCENARIO[,EVENT...] ...`.

The work runs in forks of one process, which did it once to have all modules loaded. Without events, all are tried until the work is done. Prints one
line for each kill after which the same work did not succeed with the same bytes, or left anything beside its result.
"""

from __future__ import annotations

import builtins
import os
import shutil
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmm_engine.searching.database import Database

EVENTS = (
    "open",
    "mkdir",
    "rename",
    "replace",
    "unlink",
    "remove",
    "rmdir",
    "link",
    "symlink",
    "fsync",
    "fdatasync",
    "pwrite",
    "ftruncate",
)
KILLED = 99


def dying(number: int) -> None:
    """Have this process die, without a word, when it comes to its file event of that number; each has a moment before and one after it."""
    import safetensors.torch

    left = [number]

    def tick() -> None:
        left[0] -= 1
        if left[0] < 0:
            os._exit(KILLED)

    def watched(call: Callable[..., Any], reads: Callable[..., bool] = lambda *a, **k: False) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if reads(*args, **kwargs):
                return call(*args, **kwargs)
            tick()
            result = call(*args, **kwargs)
            tick()
            return result

        return wrapper

    def only_reads(file: Any, mode: Any = "r", *_: Any, **__: Any) -> bool:
        return mode in ("r", "rb", os.O_RDONLY) or (isinstance(mode, int) and not mode & (os.O_WRONLY | os.O_RDWR))

    for name in EVENTS:
        setattr(os, name, watched(getattr(os, name), only_reads if name == "open" else lambda *a, **k: False))
    import io

    io.open = builtins.open = watched(builtins.open, only_reads)
    save_file = safetensors.torch.save_file

    def torn(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        with open(filename, "wb") as file:
            file.write(b"torn")
        save_file(tensors, filename, *args, **kwargs)
        tick()

    safetensors.torch.save_file = torn
    transaction = Database._transaction

    @contextmanager
    def watched_transaction(self: Database, begin: str) -> Iterator[sqlite3.Connection]:
        tick()
        with transaction(self, begin) as connection:
            yield connection
        tick()

    Database._transaction = watched_transaction  # type: ignore[method-assign]


def in_fork(work: Callable[[Path], None], place: Path, number: int | None = None) -> int:
    """The exit code of a piece of work in a process of its own, which dies at an event."""
    child = os.fork()
    if child == 0:
        try:
            if number is not None:
                dying(number)
            work(place)
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(folder: Path) -> dict[str, bytes | None]:
    """Of all below a folder: bytes, in which the folder itself is nameless; of a study its trials, without their times."""
    return {str(path.relative_to(folder)): _content_of(path, folder) for path in sorted(folder.rglob("*"))}


def _content_of(path: Path, folder: Path) -> bytes | None:
    if not path.is_file():
        return None
    if path.suffix == ".sqlite":
        with tempfile.TemporaryDirectory() as name:  # a reader of the file itself would bring it in order
            for file in path.parent.glob(f"{path.name}*"):
                shutil.copyfile(file, Path(name) / file.name)
            study = sqlite3.connect(Path(name) / path.name)
            found = study.execute(
                "SELECT number, kind, parameters, state, value FROM trials ORDER BY number"
            ).fetchall()
            study.close()
        return repr(found).encode()
    return path.read_bytes().replace(str(folder).encode(), b"PLACE")


def try_kills(scenario: Callable[[Path], None], folder: Path, events: list[int]) -> tuple[int, list[str]]:
    """The number of kills, and a line for each after which something was wrong."""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    scenario(whole)
    wanted, wrong, kills = content(whole), [], 0
    for number in events or range(10_000):
        place = folder / f"killed-{number}"
        place.mkdir()
        codes = [in_fork(scenario, place, number)]
        if codes[0] == 0 and not events:  # it has no such event
            break
        kills += codes[0] == KILLED
        before = sorted(content(place))
        if codes[0] == KILLED and content(place) != wanted:  # else it was at its end
            codes.append(in_fork(scenario, place, number // 2))  # killed again, earlier
            if codes[-1] == KILLED and content(place) != wanted:
                codes.append(in_fork(scenario, place))
        found = content(place)
        if {*codes} - {0, KILLED}:
            wrong.append(f"event {number}: exit codes {codes}, over {before}")
        elif found != wanted:
            differ = sorted(n for n in {**found, **wanted} if found.get(n, 0) != wanted.get(n, 0))
            wrong.append(f"event {number}: exit codes {codes}, other content of {differ}, over {before}")
        shutil.rmtree(place)
    return kills, wrong


def main() -> int:
    import importlib

    import torch

    torch.set_num_threads(1)
    folder, *scenarios = sys.argv[1:]
    failed = False
    for own in scenarios:
        name, *events = own.split(",")
        module, function = name.split(":")
        place = Path(folder) / function
        scenario = getattr(importlib.import_module(module), function)(place)
        kills, wrong = try_kills(scenario, place, [int(n) for n in events])
        failed |= bool(wrong) or kills < max(1, len(events))
        print("\n".join([f"{function}: {kills} kills", *wrong]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
