"""Unequal vocabularies: laws of cropping and padding, row by row, and the errors without either."""

from __future__ import annotations

import pytest
import torch
import transformers

from bmm_engine.checkpoint import Checkpoint, StateDictSource
from bmm_engine.checkpoint.compose import checkpoints_of
from bmm_engine.errors import ConfigError, ShapeMismatchError
from bmm_engine.merging.align import align
from tests.tiny import make_base, save

EMBED, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"


def source(rows, label, *, dtype=torch.float32, config=True, width=3):
    generator = torch.Generator().manual_seed(rows)
    tensors = {
        EMBED: torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype),
        "model.layers.0.mlp.weight": torch.randn(4, width, generator=generator).to(dtype),
        HEAD: torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype),
        BIAS: torch.randn(rows, generator=generator).to(dtype),
    }
    return StateDictSource(tensors, label, {"vocab_size": rows} if config else None)


def aligned(mode, base_rows, *expert_rows, **options):
    base = source(base_rows, "base", **options)
    experts = [source(rows, f"expert {i}", **options) for i, rows in enumerate(expert_rows)]
    return base, experts, align(base, experts, vocabulary=mode)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("name", [EMBED, HEAD, BIAS])
def test_crop_keeps_the_rows_that_all_have(name, config):
    base, experts, alignment = aligned("crop", 7, 9, 6, config=config)
    for view, original in zip((alignment.base, *alignment.experts), (base, *experts)):
        assert view.spec(name).shape[0] == 6
        assert torch.equal(view.load(name), original.load(name)[:6])
        assert torch.equal(view.load(name, slice(2, 5)), original.load(name)[2:5])


@pytest.mark.parametrize("name", [EMBED, HEAD, BIAS])
def test_pad_fills_the_base_with_the_mean_and_the_experts_with_the_base(name):
    base, experts, alignment = aligned("pad", 5, 8, 7, 4)
    raw = [e.load(name).double() for e in experts]
    expected = torch.cat([base.load(name).double(), (raw[0][5:7] + raw[1][5:7]) / 2, raw[0][7:]])
    padded = alignment.base.load(name)
    torch.testing.assert_close(padded.double(), expected, rtol=1e-6, atol=0)
    for view, original, rows in zip(alignment.experts, experts, (8, 7, 4)):
        assert torch.equal(view.load(name)[:rows], original.load(name))
        assert torch.equal(view.load(name)[rows:], padded[rows:])  # so the task vector is zero there
    assert all(v.spec(name).shape[0] == 8 for v in (alignment.base, *alignment.experts))


def test_slabs_are_the_whole():
    _, _, alignment = aligned("pad", 5, 8, 7)
    for view in (alignment.base, *alignment.experts):
        whole = view.load(EMBED)
        for start in range(9):
            for stop in range(start, 10):
                assert torch.equal(view.load(EMBED, slice(start, stop)), whole[start:stop])


def test_the_order_of_the_experts_does_not_matter_to_the_last_bit():
    base = source(2, "base", dtype=torch.float64)
    experts = [source(rows, f"{rows}", dtype=torch.float64) for rows in (30, 31, 32, 33, 34)]
    one, two = (align(base, order, vocabulary="pad").base.load(EMBED) for order in (experts, experts[::-1]))
    assert torch.equal(one, two)


def test_a_filled_row_has_no_task_vector_in_mixed_dtypes():
    base, expert, large = (
        source(5, "base"),
        source(5, "half", dtype=torch.float16),
        source(6, "large", dtype=torch.bfloat16),
    )
    alignment = align(base, [expert, large], vocabulary="pad")
    assert alignment.experts[0].spec(EMBED).dtype == torch.float32
    assert torch.equal(alignment.experts[0].load(EMBED)[5:], alignment.base.load(EMBED)[5:])
    assert torch.equal(alignment.experts[0].load(EMBED)[:5], expert.load(EMBED).float())
    assert alignment.experts[1].spec(EMBED).dtype == torch.bfloat16


def test_equal_vocabularies_are_left_alone():
    base, experts, alignment = aligned("pad", 5, 5, 5)
    assert alignment.base is base
    assert [e.source for e in alignment.experts] == experts


@pytest.mark.parametrize(("mode", "rows"), [("crop", 60), ("pad", 64)])
def test_config_ties_and_files_of_real_checkpoints(tmp_path, mode, rows):
    small = make_base("llama")
    large = make_base("llama", 1)
    large.resize_token_embeddings(64, mean_resizing=False)
    base, expert = (Checkpoint.open(save(m, tmp_path / n)) for m, n in ((small, "small"), (large, "large")))
    view = align(base, [expert], vocabulary=mode).base
    assert view.config["vocab_size"] == rows
    assert base.config["vocab_size"] == 60
    assert view.spec(HEAD).shape[0] == rows  # tied, read through the alias
    assert torch.equal(view.load(HEAD), view.load(EMBED))
    assert list(checkpoints_of(view)) == [base]
    config = transformers.LlamaConfig(**view.config)
    model = transformers.LlamaForCausalLM(config)
    state = {name: view.load(name) for name in view.names()}
    assert not model.load_state_dict(state | {HEAD: state[EMBED]}).missing_keys


def test_without_the_option_both_sizes_and_the_remedy_are_named():
    with pytest.raises(
        ShapeMismatchError,
        match=rf"{EMBED}: shape \(5, 3\) in base, \(8, 3\) in expert 1.*vocabulary: crop` merges the first 5.*pad` all 8",
    ):
        aligned("error", 5, 5, 8)


def test_other_shapes_are_errors_whatever_the_option():
    base, expert = source(5, "base"), source(6, "expert", width=4)
    with pytest.raises(ShapeMismatchError, match=r"shape \(5, 3\) in base, \(6, 4\) in expert.*another size"):
        align(base, [expert], vocabulary="pad")
    head = {"classifier.weight": torch.zeros(3, 2)}, {"classifier.weight": torch.zeros(4, 2)}
    with pytest.raises(ShapeMismatchError, match=r"classifier.*keep_base: \['classifier\.\*'\]"):
        align(StateDictSource(head[0]), [StateDictSource(head[1])], vocabulary="crop")
    with pytest.raises(ConfigError, match=r"vocabulary must be 'error', 'crop' or 'pad', not 'trim'"):
        align(base, [base], vocabulary="trim")


def test_a_vocabulary_tensor_that_is_kept_cannot_stay_behind():
    base, expert = source(5, "base"), source(6, "expert")
    with pytest.raises(ConfigError, match=rf"{HEAD}.*kept from the base with its 5 rows"):
        align(base, [expert], keep_base=["lm_head.weight"], vocabulary="pad")
