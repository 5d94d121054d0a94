"""Which modules write to the residual stream, and what it holds there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bmm_engine import merge_sequential
from bmm_engine.errors import CollectionError, ConfigError, NonFiniteGramError, ShapeMismatchError
from bmm_engine.sequential.accumulators import DriftAccumulator, ProjectedAccumulator
from bmm_engine.sequential.reading import Reader, SharedInput, shared_inputs
from tests.sequential.test_merge import OTHERS, problem
from tests.tiny import CONFIGS, fine_tune, make_batches

WIDTH = 6


class Block(nn.Module):
    """`write(x, y, other)` is what becomes of the stream x, a module's output y and another module's output."""

    def __init__(self, write):
        super().__init__()
        self.out, self.other, self.write = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), write

    def forward(self, x):
        return self.write(x, self.out(x.tanh()), self.other)


GAMMA = torch.linspace(0.5, 1.5, WIDTH)
WRITES = {
    "x + y": (lambda x, y, other: x + y, 1),
    "y + x": (lambda x, y, other: nn.functional.dropout(y, 0.1, False) + x, 1),
    "in place": (lambda x, y, other: x.add_(y), 1),
    "a view": (lambda x, y, other: x + y.view(-1, WIDTH).view(x.shape), 1),
    "a row for all": (lambda x, y, other: y + GAMMA, 1),
    "two in a row": (lambda x, y, other: (y + x.tanh()) + x, 2),
    "scaled": (lambda x, y, other: x + GAMMA * y, 0),
    "scaled in place": (lambda x, y, other: x + y.mul_(GAMMA), 0),
    "subtracted": (lambda x, y, other: x - y, 0),
    "normalised": (lambda x, y, other: x + nn.functional.layer_norm(y, (WIDTH,)), 0),
    "read first": (lambda x, y, other: y.sum() * 0 + (y + x), 0),
    "another module first": (lambda x, y, other: other(x) + y, 0),
    "turned": (lambda x, y, other: x.mT + y.mT, 0),
}


@pytest.mark.parametrize("name", WRITES)
def test_it_is_what_the_output_is_added_to_and_nothing_else(name):
    torch.manual_seed(0)
    write, additions = WRITES[name]
    block, x = Block(write), torch.randn(2, WIDTH, WIDTH)

    @torch.inference_mode()
    def run(batch):
        return block(x.clone())

    found = {s.leader: s for s in shared_inputs({"out": block.out, "other": block.other}, (), run)}
    assert found["out"].additions == additions
    with Reader(found["out"], block.out, WIDTH).listening() as reader:
        reads = [*reader.read(run, 0), *reader.read_through(run, 0)[0]]
    assert "forward" not in block.out.__dict__
    for read in reads:
        assert torch.equal(read.x, x.tanh())
        if additions:
            torch.testing.assert_close(read.stream, run(0) - block.out(x.tanh()), rtol=0, atol=1e-6)
        else:
            assert read.stream is None
    assert len(reads) == 2


def test_what_another_module_gives_is_no_part_of_the_stream():
    block, x = Block(lambda x, y, other: (x + y) + other(x)), torch.randn(2, 3, WIDTH)
    run = torch.inference_mode()(lambda batch: block(x))
    found = {s.leader: s for s in shared_inputs({"out": block.out, "other": block.other}, (), run)}
    assert found["out"].additions == 1
    with Reader(found["out"], block.out, WIDTH).listening() as reader:
        for read in (*reader.read(run, 0), *reader.read_through(run, 0)[0]):
            assert torch.equal(read.stream, x)


def test_a_stream_that_is_gone_in_another_batch_is_an_error():
    block = Block(lambda x, y, other: x + y if x.shape[0] == 2 else x * y)
    run = torch.inference_mode()(lambda batch: block(torch.ones(2 + batch, WIDTH)))
    with Reader(SharedInput(("out",), 1, 1), block.out, WIDTH).listening() as reader:
        assert reader.read(run, 0)[0].stream is not None
        for _ in range(2):  # nothing is left over from the first failure
            with pytest.raises(CollectionError, match=r"not in batch 1.*target: module"):
                reader.read(run, 1)
        assert reader.read(run, 0)[0].stream is not None


WRITERS = {
    "bert": {"attention.output.dense", "output.dense"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "vit": {"attention.o_proj", "mlp.fc2"},
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "t5": {"SelfAttention.o", "DenseReluDense.wo"},
    "gemma2": set(),  # normalises what is added
    "gpt_neox": {"mlp.dense_4h_to_h"},  # attention and MLP are added at the end: the MLP makes up for both
    "qwen2": {"self_attn.o_proj", "mlp.down_proj"},
    "distilbert": {"attention.out_lin", "ffn.lin2"},
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_architecture_is_aimed_at_its_stream(name, tmp_path):
    if name in CONFIGS:
        base, experts, batches = problem(name)
        given = base, experts
    else:
        torch.manual_seed(0)
        cls, config = OTHERS[name]()
        base = cls(config).eval()
        base.save_pretrained(tmp_path / "base")
        experts = [fine_tune(base, 2 + t, 0.1) for t in range(2)]
        batches = [make_batches("llama", 20 + t, 4) for t in range(2)]
        given = tmp_path / "base", [e.state_dict() for e in experts]
    said = []
    result = merge_sequential(*given, batches, report=said.append)
    assert any("writes straight to a residual stream" in line for line in said) == (not WRITERS[name])
    found = {n for record in result.inputs if record.stream for n in record.modules}
    assert len(found) == 2 * len(WRITERS[name])  # blocks
    assert all(n.endswith(tuple(WRITERS[name])) for n in found)
    assert all(len(r.modules) == 1 for r in result.inputs if r.stream)


def test_the_drift_of_the_stream_is_refused_where_it_cannot_be_counted_in():
    rows, weight = torch.randn(5, WIDTH), torch.randn(3, WIDTH)
    with pytest.raises(ConfigError, match="only a ProjectedAccumulator"):
        DriftAccumulator(WIDTH).update(rows, rows, torch.zeros(5, 3))
    projected = ProjectedAccumulator(weight, weight)
    for shape in ((5, WIDTH), (4, 3)):
        with pytest.raises(ShapeMismatchError, match="needs 5 rows of width 3"):
            projected.update(rows, rows, torch.zeros(shape))
    with pytest.raises(NonFiniteGramError, match="1 of 5 rows of the residual stream"):
        projected.update(rows, rows, torch.full((5, 3), torch.nan).triu(-4).tril(-4))
    assert projected.rows == 0
