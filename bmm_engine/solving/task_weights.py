"""How much each task counts in one module: `beta_t` given, or by what its fine-tuning changed or its inputs measure there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bmm_engine.errors import ConfigError
from bmm_engine.parallel import one_thread
from bmm_engine.solving.frobenius import matrix_norm
from bmm_engine.solving.moments import BLOCK_ROWS, Moment


def choose_task_weights(
    given: str | Sequence[float] | None,
    energies: Iterable[float] | None,
    norms: Iterable[float],
    tasks: int,
    name: str,
) -> tuple[float, ...]:
    """Task weights by name or number; "energy" from the tasks' `energies` (None without a base), "frobenius" from the `norms` of
    their Grams; neither is asked for unless it is needed. Raises `ConfigError`."""
    if given is None or given == "none":
        return (1.0,) * tasks
    if given == "energy":
        if energies is None:
            raise ConfigError(f"{name}: task_weights='energy' needs `base`, to form the task vectors.")
        return energy_weights(list(energies))
    if given == "frobenius":
        return energy_weights(list(norms))
    if isinstance(given, str):
        raise ConfigError(
            f"{name}: task_weights must be None, 'none', 'energy', 'frobenius' or one number per task, not {given!r}."
        )
    weights = tuple(float(w) for w in given)
    check_task_weights(weights, tasks, name)
    return weights


def check_task_weights(betas: Sequence[float], tasks: int, name: str) -> None:
    """Raise `ConfigError` unless there is one finite weight >= 0 for each task, and not all are 0."""
    if len(betas) != tasks:
        raise ConfigError(f"{name}: {len(betas)} task weights for {tasks} experts; give one for each.")
    if not all(math.isfinite(b) and b >= 0 for b in betas) or not any(betas):
        raise ConfigError(f"{name}: task weights must be finite, >= 0 and not all 0; got {list(betas)}.")


def energy_weights(energies: Sequence[float]) -> tuple[float, ...]:
    """`beta_t = 1 / tr(U_t G_t U_t^T)` (or of norms), scaled to mean 1; a zero energy gets the largest finite weight of the others, or 1."""
    finite = [1.0 / e for e in energies if e > 0]
    top = max(finite, default=1.0)
    raw = [1.0 / e if e > 0 else top for e in energies]
    mean = sum(raw) / len(raw)
    return tuple(w / mean for w in raw)


def task_energy(moment: Moment, task_vector: Tensor) -> float:
    """`tr(U G U^T)`: how much fine-tuning changed this module's output, on the task's own inputs. `task_vector` (out, in)."""
    u = task_vector.double()
    total = 0.0
    for rows in u.split(BLOCK_ROWS):
        applied = moment.apply(rows)
        with one_thread():  # a sum of all elements is cut by threads
            total += float((applied * rows).sum())
    return total


def frobenius_norm(moment: Moment, device: torch.device | str = "cpu") -> float:
    """`||G||_F`, in float64."""
    gram = torch.zeros(moment.width, moment.width, dtype=torch.float64, device=device)
    moment.add_to(gram, 1.0)
    return matrix_norm(gram)
