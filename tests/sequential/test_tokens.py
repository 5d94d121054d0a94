"""Which row is the first, and which the last token of a sample."""

from __future__ import annotations

import pytest
import torch

from bmm_engine import merge_sequential
from bmm_engine.errors import CollectionError, ConfigError
from bmm_engine.models.calling import Padding
from bmm_engine.models.roles import gives_keys
from bmm_engine.sequential.accumulators import DriftAccumulator, ProjectedAccumulator
from bmm_engine.sequential.reading import SharedInput
from bmm_engine.sequential.tokens import TokenRows, apart
from tests.numerics import relative_error
from tests.sequential.test_merge import Mixer, fine_tune

# Padded on the right, on the left, not at all.
MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
FIRST = [1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0]
LAST = [0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(("kind", "chosen"), [("cls", FIRST), ("last", LAST)])
def test_it_is_found_under_any_padding_and_in_any_layout(kind, chosen):
    tokens, padding = TokenRows(kind, 0.25), Padding((MASK,))
    truth = torch.tensor(chosen).double() * 0.75 + 0.25
    assert torch.equal(tokens.weights("m", torch.zeros(3, 4, 5), padding, 3), truth)
    assert torch.equal(tokens.weights("m", torch.zeros(12, 5), padding, 3), truth)
    assert torch.equal(tokens.weights("m", torch.zeros(4, 3, 5), padding, 3), truth.view(3, 4).mT.reshape(-1))
    shorter = Padding((MASK,), of_features=lambda length, mask: mask[:, :length])
    found = tokens.weights("m", torch.zeros(3, 3, 5), shorter, 3).view(3, 3)
    ends = {"cls": [0, 2, 0], "last": [2, 2, 2]}[kind]
    assert [row.argmax().item() for row in found] == ends
    assert float(found.sum()) == 3 + 6 * 0.25
    # One row for each sample.
    assert torch.equal(tokens.weights("m", torch.zeros(3, 5), padding, 3), torch.ones(3).double())
    assert torch.equal(tokens.weights("m", torch.zeros(3, 5), None, 3), torch.ones(3).double())
    whole = tokens.weights("m", torch.zeros(2, 3, 5), None, 2)
    at = 0 if kind == "cls" else 2
    assert whole.tolist() == [1.0 if i % 3 == at else 0.25 for i in range(6)]


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 5), (6, 3, 5)])
def test_where_it_cannot_be_told_is_an_error(shape):
    with pytest.raises(CollectionError, match=r"m: .*2 samples without a padding mask.*token_rows: all"):
        TokenRows("cls", 0.01).weights("m", torch.zeros(shape), None, 2)


def test_keys_and_values_are_solved_apart_from_queries():
    found = [SharedInput(("a.q_proj", "a.k_proj", "a.v_proj"), 1), SharedInput(("mlp.gate_proj", "mlp.up_proj"), 2)]
    parts = apart(found)
    assert [part.modules for part in parts] == [
        ("a.q_proj",),
        ("a.k_proj", "a.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ]
    assert [part.calls for part in parts] == [1, 1, 2]
    assert gives_keys("h.0.attn.c_attn")
    assert gives_keys("attention.query_key_value")
    assert not gives_keys("attention.query")
    assert not gives_keys("attn.c_proj")


@pytest.mark.parametrize("whole", [False, True])
def test_weighed_moments_are_those_of_rows_that_are_there_so_often(whole):
    g = torch.Generator().manual_seed(0)
    own, merged = (torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(2))
    stream = torch.randn(6, 3, generator=g, dtype=torch.float64)
    expert, base = (torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    times = torch.tensor([1, 3, 0, 2, 1, 5])
    options = {"with_bias": True, "whole_change": whole, "dtype": torch.float64}
    pairs = [
        [DriftAccumulator(4, dtype=torch.float64) for _ in range(2)],
        [ProjectedAccumulator(expert, expert - base, **options) for _ in range(2)],
    ]
    for (weighed, repeated), streams in zip(pairs, ((), (stream,))):
        weighed.update(own, merged, *streams, weights=times)
        repeated.update(*(x.repeat_interleave(times, 0) for x in (own, merged, *streams)))
        a, b = (m.moments(with_bias=True) for m in (weighed, repeated))
        assert a.rows == b.rows == 12
        for name, truth in vars(b).items():
            if isinstance(truth, torch.Tensor):
                assert relative_error(getattr(a, name), truth) < 1e-12, name


def test_a_model_without_blocks_has_no_last_one():
    base = Mixer(4)
    experts = [fine_tune(base, seed) for seed in (1, 2)]
    batches = [[torch.randn(5, 7, 4)] for _ in range(2)]
    with pytest.raises(ConfigError, match=r"token_rows = 'cls' needs blocks, and the model is walked as a whole"):
        merge_sequential(base, experts, batches, mask=None, token_rows="cls")
