"""The one backend table: which implementation of an op runs on which device, and why one cannot."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from bmm_engine.errors import BackendError, ConfigError

logger = logging.getLogger(__name__)

# Backends that `auto` tries, by device type, best first. "torch" runs everywhere and is tried last.
PREFERENCE: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "torch")}

ENVIRONMENT = "BMM_BACKEND"

_announced: set[str] = set()


def _from_environment(op: str) -> str:
    """What BMM_BACKEND says of this op: `NAME` for all ops, or `OP=NAME` in a comma-separated list; else "auto"."""
    choice = "auto"
    for item in filter(None, (part.strip() for part in os.environ.get(ENVIRONMENT, "").split(","))):
        target, separator, name = item.rpartition("=")
        if not separator or target == op:
            choice = name
    return choice


def select(op: str, implementations: Mapping[str, ModuleType], backend: str, device: torch.device, *call: Any) -> Any:
    """The module that runs this call of `op`.

    `implementations` maps the names of the op's backends to modules with `supports(*call) -> str | None` (None, or
    the reason why this call cannot run there). `backend` is one of those names or "auto", which BMM_BACKEND overrides.

    Raises `ConfigError` for a name that the op does not have, `BackendError` when the named backend cannot run the
    call. Only "auto" moves on to the next backend, and says once, at INFO, what it chose and what it passed over.
    """
    origin = ""
    if backend == "auto" and (backend := _from_environment(op)) != "auto":
        origin = f" (set by {ENVIRONMENT})"
    if backend != "auto":
        if backend not in implementations:
            known = ", ".join(["auto", *sorted(implementations)])
            raise ConfigError(f"{op}: there is no backend {backend!r}{origin}; known: {known}")
        if reason := implementations[backend].supports(*call):
            raise BackendError(f"{op}: backend {backend!r}{origin} cannot run this call: {reason}")
        return implementations[backend]

    passed_over: list[str] = []
    for name in PREFERENCE.get(device.type, ("torch",)):
        if name not in implementations:
            continue
        reason = implementations[name].supports(*call)
        if reason is None:
            _announce(op, name, device, passed_over)
            return implementations[name]
        passed_over.append(f"{name}: {reason}")
    raise BackendError(f"{op}: no backend runs this call on {device}: {'; '.join(passed_over)}")


def _announce(op: str, name: str, device: torch.device, passed_over: list[str]) -> None:
    message = f"{op}: backend {name!r} on {device.type}" + "".join(f" (not {reason})" for reason in passed_over)
    if message not in _announced:
        _announced.add(message)
        logger.info(message)
