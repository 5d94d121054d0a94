"""The checkpoints that `bench.anchors` merges: a base and experts around it, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import formulas
from bench.llama import llama_shapes, make_checkpoint, parameter_count
from bench.report import note
from bmm_engine.checkpoint import Checkpoint

EXPERTS = 4


@dataclass(frozen=True)
class Shape:
    """Of a Llama with tied embeddings; the default one has 503 million parameters."""

    layers: int = 28
    hidden: int = 1024
    intermediate: int = 4096
    vocabulary: int = 32_000
    key_value: int = 1024
    heads: int = 16


class Models:
    """The base and the experts, made in a folder unless an earlier run has left them there."""

    def __init__(self, folder: Path, shape: Shape):
        self.shape = shape
        shapes = llama_shapes(shape.layers, shape.hidden, shape.intermediate, shape.vocabulary, shape.key_value)
        self.parameters = parameter_count(shapes)
        self.folder = folder / "-".join(["llama", *(str(value) for value in vars(shape).values())])
        self.paths = [self.folder / (f"expert-{seed}" if seed else "base") for seed in range(EXPERTS + 1)]
        for seed, path in enumerate(self.paths):
            if not path.exists():  # a checkpoint gets its name when it is complete
                note(f"making {path}")
                path.parent.mkdir(parents=True, exist_ok=True)
                make_checkpoint(path, shapes, shape.heads, seed, "5GB")
        self.checkpoints = [Checkpoint.open(path) for path in self.paths]
        self._limits: dict[float, list[float]] = {}

    @property
    def checked(self) -> tuple[str, ...]:
        """The largest tensor, a wide and a square one, and a vector."""
        last = f"model.layers.{self.shape.layers - 1}"
        return (
            "model.embed_tokens.weight",
            f"{last}.mlp.down_proj.weight",
            f"{last}.self_attn.q_proj.weight",
            f"{last}.input_layernorm.weight",
        )

    def load(self, name: str) -> list[Tensor]:
        """Base and experts in float64."""
        return [checkpoint.load(name).double() for checkpoint in self.checkpoints]

    def kept_from(self, density: float) -> list[float]:
        """Of each task, the least magnitude among the top `density` of the whole model; computed once."""
        if density not in self._limits:
            base, *experts = self.checkpoints
            flat = torch.empty(self.parameters)  # float32 holds a difference of two 16-bit weights of like size exactly
            self._limits[density] = []
            for expert in experts:
                done = 0
                for name in base.names():
                    magnitude = (expert.load(name).float() - base.load(name)).abs_().flatten()
                    flat[done : done + len(magnitude)] = magnitude
                    done += len(magnitude)
                self._limits[density].append(formulas.smallest_kept(flat, density))
        return self._limits[density]

    def read_all(self) -> None:
        """Puts every file into the page cache."""
        buffer = bytearray(2**24)
        for path in self.paths:
            for file in path.iterdir():
                with file.open("rb", buffering=0) as content:
                    while content.readinto(buffer):
                        pass
