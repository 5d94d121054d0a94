"""Typed errors. Every message names the file, tensor or key, the values that clash, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LONGEST_MESSAGE = 1500  # characters
LONGEST_VALUE = 200


def cut(text: str, limit: int = LONGEST_VALUE) -> str:
    """`text` in at most `limit` characters: what is too much is left out of the middle, and counted there."""
    if len(text) <= limit:
        return text
    kept = limit - 32
    left_out = f" ... {len(text) - kept} characters ... "
    return text[: kept - kept // 3] + left_out + text[len(text) - kept // 3 :]


def shown(value: Any, limit: int = LONGEST_VALUE) -> str:
    """A value from outside as a message shows it: its repr, shortened. Never raises."""
    try:
        text = repr(value)
    except (
        Exception
    ):  # of integers with thousands of digits, of what nests too deeply, of objects with a repr of their own
        text = f"a value of type {type(value).__name__}"
    return cut(text, limit)


def listed(names: Iterable[Any], limit: int = 300) -> str:
    """Names, separated by commas, as many as `limit` characters hold; how many more there are."""
    names = [cut(str(name), 100) for name in names]
    found: list[str] = []
    for name in names:
        if found and sum(map(len, found)) + 2 * len(found) + len(name) > limit:
            return f"{', '.join(found)} and {len(names) - len(found)} more"
        found.append(name)
    return ", ".join(found)


class BmmError(Exception):
    """Base of every error that the engine raises on purpose; the CLI prints it as one paragraph, exit code 2.

    Its text has at most `LONGEST_MESSAGE` characters, whatever was put into it: the start names the file, the end the remedy.
    """

    def __str__(self) -> str:
        return cut(super().__str__(), LONGEST_MESSAGE)


class ConfigError(BmmError, ValueError):
    """A recipe, option or argument is wrong (unknown key, value out of range, options that exclude each other)."""


class BackendError(BmmError, RuntimeError):
    """A backend asked for by name cannot run this call; the message says why."""


class CheckpointError(BmmError, ValueError):
    """A checkpoint cannot be read as it stands (truncated, malformed, unsafe, unknown layout)."""


class MissingTensorError(CheckpointError):
    """A tensor that the merge needs is not in a checkpoint."""


class ShapeMismatchError(BmmError, ValueError):
    """Two tensors that must agree in shape do not."""


class NonFiniteWeightError(BmmError, ValueError):
    """A weight holds NaN or infinity.

    Attribute: `index`, where several were given: 0 is the base, t + 1 expert t; else None.
    """

    def __init__(self, message: str, *, index: int | None = None):
        super().__init__(message)
        self.index = index


class NonFiniteGramError(BmmError, ValueError):
    """Rows (or a Gram) of one module hold NaN or infinity; nothing was accumulated from them.

    Attributes: `module` (its name), `count` (rows or entries that are not finite).
    """

    def __init__(self, message: str, *, module: str, count: int):
        super().__init__(message)
        self.module = module
        self.count = count


class NotPositiveDefiniteError(BmmError, ArithmeticError):
    """`A = sum_t beta_t G_t + lam I` has no Cholesky factor, even with jitter.

    Attributes: `module` (its name), `pivot` (1-based order of the first minor that fails), `ridge` (the last one tried).
    """

    def __init__(self, message: str, *, module: str, pivot: int, ridge: float):
        super().__init__(message)
        self.module = module
        self.pivot = pivot
        self.ridge = ridge


class GramMismatchError(BmmError, ValueError):
    """A Gram does not belong to the model it is used for (width, module names, hash of the weights)."""


class EmptyCalibrationError(BmmError, ValueError):
    """Calibration gave no rows: no batches, or only padding."""


class CollectionError(BmmError, RuntimeError):
    """A forward pass did not let Grams be measured (mask does not fit, inputs shared only sometimes, module never called)."""


class OutputExistsError(BmmError, FileExistsError):
    """The output path exists and is not a merge that this engine wrote, or may not be replaced."""


class OutputWriteError(BmmError, OSError):
    """Writing failed (full disk, no permission); whatever was written under a temporary name has been removed."""


class NumericalWarning(UserWarning):
    """A result is valid but needed help (jitter), or rests on less than it seems to."""


class DownloadError(BmmError, RuntimeError):
    """Data that the demo needs could not be fetched, or what came is not what was pinned."""


class DataError(BmmError, ValueError):
    """A data set cannot be read as it stands, or is too small for what was asked of it."""


class TrainingError(BmmError, RuntimeError):
    """Fine-tuning an expert failed (diverged, or its worker process failed or died)."""


class SearchError(BmmError, RuntimeError):
    """A search cannot go on: trials fail, or there is nothing to score by."""


class SearchExhaustedError(SearchError):
    """An optimiser proposes nothing that is new; the search ends before its budget."""


class StudyError(BmmError, RuntimeError):
    """A study on disk is not there, cannot be read or written as it stands, or was asked for what its state rules out."""


class StudyExistsError(StudyError, FileExistsError):
    """A study is to be created where one is."""


class StudyBusyError(StudyError):
    """Another process drives the study, or keeps its database busy for too long."""


class WorkerLostError(BmmError, RuntimeError):
    """Workers died, one after another, of one job (or before they were ready for any).

    Attributes: `job` (None: while they were made ready), `attempts` (workers lost), `cause` (how the last one ended: a signal, an exit code).
    """

    def __init__(self, message: str, *, job: object, attempts: int, cause: str):
        super().__init__(message)
        self.job = job
        self.attempts = attempts
        self.cause = cause
