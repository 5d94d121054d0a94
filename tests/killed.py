"""Merges that `tests.kills` kills: each is made once, in a folder, and then run in others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

SHAPES = {"a.weight": (6, 4), "a.bias": (6,), "b.weight": (4, 6)}


def models(count: int = 2) -> list[dict[str, torch.Tensor]]:
    """A base, and fine-tunes of it."""
    torch.manual_seed(0)
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return [base, *({n: t + 0.1 * torch.randn(t.shape) for n, t in base.items()} for _ in range(count))]


def plain(folder: Path) -> Callable[[Path], None]:
    """Into a place that nobody has used."""
    from bmm_engine import merge

    base, *experts = models()

    def run(place: Path) -> None:
        merge(base, experts, modules=["a", "b"], output=place / "out", max_shard_size=200, progress=False)

    return run


def overwriting(folder: Path) -> Callable[[Path], None]:
    """In the place of an earlier merge."""
    from bmm_engine import merge

    base, *experts = models()

    def run(place: Path) -> None:
        if not (place / "begun").exists():
            merge(base, experts[:1], modules=["a", "b"], output=place / "out", overwrite=True, progress=False)
            (place / "begun").touch()
        merge(base, experts, modules=["a", "b"], output=place / "out", overwrite=True, progress=False)

    return run


def continual(folder: Path) -> Callable[[Path], None]:
    """Experts join one after the other; then the merge is written."""
    from bmm_engine.merging.continual import ContinualMerge

    base, *experts = models()

    def run(place: Path) -> None:
        merge = ContinualMerge(base, state=place / "state", modules=["a", "b"])
        for expert in experts[merge.count :]:
            merge.add(expert)
        merge.write(place / "out")

    return run


def sequential(folder: Path) -> Callable[[Path], None]:
    """A walk over a network of two blocks, with hidden states in files."""
    from torch import nn

    from bmm_engine import merge_sequential

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    nets, batches = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        nets.append(Net())
        batches.append([torch.randn(20, 4)])
    base, *experts = nets

    def run(place: Path, **options: float) -> None:
        output = place / "out"
        merge_sequential(
            base, experts, batches[1:], blocks="layers", hidden_memory=0, output=output, progress=False, **options
        )

    return run


def correcting(folder: Path) -> Callable[[Path], None]:
    """A walk whose settings were changed after an earlier one was stopped before its first stage was finished."""
    from unittest import mock

    from bmm_engine.sequential.state import Sweep

    walk: Callable[..., None] = sequential(folder)

    class StoppedError(Exception):
        pass

    def run(place: Path) -> None:
        if not (place / "begun").exists():
            with mock.patch.object(Sweep, "publish", side_effect=StoppedError):
                try:
                    walk(place, alpha=0.7)
                except StoppedError:
                    (place / "begun").touch()
        walk(place)

    return run


def searching(folder: Path) -> Callable[[Path], None]:
    """A search of a recipe whose Grams are measured on the way, and the merge of what it finds."""
    import sys

    import yaml

    from bmm_engine.recipe.recipe import Recipe
    from bmm_engine.searching.run import search_recipe
    from tests.searching.judged import JUDGE
    from tests.tiny import family
    from tests.words import WORDS, tokenizer_in

    folder.mkdir(parents=True)
    family("bert", folder)
    for name in ("base", "expert-0", "expert-1"):
        tokenizer_in(folder / name)
    (folder / "judge.py").write_text(JUDGE)
    sys.path.insert(0, str(folder))
    (folder / "rows.txt").write_text("\n".join(" ".join(WORDS[i : i + 4]) for i in range(8)))
    experts = [{"model": f"expert-{t}", "calibration": "rows.txt"} for t in range(2)]
    evaluation = {"kind": "function", "function": "judge:score"}
    search = {"groups": "role", "optimizer": "TwoPointsDE", "trials": 3}
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {"base": "base", "experts": experts, "mode": "plain", "evaluation": evaluation, "search": search}
        )
    )

    def run(place: Path) -> None:
        search_recipe(Recipe.load(recipe), place / "out")

    return run
