"""Models of a few tensors, merged as the engine does it: passes over sites, in runs of rows where the rule takes them."""

from __future__ import annotations

import torch

from bmm_engine.anchors import DepthMap, Site, get_anchor


class Tensors:
    """A model for a rule's `reduce`. `rows`: how many a part has at most, where the rule takes parts; None for whole tensors."""

    def __init__(self, rule, base, experts, parameters, rows=None):
        self.rule, self.base, self.experts, self.rows = rule, base, experts, rows
        self.parameters = rule.parameters(parameters)
        self.depth = DepthMap(base)
        self.passes = 0

    def sites(self):
        self.passes += 1
        for name, whole in self.base.items():
            resolved = self.parameters.at(name, self.depth(name), len(self.experts))
            step = self.rows if self.rows and whole.dim() > 1 and self.rule.takes_parts(resolved) else None
            for start in range(0, len(whole), step) if step else [None]:
                rows = slice(None) if start is None else slice(start, start + step)
                base = whole if start is None else whole[rows]
                experts = [e[name] if start is None else e[name][rows] for e in self.experts]
                first = 0 if start is None else start * whole[0].numel()
                yield Site(name, base, experts, resolved, tuple(whole.shape), first)

    def map(self, function):
        return map(function, self.sites())

    def constant(self, parameter):
        return self.parameters.constant(parameter, list(self.base), self.depth, len(self.experts))

    def merge(self):
        state = self.rule.reduce(self) if self.rule.reduce else None
        self.passes, found = 0, {}
        for site in self.sites():
            found.setdefault(site.name, []).append(self.rule.apply(site, state))
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}


def merge(name, base, experts, rows=None, **parameters):
    """Name -> merged tensor."""
    return Tensors(get_anchor(name), base, experts, parameters, rows).merge()


def on_grid(shape, scale, generator, dtype=torch.float32):
    """Normal numbers that are multiples of 2^-20: sums and differences of a few of them are exact in float32."""
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale * 2**20).round().div(2**20).to(dtype)


def family(tasks=3, shape=(12, 17), seed=0, dtype=torch.float32):
    """(base, experts) whose task vectors are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    base = on_grid(shape, 0.25, generator)
    return base.to(dtype), [(base + on_grid(shape, 0.1, generator)).to(dtype) for _ in range(tasks)]


SHAPES = {"embed.weight": (11, 5), "layers.0.w": (12, 17), "layers.0.b": (7,), "layers.1.w": (9, 3, 2), "head": (4, 4)}


def model_family(tasks=3, seed=0, dtype=torch.float32):
    """(base, experts) as dictionaries; the tensors differ in how far they were moved."""
    base, experts = {}, [{} for _ in range(tasks)]
    for i, (name, shape) in enumerate(SHAPES.items()):
        base[name], found = family(tasks, shape, seed + 100 * i)
        for expert, tensor in zip(experts, found):
            expert[name] = (base[name] + (i + 1) * (tensor - base[name])).to(dtype)
        base[name] = base[name].to(dtype)
    return base, experts


def taus(base, experts):
    """The task vectors (T, ...) in float64."""
    return torch.stack([e.double() - base.double() for e in experts])


def flat_taus(base, experts):
    """The task vectors of a whole model (T, n) in float64."""
    return torch.stack([torch.cat([(e[k].double() - base[k].double()).reshape(-1) for k in base]) for e in experts])


def unflat(base, moved):
    """base + moved (n,), name by name, in float64."""
    pieces = moved.split([t.numel() for t in base.values()])
    return {name: base[name].double() + piece.view(base[name].shape) for (name, piece) in zip(base, pieces)}


def error(got, truth, base):
    """||got - truth|| / ||truth - base||, Frobenius, over tensors or dictionaries of them."""
    if isinstance(got, dict):
        assert list(got) == list(truth)
        got, truth, base = (torch.cat([t.double().reshape(-1) for t in x.values()]) for x in (got, truth, base))
    assert got.shape == truth.shape
    assert bool(got.isfinite().all())
    moved = float((truth.double() - base.double()).norm())
    wrong = float((got.double() - truth.double()).norm())
    return wrong / moved if moved else wrong
