"""Exceptions that cross from a worker to the process it works for, with their types and the worker's traceback."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class WorkerTraceback(Exception):
    """The cause of an exception that a worker raised: where it did, as text."""

    def __str__(self) -> str:
        return f"in a worker:\n\n{self.args[0]}"


@dataclass(frozen=True)
class PackedError:
    """A picklable stand-in for an exception."""

    pickled: bytes
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> PackedError:
        return cls(_pickled(error), "".join(traceback.format_exception(type(error), error, error.__traceback__)))

    def unpack(self) -> BaseException:
        error: BaseException = pickle.loads(self.pickled)
        error.__cause__ = WorkerTraceback(self.trace)
        return error


@dataclass(frozen=True)
class Reply:
    """What came of a call: its value, or how it failed."""

    value: Any = None
    error: PackedError | None = None


def attempt(call: Callable[[], Any]) -> Reply:
    """Call, and keep whatever it raises, since a worker outlives its jobs."""
    try:
        return Reply(call())
    except BaseException as error:
        return Reply(error=PackedError.of(error))


def _pickled(error: BaseException) -> bytes:
    # By its parts first: `__init__` may demand keywords that pickle knows nothing of, or make another message of the message.
    for form in (_Parts(error), error):
        try:
            found = pickle.dumps(form)
            back = pickle.loads(found)
            if type(back) is type(error) and str(back) == str(error):
                return found
        except Exception:  # a class that is local to a function, an attribute that is an open file: whatever pickle or a class may raise
            continue
    kind = type(error)
    return pickle.dumps(RuntimeError(f"{kind.__module__}.{kind.__qualname__}: {error}"))


class _Parts:
    """Pickles as a call that makes an exception again without its `__init__`."""

    def __init__(self, error: BaseException):
        self.error = error

    def __reduce__(self) -> tuple:
        return _from_parts, (type(self.error), self.error.args, self.error.__dict__)


def _from_parts(kind: type[BaseException], args: tuple, attributes: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error
