"""Gram accumulation: the second moment of a module's inputs, added up chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.ops import _dispatch, _triton
from bmm_engine.ops._checks import check_device, check_dtype
from bmm_engine.ops._dlpack import accepts_dlpack
from bmm_engine.ops.gram import cpu, reference

IMPLEMENTATIONS = {"torch": reference, "cpu": cpu, "triton": _triton.Kernels("bmm_engine.ops.gram.triton_kernel")}

# What each dtype of rows is accumulated in, and so the dtype of G.
ACCUMULATE_DTYPES = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


@accepts_dlpack
def accumulate_gram(
    G: Tensor, X: Tensor, row_weights: Tensor | None = None, backend: str = "auto", *, precision: str = "ieee"
) -> Tensor:
    """Add the rows of X to a Gram, in place: `G += X^T diag(w) X`.

    Args:
        G: (in, in), float32, or float64 for float64 rows. Symmetric on entry, and exactly symmetric on return.
        X: (..., in), float32, bfloat16, float16 (accumulated in float32) or float64 (in float64). Any strides; never
            copied whole by the "cpu" and "triton" backends. On the device of G.
        row_weights: None for ones, else of shape X.shape[:-1], float or bool, finite and >= 0. A row of weight 0 is
            left out whatever it holds, NaN included. On a GPU prefer bool where it will do: floats are checked, which
            waits for the device.
        backend: "auto", "torch", "cpu" or "triton".
        precision: "ieee", "tf32x3" or "tf32": the least exactness accepted where a GPU multiplies float32 rows; "cpu"
            and "torch" are always "ieee". 16-bit rows are multiplied exactly whatever is given; a processor's own dot
            product of bfloat16 takes subnormal numbers (below 1.2e-38) as zero.

    Returns:
        G itself. No rows, or none of positive weight, leave it as it is.

    Raises:
        ShapeMismatchError: G is not (in, in), or row_weights is not X.shape[:-1].
        ConfigError: a dtype or device that does not fit, a weight that is negative or not finite, an unknown backend
            or precision.
        BackendError: the backend asked for cannot run this call.

    The bits depend on backend, machine and chunking, not on the thread count.
    """
    _dispatch.check_precision(precision)
    _check(G, X, row_weights)
    implementation = _select(G, X, row_weights, backend, precision)
    if X.numel() == 0:
        return G
    implementation.accumulate_gram(G, X, checked_weights(row_weights, G.dtype, implementation), precision)
    return G


@accepts_dlpack
def accumulate_grams(
    Gs: Sequence[Tensor],
    Xs: Sequence[Tensor],
    row_weights: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
    *,
    precision: str = "ieee",
) -> Sequence[Tensor]:
    """Add rows to the Grams of several modules of one width, in place: `Gs[i] += Xs[i]^T diag(w_i) Xs[i]`.

    The same as `accumulate_gram` for each, in one launch where the backend has one ("triton"): small Grams alone do not
    fill a GPU. The numbers of rows may differ; width, dtype and device may not.

    Args:
        Gs, Xs: as for `accumulate_gram`; no two Gs may share memory.
        row_weights: None, or one entry per module, each None or as for `accumulate_gram`.
        backend, precision: as for `accumulate_gram`.

    Returns:
        Gs itself.

    Raises:
        ShapeMismatchError, ConfigError, BackendError: as `accumulate_gram`, and for lists of different lengths, widths,
            dtypes or devices. Nothing is accumulated then.
    """
    _dispatch.check_precision(precision)
    weights = [None] * len(Gs) if row_weights is None else list(row_weights)
    if not len(Gs) == len(Xs) == len(weights):
        raise ShapeMismatchError(f"{len(Gs)} Grams, {len(Xs)} X and {len(weights)} row_weights; give one of each")
    for G, X, own in zip(Gs, Xs, weights, strict=True):
        _check(G, X, own)
        if X.shape[-1] != Xs[0].shape[-1]:
            raise ShapeMismatchError(f"one call takes one width, not {Xs[0].shape[-1]} and {X.shape[-1]}")
        if (X.dtype, X.device) != (Xs[0].dtype, Xs[0].device):
            raise ConfigError(
                f"one call takes one dtype on one device, not {Xs[0].dtype} on {Xs[0].device} and {X.dtype} on {X.device}"
            )
    if len({G.data_ptr() for G in Gs if G.numel()}) != sum(G.numel() > 0 for G in Gs):
        raise ConfigError("two of Gs share their memory; accumulate into one Gram with one call each")
    groups: dict[int, tuple[Any, list[tuple[Tensor, Tensor, Tensor | None]]]] = {}
    for G, X, own in zip(Gs, Xs, weights, strict=True):
        implementation = _select(G, X, own, backend, precision)
        if X.numel():
            own = checked_weights(own, G.dtype, implementation)
            groups.setdefault(id(implementation), (implementation, []))[1].append((G, X, own))
    for implementation, calls in groups.values():
        if len(calls) > 1 and hasattr(implementation, "accumulate_grams"):
            implementation.accumulate_grams(*map(list, zip(*calls, strict=True)), precision)
        else:
            for G, X, own in calls:
                implementation.accumulate_gram(G, X, own, precision)
    return Gs


def checked_weights(row_weights: Tensor | None, dtype: torch.dtype, implementation: Any) -> Tensor | None:
    """Row weights as the implementation takes them: in `dtype`, or bool where it has a path of its own for masks."""
    if row_weights is None:
        return None
    if row_weights.dtype == torch.bool:
        return row_weights if getattr(implementation, "TAKES_MASKS", False) else row_weights.to(dtype)
    row_weights = row_weights.to(dtype)
    valid = (row_weights >= 0) & row_weights.isfinite()
    if not bool(valid.all()):
        raise ConfigError(f"row_weights must be finite and >= 0, and hold {row_weights[~valid].flatten()[0].item()}")
    return row_weights


def check_row_weights(row_weights: Tensor | None, X: Tensor) -> None:
    """Raises what `accumulate_gram` documents of their shape, dtype and device."""
    if row_weights is None:
        return
    if row_weights.shape != X.shape[:-1]:
        raise ShapeMismatchError(
            f"row_weights must be {tuple(X.shape[:-1])}, one per row of X {tuple(X.shape)}, "
            f"and is {tuple(row_weights.shape)}"
        )
    if not (row_weights.is_floating_point() or row_weights.dtype == torch.bool):
        raise ConfigError(f"row_weights must be float or bool, not {row_weights.dtype}")
    check_device("row_weights", row_weights, "X", X)


def weighting(row_weights: Tensor | None) -> str:
    """Which of a kernel's variants these weights take."""
    if row_weights is None:
        return "plain"
    return "mask" if row_weights.dtype == torch.bool else "numbers"


def example_weights(kind: str, rows: int, generator: torch.Generator, device: torch.device) -> Tensor | None:
    """For self-checks: weights of this `weighting`."""
    numbers = torch.rand(rows, generator=generator).to(device)
    return {"plain": None, "mask": numbers < 0.7, "numbers": numbers}[kind]


def _select(G: Tensor, X: Tensor, row_weights: Tensor | None, backend: str, precision: str) -> Any:
    self_check = (_self_check, X.dtype, weighting(row_weights), precision)
    return _dispatch.select("gram", IMPLEMENTATIONS, backend, X.device, G, X, self_check=self_check)


def _check(G: Tensor, X: Tensor, row_weights: Tensor | None) -> None:
    if X.ndim == 0 or G.shape != (X.shape[-1], X.shape[-1]):
        raise ShapeMismatchError(f"G must be (in, in) for X (..., in); G is {tuple(G.shape)}, X is {tuple(X.shape)}")
    check_dtype("X", X.dtype, ACCUMULATE_DTYPES)
    if G.dtype != ACCUMULATE_DTYPES[X.dtype]:
        raise ConfigError(f"rows in {X.dtype} accumulate in {ACCUMULATE_DTYPES[X.dtype]}, but G is {G.dtype}")
    check_device("G", G, "X", X)
    check_row_weights(row_weights, X)


def _self_check(implementation: Any, device: torch.device, dtype: torch.dtype, kind: str, precision: str) -> str | None:
    """Beside torch in float64: several tiles and splits; several tiles; one ragged tile."""
    generator = torch.Generator().manual_seed(0)
    for rows, width in ((1100, 304), (100, 304), (77, 20)):
        X = torch.randn(rows, width, generator=generator).to(dtype).to(device)
        weights = example_weights(kind, rows, generator, device)
        G = torch.ones(width, width, dtype=ACCUMULATE_DTYPES[dtype], device=device)
        truth = G.to(torch.float64, copy=True)
        reference.accumulate_gram(truth, X, None if weights is None else weights.double(), "ieee")
        implementation.accumulate_gram(G, X, checked_weights(weights, G.dtype, implementation), precision)
        if reason := _dispatch.disagreement(G, truth, precision):
            return reason
        if not torch.equal(G, G.T):
            return "it leaves a Gram that is not symmetric"
    return None
