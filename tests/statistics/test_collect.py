from __future__ import annotations

import pytest
import torch
from torch import nn

from bmm_engine.errors import CollectionError, ConfigError, EmptyCalibrationError, NonFiniteGramError
from bmm_engine.statistics.collect import collect_grams
from tests.tiny import SHARED, make_base, make_batches


def inputs_of(model, batches, mask_key="attention_mask"):
    """Truth: every linear module's rows in float64, padding dropped, one at a time and with no sharing."""
    rows = {}
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            continue

        def keep(_, args, name=name):
            rows.setdefault(name, []).append(args[0].detach())

        handle = module.register_forward_pre_hook(keep)
        with torch.no_grad():
            for batch in batches:
                start = len(rows.get(name, []))
                model(**batch)
                mask = batch.get(mask_key)
                for i in range(start, len(rows[name])):
                    x = rows[name][i]
                    rows[name][i] = (
                        x[mask.bool()] if mask is not None and x.dim() == 3 else x.reshape(-1, x.shape[-1])
                    ).double()
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "vit", "llama"])
def test_grams_of_a_transformer(architecture):
    model, batches = make_base(architecture), make_batches(architecture, 5)
    grams = collect_grams(model, batches)
    truth = inputs_of(model, batches)
    heads = {"bert": {"classifier"}, "gpt2": {"lm_head"}, "vit": {"classifier"}, "llama": {"lm_head"}}[architecture]
    assert set(grams.modules) == set(truth) - heads
    for name in grams.modules:
        gram, rows = grams.get(name), truth[name]
        assert gram.rows == rows.shape[0], name
        torch.testing.assert_close(gram.total.double(), rows.T @ rows, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(gram.row_sum.double(), rows.sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "vit", "llama"])
def test_modules_that_read_the_same_tensor_share(architecture):
    model = make_base(architecture)
    grams = collect_grams(model, make_batches(architecture, 5))
    groups: dict[str, set[str]] = {}
    for module, group in grams.modules.items():
        groups.setdefault(group, set()).add(module)
    found = [{name.rsplit(".", 1)[-1] for name in group} for group in groups.values() if len(group) > 1]
    assert len(found) == 2 * len(SHARED[architecture])  # two layers
    assert all(group in SHARED[architecture] for group in found)
    assert len(grams.grams) == len(groups)


def test_vit_knows_its_names_in_the_file():
    grams = collect_grams(make_base("vit"), make_batches("vit", 5))
    live = grams.resolve("vit.encoder.layer.0.attention.attention.query")
    assert live in grams.modules
    assert (
        live != "vit.encoder.layer.0.attention.attention.query" or not grams.aliases
    )  # transformers 4 has one name for both


def test_batches_as_tensors_and_tuples_and_any_module():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(10, 4)
    for batches in ([x[:3], x[3:]], [(x,)]):
        grams = collect_grams(model, batches)
        torch.testing.assert_close(grams.get("0").total, x.T @ x)
        hidden = model[0](x).relu().detach()
        torch.testing.assert_close(grams.get("2").total, hidden.T @ hidden)


def test_the_model_is_left_untouched_also_after_an_error():
    model = make_base("bert")
    model.train()
    model.bert.encoder.layer[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    collect_grams(model, make_batches("bert", 1))

    def failing():
        yield make_batches("bert", 1)[0]
        raise RuntimeError("the data loader broke")

    with pytest.raises(RuntimeError, match="loader broke"):
        collect_grams(model, failing())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(p.grad is not None for p in model.parameters())


def test_modules_by_pattern():
    model, batches = make_base("bert"), make_batches("bert", 1)
    assert set(collect_grams(model, batches, modules=["*query", "classifier"]).modules) == {
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "classifier",
    }
    with pytest.raises(ConfigError, match=r"'\*qurey'"):
        collect_grams(model, batches, modules=["*qurey"])


def test_mask_by_function_and_off():
    model, batches = make_base("llama"), make_batches("llama", 1)
    name = "model.layers.0.self_attn.q_proj"
    masked = collect_grams(model, batches).rows(name)
    assert masked == 3 * (9 + 5 + 9 + 2)
    assert collect_grams(model, batches, mask=None).rows(name) == 3 * 36
    first = collect_grams(model, batches, mask=lambda b: (torch.arange(9) == 0).expand(4, 9))
    assert first.rows(name) == 3 * 4


def test_padding_with_nan_does_not_poison():
    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, attention_mask):
            return self.linear(x)

    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    x[0, 2:] = float("nan")
    gram = collect_grams(Embed(), [{"x": x, "attention_mask": mask}]).get("linear")
    assert gram.rows == 6
    assert torch.isfinite(gram.total).all()
    x[1, 0] = float("nan")
    with pytest.raises(NonFiniteGramError, match="linear: 1 of 6"):
        collect_grams(Embed(), [{"x": x, "attention_mask": mask}])


class Twice(nn.Module):
    """`b` reads what `a` read, or, by a switch, something else; or `a`'s input is changed before `b` reads it."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), how, 0

    def forward(self, x):
        self.calls += 1
        first = self.a(x)
        if self.how == "later" and self.calls > 1:
            x = x + 1
        if self.how == "in place":
            x.add_(1)
        return first + self.b(x)


@pytest.mark.parametrize(
    ("how", "words"), [("later", "b read the same input as a at first, but not now"), ("in place", "changed in place")]
)
def test_sharing_that_does_not_hold_is_an_error(how, words):
    with pytest.raises(CollectionError, match=words):
        collect_grams(Twice(how), [torch.randn(5, 3), torch.randn(5, 3)])


def test_a_module_called_twice_counts_both_inputs():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, x):
            return self.cell(self.cell(x))

    model, x = Recurrent(), torch.randn(5, 3)
    second = model.cell(x).detach()
    gram = collect_grams(model, [x]).get("cell")
    assert gram.rows == 10
    torch.testing.assert_close(gram.total, x.T @ x + second.T @ second)


def test_empty_padding_only_and_unreached(caplog):
    model = make_base("bert")
    with pytest.raises(EmptyCalibrationError, match="no batches"):
        collect_grams(model, [])
    batch = make_batches("bert", 1)[0]
    with pytest.raises(EmptyCalibrationError, match="all padding"):
        collect_grams(model, [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}])

    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(CollectionError, match=r"1 of 2 .* 'idle'"):
        collect_grams(Partial(), [torch.randn(2, 3)], modules=["*"])
    assert list(collect_grams(Partial(), [torch.randn(2, 3)]).modules) == ["used"]
    assert "1 of 2 linear modules were never called" in caplog.text
    with pytest.raises(ConfigError, match="no linear modules"):
        collect_grams(nn.Sequential(nn.LayerNorm(3)), [torch.randn(2, 3)])


def test_mask_that_fits_no_rows_is_an_error():
    class Pick(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, attention_mask):
            return self.linear(x[:, :2].reshape(-1, 3)[:5])

    batch = {"x": torch.randn(4, 6, 3), "attention_mask": torch.ones(4, 6)}
    with pytest.raises(CollectionError, match=r"linear: .*\(5, 3\).*\(4, 6\)"):
        collect_grams(Pick(), [batch], mask=lambda own: own["attention_mask"])


def test_rows_of_something_else_than_the_inputs_all_count(caplog):
    class Positions(nn.Module):
        """Reads relative positions beside the tokens, as DeBERTa does, and every second token, as Funnel does."""

        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.pooled = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x, attention_mask):
            return self.tokens(x), self.positions(x[:1, :5]), self.pooled(x[:, ::2])

    caplog.set_level("INFO")
    torch.manual_seed(0)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 6, [1] + [0] * 5])
    grams = collect_grams(Positions().double(), [{"x": x, "attention_mask": mask}]).grams
    for name, rows in (("tokens", x[mask != 0]), ("positions", x[:1, :5]), ("pooled", x[:, ::2])):
        rows = rows.reshape(-1, 3)
        torch.testing.assert_close(grams[name].total, rows.T @ rows)
        assert grams[name].rows == len(rows)
        assert (f"{name}: its rows are of something else" in caplog.text) == (name != "tokens")


def test_rows_that_lie_position_first_are_masked_so():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, attention_mask):
            return self.linear(x.transpose(0, 1))

    torch.manual_seed(0)
    x, mask = torch.randn(4, 6, 3, dtype=torch.float64), torch.tensor([[1] * n + [0] * (6 - n) for n in (6, 3, 5, 1)])
    gram = collect_grams(Turned().double(), [{"x": x, "attention_mask": mask}]).grams["linear"]
    torch.testing.assert_close(gram.total, x[mask != 0].T @ x[mask != 0])


def test_fingerprints_follow_the_weights():
    base = make_base("llama")
    batches = make_batches("llama", 1)
    one, same = collect_grams(base, batches), collect_grams(make_base("llama"), batches)
    assert one.fingerprints == same.fingerprints
    other = collect_grams(make_base("llama", seed=9), batches)
    assert all(other.fingerprints[m] != one.fingerprints[m] for m in one.modules)
