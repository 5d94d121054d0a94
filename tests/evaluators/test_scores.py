from __future__ import annotations

import json
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from bmm_engine.errors import DataError
from bmm_engine.evaluators.scores import (
    Score,
    classification_score,
    expected_calibration_error,
    likelihood_score,
    mean_score,
    plain_score,
)


def predictions(seed, n=200, classes=4, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += sharpness * torch.rand(n, generator=generator)
    return logits.softmax(1), labels


@given(st.integers(0, 1000), st.integers(2, 6), st.integers(1, 60))
def test_metrics_are_scikit_learns(seed, classes, n):
    from sklearn.metrics import accuracy_score, f1_score

    probabilities, labels = predictions(seed, n, classes)
    guessed = probabilities.argmax(1)
    accuracy = classification_score(probabilities, labels, "accuracy", "t")
    f1 = classification_score(probabilities, labels, "macro_f1", "t")
    assert accuracy.value == pytest.approx(accuracy_score(labels, guessed))
    present = sorted(set(labels.tolist()) | set(guessed.tolist()))
    assert f1.value == pytest.approx(f1_score(labels, guessed, average="macro", labels=present, zero_division=0))
    assert accuracy.low <= accuracy.value <= accuracy.high
    assert accuracy.samples == n


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_intervals_are_those_of_drawing_samples_again(metric):
    probabilities, labels = predictions(3)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(800):
        rows = torch.from_numpy(rng.integers(len(labels), size=len(labels)))
        drawn.append(classification_score(probabilities[rows], labels[rows], metric, "t").value)
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = classification_score(probabilities, labels, metric, "t")
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_the_likelihood_of_texts():
    losses, tokens = torch.tensor([2.0, 6.0, 1.0], dtype=torch.float64), torch.tensor([2.0, 3.0, 5.0])
    found = likelihood_score(losses, tokens, "t")
    assert found.value == pytest.approx(math.exp(-0.9))
    assert found.details["perplexity"] == pytest.approx(1 / found.value)
    assert found.low < found.value < found.high
    with pytest.raises(DataError, match=r"'t'.*loss is not finite"):
        likelihood_score(torch.tensor([math.inf]), torch.tensor([1.0]), "t")
    with pytest.raises(DataError, match="no text has a token to predict"):
        likelihood_score(torch.tensor([0.0]), torch.tensor([0.0]), "t")


def test_calibration_error_of_what_is_known():
    # Confidence 0.8 in all, right in half of them.
    probabilities = torch.tensor([[0.8, 0.2]] * 10)
    labels = torch.tensor([0, 1] * 5)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.3, abs=1e-6)
    assert expected_calibration_error(torch.tensor([[1.0, 0.0]] * 4), torch.zeros(4, dtype=torch.long)) == 0
    # Two bins of different gaps: weighted by how many samples each has.
    mixed = torch.tensor([[0.9, 0.1]] * 3 + [[0.55, 0.45]])
    assert expected_calibration_error(mixed, torch.tensor([0, 0, 1, 0])) == pytest.approx(
        0.75 * (0.9 - 2 / 3) + 0.25 * 0.45, abs=1e-6
    )


def test_scores_survive_json():
    probabilities, labels = predictions(0)
    for score in (
        classification_score(probabilities, labels, "accuracy", "t"),
        plain_score(0.5, "function"),
        mean_score(np.array([0.0, 1.0, 1.0]), "acc"),
    ):
        again = Score.from_plain(json.loads(json.dumps(score.plain(), allow_nan=False)))
        assert again.plain() == score.plain()
    assert math.isnan(Score.from_plain(plain_score(0.5, "x").plain()).low)


def test_probabilities_that_are_not_finite():
    with pytest.raises(DataError, match=r"task 't'.*not finite"):
        classification_score(torch.tensor([[math.nan, 1.0]]), torch.tensor([0]), "accuracy", "t")
