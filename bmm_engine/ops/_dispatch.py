"""The one backend table: which implementation of an op runs on which device, and why one cannot."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bmm_engine.errors import BackendError, ConfigError

logger = logging.getLogger(__name__)

# Backends that `auto` tries, by device type, best first. "torch" runs everywhere and is tried last.
PREFERENCE: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}

ENVIRONMENT = "BMM_BACKEND"

# How float32 factors are multiplied on a GPU, most exact first: as float32; as three TF32 products, which keeps about
# float32's exactness; as one TF32 product (11 significant bits).
PRECISIONS = ("ieee", "tf32x3", "tf32")

# A self-check's result may differ from torch in float64 by this much, relative to the largest value: far above any
# rounding error of a small problem, far below what a wrong tile or a missed row does.
_SELF_CHECK_TOLERANCE = {"ieee": 1e-4, "tf32x3": 1e-4, "tf32": 1e-2}

_announced: set[str] = set()
_self_checks: dict[tuple[Any, ...], str | None] = {}


def _from_environment(op: str) -> str:
    """What BMM_BACKEND says of this op: `NAME` for all ops, or `OP=NAME` in a comma-separated list; else "auto"."""
    choice = "auto"
    for item in filter(None, (part.strip() for part in os.environ.get(ENVIRONMENT, "").split(","))):
        target, separator, name = item.rpartition("=")
        if not separator or target == op:
            choice = name
    return choice


def select(
    op: str,
    implementations: Mapping[str, Any],
    backend: str,
    device: torch.device,
    *call: Any,
    self_check: tuple[Any, ...] | None = None,
) -> Any:
    """The module that runs this call of `op`.

    `implementations` maps the names of the op's backends to modules with `supports(*call) -> str | None` (None, or
    the reason why this call cannot run there). `backend` is one of those names or "auto", which BMM_BACKEND overrides.

    `self_check` is `(check, *variant)`: before a GPU backend other than torch runs its first call of a variant (say, a
    dtype) on a device, `check(implementation, device, *variant)` compares it with torch on a small problem and returns
    None or what is wrong; raising counts as wrong. A kernel may be miscompiled by one pair of compiler and driver.

    Raises `ConfigError` for a name that the op does not have, `BackendError` when the named backend cannot run the
    call. Only "auto" moves on to the next backend, and says once, at INFO, what it chose and what it passed over; a
    failed self-check is said at WARNING.
    """
    origin = ""
    if backend == "auto" and (backend := _from_environment(op)) != "auto":
        origin = f" (set by {ENVIRONMENT})"
    if backend != "auto":
        if backend not in implementations:
            known = ", ".join(["auto", *sorted(implementations)])
            raise ConfigError(f"{op}: there is no backend {backend!r}{origin}; known: {known}")
        reason = implementations[backend].supports(*call)
        if reason := reason or _self_checked(op, implementations, backend, device, self_check):
            raise BackendError(f"{op}: backend {backend!r}{origin} cannot run this call: {reason}")
        return implementations[backend]

    passed_over: list[str] = []
    for name in PREFERENCE.get(device.type, ("torch",)):
        if name not in implementations:
            continue
        reason = implementations[name].supports(*call)
        if reason is None and (reason := _self_checked(op, implementations, name, device, self_check)):
            _announce(f"{op}: backend {name!r} is passed over on {device}: {reason}", logging.WARNING)
        if reason is None:
            skipped = "".join(f" (not {reason})" for reason in passed_over)
            _announce(f"{op}: backend {name!r} on {device.type}{skipped}", logging.INFO)
            return implementations[name]
        passed_over.append(f"{name}: {reason}")
    raise BackendError(f"{op}: no backend runs this call on {device}: {'; '.join(passed_over)}")


def _announce(message: str, level: int) -> None:
    if message not in _announced:
        _announced.add(message)
        logger.log(level, message)


def _self_checked(
    op: str,
    implementations: Mapping[str, Any],
    name: str,
    device: torch.device,
    self_check: tuple[Any, ...] | None,
) -> str | None:
    """What a GPU backend's self-check finds wrong, or None; run once per op, backend, device and variant."""
    if self_check is None or name == "torch" or device.type != "cuda":
        return None
    check, *variant = self_check
    key = (op, name, device, *variant)
    if key not in _self_checks:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # comparing waits for the device, which a capture forbids: left to a later call
        _self_checks[key] = None  # the check itself may come by here
        try:
            reason = check(implementations[name], device, *variant)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        _self_checks[key] = f"its self-check failed: {reason}" if reason else None
    return _self_checks[key]


def disagreement(got: Tensor, truth: Tensor, precision: str = "ieee") -> str | None:
    """None when `got` is `truth` (float64) up to rounding, else what to say: for self-checks."""
    scale = truth.abs().max().item()
    error = (got.double() - truth).abs().max().item() / scale
    tolerance = _SELF_CHECK_TOLERANCE[precision]
    # Not `error > tolerance`, which NaN passes.
    return None if error <= tolerance else f"it differs from torch by {error:.1e} of the largest value in {got.dtype}"


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")


@contextmanager
def exact_matmul() -> Iterator[None]:
    """torch's float32 products without TF32 or bfloat16 (on CPUs, too), whatever the process allows elsewhere."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
        allowed = torch.get_float32_matmul_precision()
        if allowed == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
        return
    # Reading or writing the older setting fails after somebody used the newer one; not the other way round.
    backends: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    settings = [backend.matmul for backend in backends]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
