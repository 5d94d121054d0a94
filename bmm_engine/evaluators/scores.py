"""Scores of a model on a task, with how sure they are: metrics, bootstrap intervals, calibration error."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from bmm_engine.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class Score:
    """`value`, higher is better, of `samples` samples (0: unknown), with the 95 % bootstrap percentile interval `low` to `high` (NaN where samples
    is 0). `details`: other figures of the same predictions."""

    value: float
    samples: int
    low: float
    high: float
    metric: str
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def standard_error(self) -> float:
        """Half the interval's width in units of the normal distribution's; 0 where nothing is known of it."""
        if not self.samples:
            return 0.0
        return (self.high - self.low) / 2 / NormalDist().inv_cdf((1 + LEVEL) / 2)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: a number that is not finite as text."""
        return {
            "value": _text(self.value),
            "samples": self.samples,
            "low": _text(self.low),
            "high": _text(self.high),
            "metric": self.metric,
            "details": {key: _text(value) for key, value in self.details.items()},
        }

    @classmethod
    def from_plain(cls, raw: Mapping[str, Any]) -> Score:
        return cls(
            float(raw["value"]),
            int(raw["samples"]),
            float(raw["low"]),
            float(raw["high"]),
            str(raw["metric"]),
            {key: float(value) for key, value in raw["details"].items()},
        )


def classification_score(probabilities: Tensor, labels: Tensor, metric: str, task: str) -> Score:
    """ "accuracy" or "macro_f1" of the most probable class, `probabilities` (n, classes) and `labels` (n,), with `nll` (mean negative
    log-likelihood) and `expected_calibration_error` among its details. Raises `DataError` for what is not finite."""
    import numpy as np
    import torch

    if not torch.isfinite(probabilities).all():
        raise DataError(f"task {task!r}: the model's probabilities are not finite; a merge at these values overflows.")
    classes = probabilities.shape[1]
    # Only the cells of the confusion matrix that occur: at most one for each sample, however many classes there are.
    guessed = probabilities.argmax(1)
    codes = labels * classes + guessed if metric == "macro_f1" else (labels != guessed).long()  # accuracy needs no more
    cells, counts = np.unique(codes.numpy(), return_counts=True)
    true, predicted = cells // classes, cells % classes
    # To draw the samples again with replacement is to draw the cells from a multinomial.
    drawn = np.random.default_rng(SEED).multinomial(len(labels), counts / len(labels), size=RESAMPLES)
    function = {"accuracy": _accuracy, "macro_f1": _macro_f1}[metric]
    value = float(function(counts[None], true, predicted)[0])
    low, high = _interval(function(drawn, true, predicted))
    chosen = probabilities[torch.arange(len(labels)), labels].clamp_min(torch.finfo(probabilities.dtype).tiny)
    details = {
        "nll": float(-chosen.log().mean()),
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
    }
    return Score(value, len(labels), low, high, metric, details)


def likelihood_score(losses: Tensor, tokens: Tensor, task: str) -> Score:
    """The mean likelihood of a token, `exp(-sum losses / sum tokens)` = 1 / perplexity, of texts with summed `losses` and numbers of `tokens` (n,)
    each. The interval is over texts. Raises `DataError` for what is not finite."""
    import numpy as np
    import torch

    if not torch.isfinite(losses).all():
        raise DataError(f"task {task!r}: the model's loss is not finite; a merge at these values overflows.")
    if not tokens.sum():
        raise DataError(f"task {task!r}: no text has a token to predict; texts need two tokens at least.")
    loss = float(losses.sum() / tokens.sum())
    drawn = np.random.default_rng(SEED).integers(len(losses), size=(RESAMPLES, len(losses)))
    numerators, denominators = (x.double().numpy()[drawn].sum(1) for x in (losses, tokens))
    low, high = _interval(np.exp(-numerators / np.maximum(denominators, 1)))
    perplexity = math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf
    return Score(math.exp(-loss), len(losses), low, high, "likelihood", {"loss": loss, "perplexity": perplexity})


def mean_score(values: np.ndarray, metric: str) -> Score:
    """The mean of one value for each sample (n,)."""
    import numpy as np

    drawn = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    return Score(float(values.mean()), len(values), *_interval(values[drawn].mean(1)), metric)


def plain_score(value: float, metric: str) -> Score:
    """A number of which no more is known."""
    return Score(float(value), 0, math.nan, math.nan, metric)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """`sum_b |B_b| / n |accuracy(B_b) - confidence(B_b)|` over equal bins of the confidence (Guo et al. 2017, arXiv 1706.04599)."""
    import torch

    confidence, predicted = probabilities.double().max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = (predicted == labels).double() - confidence
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, gap)
    return float(sums.abs().sum() / len(labels))


def _accuracy(counts: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Of `counts` (draws, cells), where a cell is a pair of classes `true`, `predicted` (cells,): (draws,)."""
    return counts[:, true == predicted].sum(1) / counts.sum(1)


def _macro_f1(counts: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The mean over the classes that occur in a draw, in truth or prediction, of 2 hits / (true + predicted)."""
    import numpy as np

    classes, index = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    true, predicted = index[: len(true)], index[len(true) :]
    hits = _sums(counts[:, true == predicted], true[true == predicted], len(classes))
    total = _sums(counts, true, len(classes)) + _sums(counts, predicted, len(classes))
    f1 = np.divide(2 * hits, total, out=np.zeros(hits.shape), where=total > 0)
    return f1.sum(1) / (total > 0).sum(1)


def _sums(counts: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """(draws, cells) -> (draws, size): the sum of the cells of each key."""
    import numpy as np

    found = np.zeros((len(counts), size), dtype=counts.dtype)
    if len(keys):
        order = np.argsort(keys, kind="stable")
        present, starts = np.unique(keys[order], return_index=True)
        found[:, present] = np.add.reduceat(counts[:, order], starts, axis=1)
    return found


def _interval(values: np.ndarray) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _text(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
