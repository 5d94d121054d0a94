"""Checkpoints as people bring them: under other names, with more or fewer tensors, with another config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tiny import CONFIGS, fine_tune, make_base, save

_TEXT = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "vocab_size": 60}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_IMAGE = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
_MROPE = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 0]}


def _segformer() -> nn.Module:
    return transformers.SegformerForImageClassification(
        transformers.SegformerConfig(
            hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, depths=[1] * 4, decoder_hidden_size=8, num_labels=3
        )
    )


def _llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**_IMAGE, image_size=16, patch_size=8)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=transformers.LlamaConfig(**_TEXT), vision_config=vision)
    )


def _qwen() -> nn.Module:
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**_GROUPED, "rope_scaling": _MROPE}, vision_config={**vision, "fullatt_block_indexes": [1]}
        )
    )


def _wav2vec2() -> nn.Module:
    return transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            **{**_IMAGE, "num_hidden_layers": 1, "num_attention_heads": 2},
            conv_dim=(8, 8),
            conv_stride=(2, 2),
            conv_kernel=(3, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    )


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    )


def _bart() -> nn.Module:
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=60, d_model=16, max_position_embeddings=32, **sides)
    )


MODELS = {
    "segformer": _segformer,
    "llava": _llava,
    "qwen2.5-vl": _qwen,
    "wav2vec2": _wav2vec2,
    "t5": _t5,
    "bart": _bart,
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_GROUPED, head_dim=4)),
    "untied llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED)),
    "gpt-neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**_TEXT)),
    "tied gpt-neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**_TEXT, tie_word_embeddings=True)
    ),
    "bert lm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_TEXT)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**_GROUPED, num_local_experts=2)),
    "qwen2-moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **_GROUPED, num_experts=3, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts_per_tok=2
        )
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    ),
}


def people(name: str, folder: Path, experts: int = 2) -> tuple[nn.Module, list[nn.Module], Path, list[Path]]:
    """A base and its fine-tunes, live and on disk, of `MODELS` or of the tiny four."""
    torch.manual_seed(0)
    base = make_base(name) if name in CONFIGS else MODELS[name]().eval()
    tuned = [fine_tune(base, seed + 1) for seed in range(experts)]
    paths = [save(model, folder / f"expert-{i}") for i, model in enumerate(tuned)]
    return base, tuned, save(base, folder / "base"), paths


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def changed(path: Path, change=None, **config) -> Path:
    """The same folder with its tensors changed in place, and keys of its config (None takes one away)."""
    if change is not None:
        held = tensors(path)
        change(held)
        save_file({n: t.contiguous() for n, t in held.items()}, path / "model.safetensors", {"format": "pt"})
    if config:
        held = json.loads((path / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps({k: v for k, v in held.items() if v is not None}))
    return path


def in_layout(path: Path, model: nn.Module, layout: str) -> Path:
    """A copy of the checkpoint under the "hub" names that it has, under "live" ones, or with something put before each name."""
    if layout == "hub":
        return path
    folder = path.parent / f"{path.name}-{layout.strip('.')}"
    if not folder.exists():
        shutil.copytree(path, folder)
        named = {layout + n: t for n, t in tensors(path).items()}
        if layout == "live":
            named = {n: t.clone() for n, t in model.state_dict().items()}
        save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder


def mean(name: str, *models: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a tensor, in float64."""
    return torch.stack([held[name].double() for held in models]).mean(0)
