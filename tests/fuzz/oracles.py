"""What a command must have made of what strict readers find in its mutated input, in float64."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.case import Ended, Invalid
from tests.fuzz.reading import model_in

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def differs(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> str | None:
    if got.shape != expected.shape:
        return f"{name} has shape {tuple(got.shape)}, right is {tuple(expected.shape)}"
    if not expected.numel():
        return None
    if not torch.isfinite(expected.double()).all() or not torch.isfinite(got.double()).all():
        return f"{name} holds NaN or infinity"
    scale = max(float(expected.double().abs().max()), 1e-30)
    error = float((got.double() - expected.double()).abs().max()) / scale
    allowed = _TOLERANCE.get(got.dtype, 0.3) if tolerance is None else tolerance
    return f"{name} is off by {error:.2g} of its largest value" if error > allowed else None


def check_average(out: Path, base: Path, experts: list[Path]) -> str | None:
    """The merge at `out` is the plain average of the experts, by the base's names."""
    try:
        origin, tuned = model_in(base), [model_in(path) for path in experts]
    except Invalid as error:
        return f"accepted: {error}"
    return check_tensors(out, origin, tuned)


def check_tensors(out: Path, origin: dict[str, torch.Tensor], tuned: list[dict[str, torch.Tensor]]) -> str | None:
    got = model_in(out)
    tuned = [{without_prefix(name, origin): tensor for name, tensor in own.items()} for own in tuned]
    if set(got) != set(origin):
        return f"the output's names differ from the base's: {sorted(set(got) ^ set(origin))[:3]}"
    for name, tensor in origin.items():
        if not tensor.dtype.is_floating_point:
            expected = tensor
        elif any(name not in own for own in tuned):
            return f"accepted: an expert lacks {name}"
        else:
            values = [own[name].double() for own in tuned]
            if len({value.shape for value in (tensor, *values)}) > 1:
                return f"accepted: shapes of {name} differ"
            if not all(torch.isfinite(value).all() for value in values):  # the base is not read
                return f"accepted: {name} holds NaN or infinity"
            expected = sum(values) / len(values)
        if wrong := differs(name, got[name], expected):
            return wrong
    return None


def without_prefix(name: str, known: Container[str]) -> str:
    """A prefix more or less than the base has is no other name: PEFT's and wrappers' `model.`, which the class that the config names loads."""
    if name in known:
        return name
    return next((other for other in (name.removeprefix("model."), f"model.{name}") if other in known), name)


def check_inspected(ended: Ended, folder: Path) -> str | None:
    """`bmm inspect --json` counts what is in the checkpoint."""
    try:
        tensors = model_in(folder)
    except Invalid as error:
        return f"accepted: {error}"
    said = json.loads(ended.out)
    right: dict[str, Any] = {
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())),
    }
    stored_twice = len(said["tied"].keys() & tensors.keys())
    wrong = {key: (said[key], value) for key, value in right.items() if said[key] != value}
    return None if not wrong or stored_twice else f"said, and right: {wrong}"
