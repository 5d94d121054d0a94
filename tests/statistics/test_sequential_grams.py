"""Sequential collection against a plain walk in float64: whole models, one block exchanged at a time, general solves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bmm_engine.anchors.regmean_plusplus import regmean_plusplus
from bmm_engine.errors import (
    CollectionError,
    ConfigError,
    EmptyCalibrationError,
    GramMismatchError,
    MissingTensorError,
    ShapeMismatchError,
)
from bmm_engine.models.blocks import BlockWalk, find_blocks
from bmm_engine.statistics.collect import collect_grams
from bmm_engine.statistics.grams import GramSet
from bmm_engine.statistics.sequential_grams import check_sequential, collect_sequential
from tests.numerics import relative_error
from tests.reference_merge import linear_names, module_inputs
from tests.tiny import fine_tune, make_base, make_batches

BLOCKS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "vit": "vit.layers", "llama": "model.layers"}
ARCHITECTURES = list(BLOCKS)


def double(batches):
    return [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]


def problem(architecture, count=3):
    base = make_base(architecture).double()
    experts = [fine_tune(base, seed + 1) for seed in range(2)]
    return base, experts, [double(make_batches(architecture, 10 + t, count)) for t in range(2)]


def block_path(model, architecture):
    """transformers 4 and 5 name a ViT's blocks differently."""
    return BLOCKS[architecture] if architecture != "vit" else find_blocks(model)


def segments(base, path):
    """The blocks from input to output, and what stands after them: prefixes of tensor names, and the linear modules."""
    names = list(linear_names(base))
    for i in range(len(base.get_submodule(path))):
        inside = [n for n in names if n.startswith(f"{path}.{i}.")]
        yield (f"{path}.{i}.",), inside
    after = [n for n in names if not n.startswith(f"{path}.")]
    yield tuple(f"{n}." for n in after), after


def oracle(base, experts, batches, path, shrink, weight):
    """Grams and merged model of RegMean++ by its definition: at each block, the merged model with that block taken from expert t."""
    merged = copy.deepcopy(base)
    merged.load_state_dict({k: sum(e.state_dict()[k] for e in experts) / len(experts) for k in base.state_dict()})
    grams = [{} for _ in experts]
    for prefixes, names in segments(base, path):
        for t, expert in enumerate(experts):
            hybrid = copy.deepcopy(merged)
            own = {k: v for k, v in expert.state_dict().items() if k.startswith(prefixes)}  # norms and biases too
            hybrid.load_state_dict(own, strict=False)
            rows = module_inputs(hybrid, batches[t])
            grams[t] |= {name: rows[name].T @ rows[name] / rows[name].shape[0] for name in names}
        for name in names:
            transposed = linear_names(base)[name]
            a = right = 0
            for t, expert in enumerate(experts):
                g = grams[t][name]
                g = weight[t] * (shrink * g + (1 - shrink) * torch.diag(g.diagonal()))
                w = expert.get_submodule(name).weight.detach()
                a, right = a + g, right + (w.T if transposed else w) @ g
            solved = torch.linalg.solve(a, right, left=False)
            with torch.no_grad():
                merged.get_submodule(name).weight.copy_(solved.T if transposed else solved)
    return grams, merged


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [{}, {"shrink": 0.4, "weight": [1.0, 3.0]}], ids=["defaults", "weighted"])
def test_grams_and_weights_are_those_of_the_plain_walk(architecture, options):
    base, experts, batches = problem(architecture)
    path = block_path(base, architecture)
    assert find_blocks(base) == path
    sets = collect_sequential(base, experts, batches, **options)
    grams, merged = oracle(base, experts, batches, path, options.get("shrink", 0.95), options.get("weight", [1.0, 1.0]))
    assert set(sets[0].modules) == set(linear_names(base))
    for name, transposed in linear_names(base).items():
        for t, own in enumerate(sets):
            assert relative_error(own.get(name).mean(), grams[t][name]) < 1e-9, (t, name)
        weights = [m.get_submodule(name).weight.detach() for m in (base, *experts, merged)]
        weights = [w.T.contiguous() if transposed else w for w in weights]
        solved = regmean_plusplus(weights[0], weights[1:3], grams=[s.get(name).mean() for s in sets], **options)
        assert relative_error(solved, weights[3]) < 1e-7, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_walks_too_and_models_are_left_as_they_were(architecture):
    base, experts, batches = problem(architecture)
    truth = collect_sequential(base, experts, batches)
    models = [m.float() for m in (base, *experts)]
    for model in models:
        model.train()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    inputs = [make_batches(architecture, 10 + t) for t in range(2)]
    for own, wide in zip(collect_sequential(base, experts, inputs), truth):
        for name in own.modules:
            assert own.rows(name) == wide.rows(name)
            assert relative_error(own.get(name).total, wide.get(name).total) < 1e-4, name
    for model, state in zip(models, before):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(m.training for m in model.modules())
        assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
        assert getattr(model.config, "use_cache", True) is not False


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_experts_give_plain_grams_everywhere(architecture):
    base, (expert, _), batches = problem(architecture)
    sets = collect_sequential(base, [expert, copy.deepcopy(expert)], batches)
    for own, batch in zip(sets, batches):
        plain = collect_grams(expert, batch)
        assert own.modules == plain.modules
        assert own.fingerprints == plain.fingerprints
        assert own.aliases == plain.aliases
        assert own.transposed == plain.transposed
        for name in own.modules:
            assert own.rows(name) == plain.rows(name)
            assert relative_error(own.get(name).total, plain.get(name).total) < 1e-9, name
            assert relative_error(own.get(name).row_sum, plain.get(name).row_sum) < 1e-9, name


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_the_first_block_reads_the_experts_own_inputs_where_embeddings_are_shared(architecture):
    base, experts, batches = problem(architecture)
    path = block_path(base, architecture)
    for expert in experts:
        own = {k: v for k, v in base.state_dict().items() if not k.startswith(path)}
        expert.load_state_dict(own, strict=False)
    sets = collect_sequential(base, experts, batches)
    for t, own in enumerate(sets):
        plain = collect_grams(experts[t], batches[t])
        differ = set()
        for name in own.modules:
            same = relative_error(own.get(name).total, plain.get(name).total) < 1e-9
            if name.startswith(f"{path}.0."):
                assert same, name
            elif not same:
                differ.add(name)
        assert any(name.startswith(f"{path}.1.") for name in differ)


class Chain(nn.Module):
    """A projection before the blocks, blocks that return tuples and take their input by name, a projection after them."""

    def __init__(self, width=6, blocks=3):
        super().__init__()
        self.before = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width))
        self.layers = nn.ModuleList([Link(width) for _ in range(blocks)])
        self.after = nn.Linear(width, 2)

    def forward(self, x):
        hidden, shift = self.before(x), x.mean()
        for i, layer in enumerate(self.layers):
            hidden, _ = layer(shift=shift * i, hidden_states=hidden)
        return self.after(hidden)


class Link(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states, shift):
        hidden_states += self.linear(hidden_states).tanh() + shift  # in place, and with an argument of the block's own
        return hidden_states, None


def test_before_and_after_the_blocks_and_blocks_of_any_form():
    torch.manual_seed(0)
    base = Chain().double()
    experts = [fine_tune(base, seed, 0.3) for seed in (1, 2)]
    batches = [[torch.randn(30, 4, dtype=torch.float64) for _ in range(2)] for _ in range(2)]
    sets = collect_sequential(base, experts, batches, shrink=1.0)
    mean = copy.deepcopy(base)
    mean.load_state_dict({k: sum(e.state_dict()[k] for e in experts) / 2 for k in base.state_dict()})
    for t in range(2):  # before the blocks: as each expert reads it
        plain = collect_grams(experts[t], batches[t], modules=["before.*"])
        for name in ("before.0", "before.2"):
            assert relative_error(sets[t].get(name).total, plain.get(name).total) < 1e-12

    def solve(name):
        grams = [s.get(name).mean() for s in sets]
        right = sum(e.get_submodule(name).weight @ g for e, g in zip(experts, grams))
        with torch.no_grad():
            mean.get_submodule(name).weight.copy_(torch.linalg.solve(sum(grams), right, left=False))

    solve("before.0")
    solve("before.2")
    for names in (["layers.0.linear"], ["layers.1.linear"], ["layers.2.linear"], ["after"]):
        for t in range(2):
            hybrid = copy.deepcopy(mean)
            hybrid.get_submodule(names[0]).load_state_dict(experts[t].get_submodule(names[0]).state_dict())
            truth = collect_grams(hybrid, batches[t], modules=names)
            assert relative_error(sets[t].get(names[0]).total, truth.get(names[0]).total) < 1e-9, names
        solve(names[0])


def test_a_walk_with_the_models_own_blocks_is_the_model():
    model, batches = make_base("llama").double(), make_batches("llama", 3, 2)
    model.config.use_cache = False
    walk = BlockWalk(model, "model.layers", batches, "attention_mask")
    assert len(walk) == 2
    for index, block in enumerate(model.model.layers):
        for batch in range(len(walk)):
            again = walk.call(batch, index, block)
            output = walk.call(batch, index, block)
            assert torch.equal(again, output)
            walk.advance(batch, output)
    seen = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    walk.finish(1, model)
    with torch.inference_mode():
        model(**batches[1])
    handle.remove()
    assert torch.equal(seen[0], seen[1])
    model.config.use_cache = True
    with pytest.raises(CollectionError, match=r"model\.layers\.0: .*DynamicCache"):
        BlockWalk(model, "model.layers", batches, None)


def test_bare_encoders_and_models_with_heads_go_together():
    base, experts, batches = problem("bert")
    sets = collect_sequential(base, experts, batches)
    bare = collect_sequential(base.bert, experts, batches)
    for own, other in zip(sets, bare):
        assert own.modules == other.modules
        assert all(torch.equal(own.get(n).total, other.get(n).total) for n in own.modules)
    heads = [copy.deepcopy(e) for e in experts]
    heads[0].classifier = nn.Linear(16, 7).double()
    again = collect_sequential(base, heads, batches)
    assert torch.equal(sets[0].get("bert.pooler.dense").total, again[0].get("bert.pooler.dense").total)


def test_kind_and_settings_are_kept_and_checked(tmp_path):
    base, experts, batches = problem("bert", 1)
    sets = collect_sequential(base, experts, batches, shrink=0.5, calibration=["one", "two"])
    loaded = [GramSet.load(s.save(tmp_path / f"{t}.safetensors")) for t, s in enumerate(sets)]
    assert [s.kind for s in loaded] == ["sequential"] * 2
    assert [s.calibration for s in loaded] == ["one", "two"]
    assert loaded[0].settings == sets[0].settings
    check_sequential(loaded, "regmean_plusplus", {"shrink": 0.5})
    with pytest.raises(GramMismatchError, match=r"0\.safetensors.*'shrink': 0\.5.*'shrink': 0\.95"):
        check_sequential(loaded, "regmean_plusplus", {})
    with pytest.raises(GramMismatchError, match="another order"):
        check_sequential(loaded[::-1], "regmean_plusplus", {"shrink": 0.5})
    with pytest.raises(GramMismatchError, match="beside other experts"):
        check_sequential(loaded[:1], "regmean_plusplus", {"shrink": 0.5})
    plain = collect_grams(experts[0], batches[0])
    assert plain.kind == "expert"
    with pytest.raises(GramMismatchError, match="of the kind 'expert'"):
        check_sequential([plain, loaded[1]], "regmean_plusplus", {"shrink": 0.5})
    with pytest.raises(GramMismatchError, match="in one walk"):
        loaded[0].merge(sets[0])


def test_misuse():
    base, experts, batches = problem("bert", 1)
    with pytest.raises(ConfigError, match="does not merge linear modules by Grams"):
        collect_sequential(base, experts, batches, anchor="average")
    with pytest.raises(ConfigError, match="2 experts, 1 calibration sets"):
        collect_sequential(base, experts, batches[:1])
    with pytest.raises(ConfigError, match="did you mean 'shrink'"):
        collect_sequential(base, experts, batches, shrnk=1.0)
    with pytest.raises(EmptyCalibrationError, match="expert 1"):
        collect_sequential(base, experts, [batches[0], []])
    with pytest.raises(ConfigError, match=r"that matches 'nowhere', but has none"):
        collect_sequential(base, experts, batches, blocks="nowhere")
    twins = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)] * 2), "b": nn.ModuleList([nn.Linear(2, 2)] * 2)})
    with pytest.raises(ConfigError, match="2 of length 2: a, b"):
        find_blocks(twins)
    assert find_blocks(twins, "b") == "b"
    with pytest.raises(MissingTensorError, match=r"expert 0: has no module"):
        collect_sequential(base, [make_base("gpt2").double()], batches[:1])
    wider = copy.deepcopy(experts[0])
    wider.resize_token_embeddings(70)
    with pytest.raises(ShapeMismatchError, match=r"word_embeddings.*\(60, 16\).*\(70, 16\)"):
        collect_sequential(base, [wider], batches[:1])
