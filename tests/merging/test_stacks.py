"""Stacks of models whose layers are of several kinds: each layer stays what it was, by the config of the stack, or the stack is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from bmm_engine.errors import ConfigError
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from tests.tiny import save

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 4, "sliding_window": 3}),
    "jamba": (
        "JambaForCausalLM",
        {
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "expert_layer_offset": 3},
            **{"num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1, "decoder_sparse_step": 2},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
    "modernbert": (
        "ModernBertForMaskedLM",
        {"global_attn_every_n_layers": 3, "local_attention": 4, "num_hidden_layers": 6, "cls_token_id": 1, "sep_token_id": 2},
    ),
}  # fmt: skip


def model_in(folder: Path, kind: str) -> tuple[type, Path]:
    name, own = MODELS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls, save(cls(cls.config_class(**{**SMALL, **own})).eval(), folder / "model")


def stacked(path: Path, *ranges: tuple[int, int], **more: object) -> Recipe:
    stack = {"slices": [{"model": str(path), "layers": list(r)} for r in ranges]}
    return Recipe.parse({"base": stack, "experts": [stack], "alpha": float("inf"), **more})


def by_hand(cls: type, path: Path, ranges: list[tuple[int, int]]) -> torch.nn.Module:
    """The live layers themselves, one after the other."""
    model = cls.from_pretrained(path).eval()
    model.model.layers = torch.nn.ModuleList(
        [model.model.layers[i] for start, stop in ranges for i in range(start, stop)]
    )
    config = model.config
    for key in ("layer_types", "no_rope_layers"):
        if getattr(config, key, None):
            setattr(config, key, [getattr(config, key)[i] for start, stop in ranges for i in range(start, stop)])
    config.num_hidden_layers = len(model.model.layers)
    return model


@pytest.mark.parametrize(
    ("kind", "ranges"),
    [
        ("gemma2", [(0, 2), (1, 4)]),  # not by its period: the list of kinds says it
        ("gemma2", [(1, 3)]),
        ("smollm3", [(0, 3), (2, 4)]),
        ("qwen2_moe", [(0, 3), (1, 4)]),  # a shift by its period
        ("modernbert", [(0, 3), (1, 6)]),
    ],
)
def test_each_layer_stays_what_it_was(tmp_path: Path, kind: str, ranges: list[tuple[int, int]]) -> None:
    cls, path = model_in(tmp_path, kind)
    out = run_recipe(stacked(path, *ranges), tmp_path / "out", progress=False).path
    made, told = cls.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    tokens = torch.arange(3, 15)[None]
    options = {} if kind == "modernbert" else {"use_cache": False}
    with torch.no_grad():
        logits = made.eval()(tokens, **options).logits
        torch.testing.assert_close(logits, by_hand(cls, path, ranges)(tokens, **options).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "ranges", "words"),
    [
        ("jamba", [(0, 3), (0, 4)], r"layer 3 of the stack is layer 0 of .*/model, where it is of another kind"),
        ("jamba", [(0, 2), (0, 4)], "is of another kind"),  # the mixtures have another period
        ("qwen2_moe", [(0, 3), (0, 4)], r"mlp is 'Qwen2Moe(MLP|SparseMoeBlock)' there"),
        (
            "modernbert",
            [(0, 3), (0, 6)],
            "attn_norm is 'Identity' there, 'LayerNorm' by the config",
        ),  # its first layer is like no other
    ],
)
def test_a_layer_that_would_be_of_another_kind_is_refused(
    tmp_path: Path, kind: str, ranges: list[tuple[int, int]], words: str
) -> None:
    _, path = model_in(tmp_path, kind)
    with pytest.raises(
        ConfigError, match=rf"slices: .*{words}.*Choose ranges that keep every layer at a place of its kind"
    ):
        run_recipe(stacked(path, *ranges), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_expert_that_is_stacked_otherwise_is_refused_too(tmp_path: Path) -> None:
    _, path = model_in(tmp_path, "jamba")
    recipe = stacked(path, (0, 4)).plain()
    recipe["experts"] = [
        {"model": {"slices": [{"model": str(path), "layers": [0, 1]}, {"model": str(path), "layers": [0, 3]}]}}
    ]
    with pytest.raises(ConfigError, match="layer 1 of the stack is layer 0 of"):
        run_recipe(Recipe.parse(recipe), tmp_path / "out", progress=False)
