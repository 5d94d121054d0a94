"""The diagonal Fisher information against explicit differentiation, sample by sample, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from bmm_engine.errors import (
    CheckpointError,
    CollectionError,
    ConfigError,
    EmptyCalibrationError,
    GramMismatchError,
    MissingTensorError,
    OutputWriteError,
)
from bmm_engine.statistics.fisher import FisherSet, collect_fisher
from tests.numerics import relative_error
from tests.tiny import make_base, make_batches


def samples_of(batches):
    for batch in batches:
        for i in range(len(next(iter(batch.values())))):
            yield {key: value[i : i + 1] for key, value in batch.items()}


def squared_gradients(model, scalar):
    model.zero_grad(set_to_none=True)
    scalar.backward(retain_graph=True)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.square() for n, p in model.named_parameters()}


def expected_oracle(model, batches):
    """`mean_x sum_y p(y | x) (d log p(y | x))^2`, each gradient taken by itself."""
    model = copy.deepcopy(model).double().eval()
    total, count = {n: torch.zeros_like(p) for n, p in model.named_parameters()}, 0
    for sample in samples_of(batches):
        sample = {k: v.double() if v.is_floating_point() else v for k, v in sample.items()}
        p = model(**sample).logits[0].softmax(-1)
        for y, share in enumerate(p.tolist()):
            for name, square in squared_gradients(model, p[y].log()).items():
                total[name] += share * square
        count += 1
    return {name: t / count for name, t in total.items()}


@pytest.mark.parametrize("architecture", ["bert", "vit"])
def test_the_expectation_over_labels_is_exact(architecture):
    model, batches = make_base(architecture), make_batches(architecture, 5, 2)
    fisher = collect_fisher(model, batches)
    assert fisher.examples == 8
    truth = expected_oracle(model, batches)
    assert set(fisher.names) == set(truth)
    wide = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    double = collect_fisher(copy.deepcopy(model).double(), wide)
    for name, own in truth.items():
        assert double.get(name).dtype == torch.float64
        if own.max() < 1e-20:  # a softmax does not see the keys' bias: rounding errors, or nothing
            assert fisher.get(name).max() < 1e-12, name
            continue
        assert relative_error(fisher.get(name), own) < 1e-5, name
        assert relative_error(double.get(name), own) < 1e-9, name


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("with_labels", [False, True])
def test_data_labels_of_a_language_model_are_the_next_tokens(architecture, with_labels):
    model, batches = make_base(architecture).double(), make_batches(architecture, 5, 2)
    total, count = {n: torch.zeros_like(p) for n, p in model.named_parameters()}, 0
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if with_labels:
            batch["labels"][:, :2] = -100  # a prompt: token 2 is the first to be predicted
            batch["labels"][3, :2] = batch["input_ids"][3, :2]
    for sample in samples_of(batches):
        kept = int((sample["labels"][:, 1:] != -100).sum())
        log_p = -model(**sample).loss * kept  # transformers' own shift and mean
        for name, square in squared_gradients(model, log_p).items():
            total[name] += square
        count += 1
    model.zero_grad(set_to_none=True)
    given = batches if with_labels else [{k: v for k, v in b.items() if k != "labels"} for b in batches]
    fisher = collect_fisher(model, given, labels="data")
    for name, own in total.items():  # transformers' loss is float32
        assert relative_error(fisher.get(name), own / count) < 1e-6, name


class Classifier(nn.Module):
    """Softmax regression: its Fisher information has the closed form `E p_c (1 - p_c) x_i^2`."""

    def __init__(self, classes=3):
        super().__init__()
        self.linear = nn.Linear(4, classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return self.linear(x) * self.scale


def test_sampled_labels_have_the_expectation_as_their_mean():
    model, x = Classifier().double(), torch.randn(20, 4, dtype=torch.float64)
    exact = collect_fisher(model, [x])
    p = model(x).softmax(-1)
    closed = torch.einsum("nc,ni->ci", p * (1 - p), x.square()).detach() / 20
    assert relative_error(exact.get("linear.weight"), closed) < 1e-12
    draws = torch.stack([collect_fisher(model, [x], labels="sampled", seed=s).get("linear.weight") for s in range(200)])
    error = (draws.mean(0) - closed).abs() / (draws.std(0) / math.sqrt(200))
    assert float(error.max()) < 4
    assert float(draws.std(0).min()) > 0


def test_sampled_sequences_count_every_real_position():
    model = make_base("gpt2").double()
    batches = make_batches("gpt2", 5, 1)
    exact = torch.zeros_like(model.transformer.h[1].mlp.c_proj.bias)
    name = "transformer.h.1.mlp.c_proj.bias"
    for sample in samples_of(batches):  # independent positions: the squares of their scores add up in expectation
        p = model(**sample).logits[0].softmax(-1)
        for row in p[: int(sample["attention_mask"].sum()) - 1]:
            for y, share in enumerate(row.tolist()):
                score = torch.autograd.grad(row[y].log(), model.get_parameter(name), retain_graph=True)[0]
                exact += share * score.square()
    draws = torch.stack([collect_fisher(model, batches, labels="sampled", seed=s).get(name) for s in range(100)])
    error = (draws.mean(0) - exact / 4) / (draws.std(0) / 10)
    assert float(error.abs().max()) < 4


def test_draws_depend_on_seed_and_sample_alone():
    model, x = Classifier(), torch.randn(12, 4)
    state = torch.random.get_rng_state()
    whole = collect_fisher(model, [x], labels="sampled", seed=3)
    parts = collect_fisher(model, [(x[:5],), (x[5:],)], labels="sampled", seed=3)
    assert torch.equal(whole.get("linear.weight"), parts.get("linear.weight"))
    other = collect_fisher(model, [x], labels="sampled", seed=4)
    assert not torch.equal(whole.get("linear.weight"), other.get("linear.weight"))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_regression_is_a_normal_of_variance_one():
    model, x = Classifier(1).double(), torch.randn(6, 4, dtype=torch.float64)
    closed = x.square().mean(0, keepdim=True)
    assert relative_error(collect_fisher(model, [x]).get("linear.weight"), closed) < 1e-12
    y = torch.randn(6, dtype=torch.float64)
    given = collect_fisher(model, [{"x": x, "labels": y}], labels="data").get("linear.weight")
    error = (y - model(x)[:, 0]).detach()
    assert relative_error(given, (error[:, None] * x).square().mean(0, keepdim=True)) < 1e-12


def test_the_first_examples_count_and_the_model_is_left_as_it_was():
    model, x = Classifier(), torch.randn(12, 4)
    model.linear.weight.requires_grad_(False)
    model.linear.weight.grad = torch.full((3, 4), 7.0)
    model.train()
    first = collect_fisher(model, [x[:5], x[5:]], examples=7)
    assert first.examples == 7
    assert torch.equal(first.get("linear.weight"), collect_fisher(model, [x[:7]]).get("linear.weight"))
    assert first.get("linear.weight").any()
    assert not model.linear.weight.requires_grad
    assert model.linear.bias.requires_grad
    assert torch.equal(model.linear.weight.grad, torch.full((3, 4), 7.0))
    assert model.linear.bias.grad is None
    assert model.training
    assert first.buffers == ("scale",)


def test_half_precision_is_squared_in_float32():
    model = Classifier().bfloat16()
    x = 1e-3 * torch.randn(30, 4).bfloat16()
    fisher = collect_fisher(model, [x]).get("linear.weight")
    assert fisher.dtype == torch.float32
    p = model(x).float().softmax(-1)
    closed = torch.einsum("nc,ni->ci", (p * (1 - p)).double(), x.double().square()) / 30
    assert relative_error(fisher, closed.detach()) < 0.02


def test_names_of_tied_weights_and_in_the_file(tmp_path):
    llama = collect_fisher(make_base("llama"), make_batches("llama", 5, 1), labels="data", examples=2)
    assert llama.resolve("lm_head.weight") == "model.embed_tokens.weight"
    assert llama.shape("lm_head.weight") == (60, 16)
    vit_model = make_base("vit")
    vit = collect_fisher(vit_model, make_batches("vit", 5, 1), examples=2)
    from bmm_engine.checkpoint import Checkpoint

    vit_model.save_pretrained(tmp_path)
    stored = Checkpoint.open(tmp_path)
    assert all(vit.resolve(name) is not None for name in stored.names())


def test_save_load_and_rows(tmp_path):
    model = make_base("bert")
    fisher = collect_fisher(model, make_batches("bert", 5, 1), calibration="some texts")
    loaded = FisherSet.load(fisher.save(tmp_path / "deep" / "f.safetensors"))
    assert (loaded.examples, loaded.labels, loaded.calibration) == (4, "expected", "some texts")
    assert sorted(loaded.names) == sorted(fisher.names)
    assert (loaded.aliases, loaded.buffers) == (fisher.aliases, fisher.buffers)
    name = "bert.embeddings.word_embeddings.weight"
    for own in (fisher, loaded):
        assert own.shape(name) == (60, 16)
        assert torch.equal(own.get(name), fisher.tensors[name])
        assert torch.equal(own.get(name, slice(10, 20)), fisher.tensors[name][10:20])
        own.check(name, model.get_parameter(name), "expert 0")
        with pytest.raises(GramMismatchError, match=r"another model than expert 1.*embeddings"):
            own.check(name, model.get_parameter(name) + 1, "expert 1")
        with pytest.raises(MissingTensorError, match="'nothing'"):
            own.get("nothing")
    again = FisherSet.load(loaded.save(tmp_path / "again.safetensors"))
    assert torch.equal(again.get(name), fisher.tensors[name])
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["f.safetensors"]


def test_bad_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such Fisher information file"):
        FisherSet.load(tmp_path / "none.safetensors")
    save_file({"fisher.w": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="not a Fisher information file"):
        FisherSet.load(tmp_path / "plain.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "new.safetensors", metadata={"bmm-fisher": '{"version": 9}'})
    with pytest.raises(CheckpointError, match="version 9"):
        FisherSet.load(tmp_path / "new.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no safetensors file")
    with pytest.raises(CheckpointError, match="not a readable"):
        FisherSet.load(tmp_path / "text.safetensors")
    with pytest.raises(OutputWriteError, match="Fisher information could not be written"):
        FisherSet({"w": torch.ones(2)}).save(tmp_path / "text.safetensors" / "f.safetensors")


def test_misuse():
    x = torch.randn(5, 4)
    with pytest.raises(ConfigError, match="'guess'"):
        collect_fisher(Classifier(), [x], labels="guess")
    with pytest.raises(EmptyCalibrationError):
        collect_fisher(Classifier(), [])
    with pytest.raises(ConfigError, match="needs `labels`"):
        collect_fisher(Classifier(), [x], labels="data")
    with pytest.raises(ConfigError, match=r"7 is none of the model's 3"):
        collect_fisher(Classifier(), [{"x": x, "labels": torch.full((5,), 7)}], labels="data")
    with pytest.raises(CollectionError, match="logits for sample 2 are NaN"):
        collect_fisher(Classifier(), [x[:2], x / 0])
    with pytest.raises(CollectionError, match=r"linear\.weight.*infinite"):
        collect_fisher(Classifier(1), [1e25 * x])
    with pytest.raises(ConfigError, match="'sampled' or 'data'"):
        collect_fisher(make_base("gpt2"), make_batches("gpt2", 1, 1))
    bare = transformers.BertModel(make_base("bert").config)
    with pytest.raises(CollectionError, match="needs logits"):
        collect_fisher(bare, make_batches("bert", 1, 1))
