"""Where a sequential merge keeps what is finished: solved tensors and hidden states, stage by stage, so that a killed one goes on.

    FOLDER/identity.json           what is merged, and how
    FOLDER/anchor/                 the anchor's merge, a checkpoint, and what its rule found out
    FOLDER/sweep-1/stage-003/      solved.safetensors, record.json, and the hidden states that the next stage starts from (the last stage's only)

A stage's folder is written under another name and renamed when it is whole. The folder is ours by its identity; what else lies in it is kept, and
the folder with it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from bmm_engine.checkpoint import TensorSource
from bmm_engine.checkpoint.ownership import WEIGHTS
from bmm_engine.checkpoint.safetensors_io import SafetensorsFile
from bmm_engine.checkpoint.staging import STAGE, STAGE_ENTRIES, sync_path
from bmm_engine.disk.files import (
    clean_retired,
    foreign,
    is_folder,
    matches,
    named,
    read_identity,
    remove_own,
    retire,
)
from bmm_engine.errors import ConfigError, OutputExistsError, OutputWriteError, shown
from bmm_engine.progress import Report

SOLVED, RECORD = "solved.safetensors", "record.json"
DIAGNOSTICS = "diagnostics.json"  # beside the anchor's weights
IDENTITY, LOCK, FORMAT = "identity.json", "lock", "bmm-walk"
_HIDDEN = r"(expert|merged)-\d+\.bin"
_STAGE_FILES = rf"solved\.safetensors|record\.json|{_HIDDEN}"
_ANCHOR_FILES = rf"{WEIGHTS}|diagnostics\.json"
_is_stage_file = matches(_STAGE_FILES)
is_walk_entry = matches(
    rf"identity\.json|\.identity\.json|lock|anchor/({_ANCHOR_FILES})?|\.anchor\.{STAGE}/({STAGE_ENTRIES % _ANCHOR_FILES})?"
    rf"|sweep-\d+/(\.?stage-\d+/({_STAGE_FILES})?)?"
)


class Sweep:
    """The stages of one sweep. Without a folder all is kept in memory, but for hidden states that find no room there."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._solved: dict[str, Tensor] = {}
        self._files: dict[str, SafetensorsFile] = {}
        self.records: list[dict[str, Any]] = []
        self.finished = -1
        if folder is None:
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            entries = sorted(path for path in folder.iterdir() if is_folder(path))
            for left in entries:
                if re.fullmatch(r"\.stage-\d+", left.name) and not remove_own(left, _is_stage_file):
                    raise OutputExistsError(f"{left}: holds {named(foreign(left, _is_stage_file))}; move it elsewhere.")
        for path in entries:
            if re.fullmatch(r"stage-\d+", path.name):
                self._take(path)
                self.finished = int(path.name.removeprefix("stage-"))

    @property
    def resumable(self) -> bool:
        return self.folder is not None

    def hidden_index(self) -> tuple[Path, dict[str, Any]] | None:
        """Of the last finished stage: its folder, and where in their files its hidden states lie; None where there is none to go on from."""
        if self.folder is None or self.finished < 0:
            return None
        path = self._stage(self.finished)
        return path, self.records[-1]["hidden"]

    @contextmanager
    def stage(self, number: int) -> Iterator[Path]:
        """The folder to write stage `number`'s files into."""
        if self.folder is None:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="bmm-hidden-")
            yield Path(self._temporary.name) / f"stage-{number:03d}"
            return
        path = self.folder / f".stage-{number:03d}"
        with writing(path):
            path.mkdir()
        yield path

    def publish(self, number: int, solved: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path | None:
        """Keep a finished stage; returns its folder, if it has one. What earlier ones hold of hidden states is removed.

        Raises `OutputWriteError`.
        """
        from safetensors.torch import save_file

        if self.folder is None:
            self._solved.update(solved)
            self.records.append(dict(record))
            self.finished = number
            if self._temporary is not None:
                for path in Path(self._temporary.name).glob("stage-*"):
                    if path.name != f"stage-{number:03d}":
                        shutil.rmtree(path)
            return None
        staged, path = self.folder / f".stage-{number:03d}", self._stage(number)
        with writing(staged):
            save_file({name: t.contiguous() for name, t in solved.items()}, staged / SOLVED)
            (staged / RECORD).write_text(json.dumps(record))
            for name in (SOLVED, RECORD):
                sync_path(staged / name)
            sync_path(staged)
            os.rename(staged, path)
            sync_path(self.folder)
            if self.finished >= 0:
                for file in sorted(self._stage(self.finished).iterdir()):
                    if re.fullmatch(_HIDDEN, file.name):
                        file.unlink()
        self._take(path)
        self.finished = number
        return path

    @property
    def names(self) -> set[str]:
        """Of solved tensors."""
        return {*self._solved, *self._files}

    def __contains__(self, name: object) -> bool:
        """Is there a solved tensor of that name?"""
        return name in self._solved or name in self._files

    def load(self, name: str, rows: slice | None = None) -> Tensor:
        """A solved tensor, as the base's files hold it but for its dtype."""
        if name in self._solved:
            tensor = self._solved[name]
            return (tensor if rows is None else tensor[rows]).clone()
        return self._files[name].read(name, rows)

    def close(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _stage(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"stage-{number:03d}"

    def _take(self, path: Path) -> None:
        file = SafetensorsFile.open(path / SOLVED)
        self._files.update(dict.fromkeys(file.specs, file))
        self.records.append(json.loads((path / RECORD).read_text()))


class Merged(TensorSource):
    """The anchor's tensors, with the solved ones in their place."""

    def __init__(self, anchor: TensorSource, sweep: Sweep):
        self.anchor, self.sweep = anchor, sweep
        self.label = f"{anchor.label}, solved"

    @property
    def solved(self) -> set[str]:
        """Names of the tensors that are not the anchor's."""
        below = self.anchor.solved if isinstance(self.anchor, Merged) else set()
        return below | self.sweep.names

    def names(self) -> tuple[str, ...]:
        return self.anchor.names()

    def __contains__(self, name: object) -> bool:
        return name in self.anchor

    def spec(self, name: str) -> Any:
        return self.anchor.spec(name)

    def load(self, name: str, rows: slice | None = None) -> Tensor:
        return self.sweep.load(name, rows) if name in self.sweep else self.anchor.load(name, rows)

    @property
    def config(self) -> dict[str, Any] | None:
        return self.anchor.config

    @property
    def aliases(self) -> dict[str, str]:
        return self.anchor.aliases


def check_folder(folder: Path) -> None:
    """Refuse a place that is not ours, before any work: the folder of a walk is known by its identity; one that is absent or empty may become it.

    Raises `OutputExistsError`.
    """
    if not os.path.lexists(folder) or _identity_in(folder) is not None:
        return
    if not is_folder(folder):
        raise OutputExistsError(
            f"{folder}: is no folder of its own, and a sequential merge keeps its state under this name. Move it elsewhere, or choose another output."
        )
    # A walk that was killed at its beginning has a lock, and perhaps the beginning of an identity.
    theirs = foreign(folder, lambda name: name in (LOCK, f".{IDENTITY}"))
    if (folder / LOCK).exists() and (folder / LOCK).stat().st_size:
        theirs.append(LOCK)
    if theirs:
        raise OutputExistsError(
            f"{folder}: was not made by a sequential merge, which keeps its state under this name, and holds {named(theirs)}. Move it elsewhere, or"
            " choose another output."
        )


def open_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder of a merge, or go on in it, once `drop_other` made sure of it. Raises `OutputWriteError`."""
    if _identity_in(folder) is not None:
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f".{IDENTITY}"
        with staged.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT, **identity}, indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, folder / IDENTITY)
        sync_path(folder)


def drop_other(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> bool:
    """Remove the folder of another merge, which would be in this one's way, whole: where no stage of it is finished (it ended in an error, its recipe
    was corrected, and nothing is lost), or with `overwrite`. Is it gone?

    Raises `ConfigError` for one with finished stages, `OutputExistsError` for one that holds what is not ours, `OutputWriteError`.
    """
    check_folder(folder)
    found, identity = _identity_in(folder), {"format": FORMAT, **identity}
    differs = [key for key in {**(found or {}), **identity} if found and found.get(key) != identity.get(key)]
    if found is None or not differs:
        return False
    finished, key = finished_stages(folder), differs[0]
    there, here = (shown(own.get(key)) for own in (found, identity))
    if finished and not overwrite:
        raise ConfigError(
            f"{folder}: holds an unfinished sequential merge with another {key} ({there} there, {here} here), {finished} stages of which are"
            " finished. To give them up and start anew, say --overwrite (overwrite=True) or remove the folder; to finish that one, run it as it was;"
            " or choose another output."
        )
    with writing(folder):
        theirs = retire(folder, is_walk_entry, (IDENTITY,))
    if theirs:
        raise OutputExistsError(
            f"{folder}: belongs to another merge, with another {key} ({there} there, {here} here), and holds {named(theirs)} besides. Move it"
            " elsewhere, or choose another output."
        )
    return True


def finished_stages(folder: Path) -> int:
    """Of all sweeps in the folder of a merge."""
    return sum(is_folder(path) for path in folder.glob("sweep-*/stage-*"))


def remove_folder(folder: Path, report: Report = lambda line: None) -> None:
    """Remove the folder of a finished merge; one that holds anything that is not the merge's is kept as it is, and `report` hears of it."""
    try:
        theirs = retire(folder, is_walk_entry, (IDENTITY,))
        clean_folders(folder)
    except OSError as error:  # the merge itself is written
        report(f"warning: {folder}: could not be removed ({error}); remove it by hand.")
        return
    if theirs:
        report(
            f"warning: {folder}: is kept, since it holds {named(theirs)}; the merge is finished and needs it no more."
        )


def clean_folders(folder: Path) -> None:
    """Remove what is left of folders whose removal was killed. Raises `OSError`."""
    clean_retired(folder, is_walk_entry, (IDENTITY,), lambda left: _identity_in(left) is not None)


def _identity_in(folder: Path) -> dict[str, Any] | None:
    return read_identity(folder / IDENTITY, FORMAT) if is_folder(folder) else None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into an `OutputWriteError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, (OutputWriteError, OutputExistsError)):
            raise
        raise OutputWriteError(
            f"{path}: the state of the merge could not be written ({error}). Free some space or choose another path; what is finished is kept, and"
            " the same command goes on from there."
        ) from error
