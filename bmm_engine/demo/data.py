"""The demo's tasks: real text classification sets, parsed out of two pinned archives and split without leakage."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bmm_engine.demo.archives import (
    ORANGE_TEXT,
    VADER,
    Archive,
    fetch,
    read_tar_gz_members,
    read_zip_member,
)
from bmm_engine.errors import DataError

NEUTRAL_BAND = 0.5
"""Sentences whose mean human rating, on a scale of -4 to 4, is at most this far from 0 carry no clear sentiment."""

_ORANGE_FOLDER = "orangecontrib/text/datasets"
_VADER_TAR = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_VADER_FOLDER = "hutto_ICWSM_2014"
_KEY_WORDS = 32
_LINK = re.compile(r"https?://\S+")


@dataclass(frozen=True)
class Split:
    """Sentences and their labels, index by index; a label is a position in `Task.labels`."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """One classification task. No two sentences of `train`, `validation` and `test` begin with the same words, and
    sentences of one document share a split. `calibration` holds rows of `train` without their labels.
    """

    name: str
    labels: tuple[str, ...]
    train: Split
    calibration: tuple[str, ...]
    validation: Split
    test: Split

    def digest(self) -> str:
        """SHA-256 of everything in the task: equal digests mean that an expert saw the same data."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Sizes:
    """Upper limits on the sentences in each split of each task."""

    train: int = 500
    calibration: int = 256
    validation: int = 100
    test: int = 200


@dataclass(frozen=True)
class Row:
    """A labelled sentence; rows of one `document` must not be separated by a split."""

    text: str
    label: str
    document: str


def load_tasks(
    cache_dir: Path,
    *,
    sizes: Sizes = Sizes(),
    seed: int = 0,
    orange_text: Archive = ORANGE_TEXT,
    vader: Archive = VADER,
) -> list[Task]:
    """The demo's tasks, from archives kept in `cache_dir` and fetched with pip where they are missing.

    The same `seed` and `sizes` always give the same tasks.

    Raises `DownloadError` if an archive cannot be fetched, `DataError` if one does not hold what is expected of it.
    """
    orange_path = fetch(orange_text, cache_dir)
    vader_path = fetch(vader, cache_dir)
    sentiment = _read_sentiment(vader_path, ("movieReviewSnippets", "tweets"))

    def topics(name: str) -> tuple[list[Row], list[Row]]:
        train, test = (_read_topics(orange_path, f"{_ORANGE_FOLDER}/{name}-{part}.tab") for part in ("train", "test"))
        return train, test

    def one_pool(rows: list[Row]) -> tuple[list[Row], list[Row]]:
        return hold_out(rows, share=0.4, seed=seed)

    pools = {
        "reuters": topics("reuters-r8"),
        "newsgroups": topics("20newsgroups"),
        "election": one_pool(_read_election(orange_path, f"{_ORANGE_FOLDER}/election-tweets-2016.tab")),
        "movies": one_pool(sentiment["movieReviewSnippets"]),
        "tweets": one_pool(sentiment["tweets"]),
    }
    return [make_task(name, train, test, sizes=sizes, seed=seed) for name, (train, test) in pools.items()]


def make_task(name: str, train: Sequence[Row], test: Sequence[Row], *, sizes: Sizes, seed: int) -> Task:
    """Split two pools of rows into a task, with classes as balanced in each split as the pool allows.

    Sentences that begin with the same words count as copies: only the first is kept, and of a copy in both pools the
    one in `test`. Validation is held out of `train` by document.

    Raises `DataError` if a class of the training rows is absent from the test rows, or the other way round.
    """
    seen: set[str] = set()
    test = list(_without_copies(test, seen))
    train, validation = hold_out(list(_without_copies(train, seen)), share=0.2, seed=seed)
    labels = tuple(sorted({row.label for row in train}))
    for part, rows in (("test", test), ("validation", validation)):
        if {row.label for row in rows} != set(labels) or len(labels) < 2:
            found = sorted({row.label for row in rows})
            raise DataError(f"task {name}: {part} rows have the classes {found}, training rows have {list(labels)}")

    rng = random.Random(f"{seed} {name}")
    train_split = _draw_balanced(train, labels, sizes.train, rng)
    return Task(
        name=name,
        labels=labels,
        train=train_split,
        calibration=tuple(rng.sample(train_split.texts, min(sizes.calibration, len(train_split)))),
        validation=_draw_balanced(validation, labels, sizes.validation, rng),
        test=_draw_balanced(test, labels, sizes.test, rng),
    )


def hold_out(rows: list[Row], *, share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(kept, held out): about `share` of the documents are held out, each with all of its rows."""
    documents = sorted({row.document for row in rows})
    held_out = set(random.Random(seed).sample(documents, round(share * len(documents))))
    return [row for row in rows if row.document not in held_out], [row for row in rows if row.document in held_out]


def _draw_balanced(rows: Sequence[Row], labels: tuple[str, ...], size: int, rng: random.Random) -> Split:
    """Up to `size` rows, one from each class in turn until a class runs out, in random order."""
    by_label: dict[str, list[Row]] = {label: [] for label in labels}
    for row in rows:
        by_label[row.label].append(row)
    ranked: list[tuple[int, int, Row]] = []
    for index, members in enumerate(by_label.values()):
        rng.shuffle(members)
        ranked += [(turn, index, row) for turn, row in enumerate(members)]
    drawn = sorted(ranked, key=lambda entry: entry[:2])[:size]
    rng.shuffle(drawn)
    return Split(tuple(row.text for _, _, row in drawn), tuple(index for _, index, _ in drawn))


def _without_copies(rows: Iterable[Row], seen: set[str]) -> Iterator[Row]:
    """Rows whose first words are not in `seen` yet; those words are added to it.

    Only the first words count because the encoder reads a truncated text.
    """
    for row in rows:
        key = " ".join(row.text.casefold().split()[:_KEY_WORDS])
        if key and key not in seen:
            seen.add(key)
            yield row


def _read_topics(path: Path, member: str) -> list[Row]:
    """Rows of an Orange table with the columns Category and Text; every text is a document."""
    return [
        Row(fields["Text"], fields["Category"], document=f"{member}:{number}")
        for number, fields in _orange_rows(path, member, ("Category", "Text"))
    ]


def _read_election(path: Path, member: str) -> list[Row]:
    """Original tweets (no retweets) of two candidates; the label is the author.

    A link keeps its place but not its random letters, which would fill half of the tokens of a tweet.
    """
    return [
        Row(_LINK.sub("http", fields["Content"]), fields["Author"], document=f"{member}:{number}")
        for number, fields in _orange_rows(path, member, ("Is retweet", "Author", "Content"))
        if fields["Is retweet"] == "False"
    ]


def _orange_rows(path: Path, member: str, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(row number, fields by column) of an Orange table: tab-separated, three header lines, the names in the first."""
    lines = csv.reader(io.StringIO(_decode(read_zip_member(path, member), f"{path}: {member}")), delimiter="\t")
    try:
        names = next(lines, [])
        if missing := [name for name in needed if name not in names]:
            raise DataError(f"{path}: {member} has the columns {names}, lacking {missing}")
        for number, fields in enumerate(lines, start=2):
            if number < 4 or not fields:
                continue
            if len(fields) != len(names):
                raise DataError(f"{path}: {member}: row {number} has {len(fields)} fields, not {len(names)}")
            yield number, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: {member} cannot be parsed as a table: {error}") from error


def _read_sentiment(path: Path, names: tuple[str, ...]) -> dict[str, list[Row]]:
    """Sentences rated by people, labelled by the sign of the mean rating; the neutral band is left out.

    A line is `id<TAB>mean rating<TAB>sentence`; ids such as `12_3` name sentence 3 of document 12.
    """
    members = {name: f"{_VADER_FOLDER}/{name}_GroundTruth.txt" for name in names}
    origin = f"{path}: {_VADER_TAR}"
    contents = read_tar_gz_members(read_zip_member(path, _VADER_TAR), tuple(members.values()), origin)
    return {
        name: list(_sentiment_rows(_decode(contents[member], f"{origin}: {member}"), f"{origin}: {member}"))
        for name, member in members.items()
    }


def _sentiment_rows(content: str, origin: str) -> Iterator[Row]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            identifier, rating_text, sentence = line.split("\t")
            rating = float(rating_text)
        except ValueError as error:
            raise DataError(f"{origin}: line {number} is not `id<TAB>rating<TAB>sentence`: {line[:80]!r}") from error
        if abs(rating) > NEUTRAL_BAND:
            label = "positive" if rating > 0 else "negative"
            yield Row(sentence, label, document=identifier.partition("_")[0])


def _decode(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{origin} is not UTF-8: {error}") from error
