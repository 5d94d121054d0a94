"""Linear modules that a router gives their rows: other ones in an expert than in the merged network."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from bmm_engine import collect_grams, merge, merge_sequential
from bmm_engine.sequential.reading import Read
from bmm_engine.sequential.reads import ExpertReads
from tests.tiny import fine_tune


class Routed(nn.Module):
    """The last module of the block reads the rows that the first one's output chooses; none is called an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.chosen = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = self.gate(hidden)[..., 0] > 0
        given = torch.zeros_like(hidden)
        given[rows] = self.chosen(hidden[rows])
        return hidden + given


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Routed() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_what_is_routed_is_solved_on_each_experts_own_rows() -> None:
    torch.manual_seed(0)
    base = Model().double()
    experts = [fine_tune(base, seed, 0.2) for seed in (1, 2)]
    batches = [[torch.randn(4, 9, 8, dtype=torch.float64) for _ in range(3)] for _ in experts]
    lines: list[str] = []
    options = {"task_weights": None, "alpha": 0.1, "fit_bias": True}
    walked = merge_sequential(base, experts, batches, task_vector_samples=0, report=lines.append, **options)
    assert any("a router chooses its rows" in line for line in lines)
    grams = [collect_grams(expert, own) for expert, own in zip(experts, batches)]
    plain = merge(base, experts, grams=grams, **options)
    for index in range(3):  # the plain solve of those modules, whatever the blocks before them give
        name = f"blocks.{index}.chosen.weight"
        torch.testing.assert_close(walked.tensors[name], plain.tensors[name], rtol=1e-6, atol=1e-9)
        assert not torch.equal(walked.tensors[f"blocks.{2}.gate.weight"], plain.tensors[f"blocks.{2}.gate.weight"])
    same = merge_sequential(base, [experts[0], copy.deepcopy(experts[0])], batches)
    for name, tensor in experts[0].state_dict().items():
        torch.testing.assert_close(same.tensors[name], tensor)


def test_what_is_read_again_takes_the_place_of_what_was_read(tmp_path: Path) -> None:
    reads = ExpertReads(tmp_path)
    first, again, none, other = torch.ones(2, 3), torch.full((4, 3), 2.0), torch.empty(0, 3), torch.full((1, 3), 7.0)
    for name, batch, tensor in (("a", 0, first), ("a", 0, again), ("a", 1, none), ("b", 0, other), ("c", 0, none)):
        reads.put(name, 0, batch, [Read(tensor)])
    for name, batch, tensor in (("a", 0, again), ("a", 1, none), ("b", 0, other), ("c", 0, none)):
        (found,) = reads.get(name, 0, batch, torch.device("cpu"))
        assert torch.equal(found.x, tensor), name
