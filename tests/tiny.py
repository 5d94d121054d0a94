"""Tiny random models of the four architectures, fine-tunes of them, and calibration batches that fit."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 60
_TEXT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 40,
}
_IMAGE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 16,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 8,
}

CONFIGS = {
    "bert": lambda: (
        transformers.BertForSequenceClassification,
        transformers.BertConfig(**_TEXT, max_position_embeddings=32, num_labels=3),
    ),
    "gpt2": lambda: (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_inner=40,
            vocab_size=VOCABULARY,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "vit": lambda: (transformers.ViTForImageClassification, transformers.ViTConfig(**_IMAGE, num_labels=3)),
    "llama": lambda: (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**_TEXT, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True),
    ),
}
# Modules that read one tensor, by the last part of their names in the live model.
SHARED = {
    "bert": [{"query", "key", "value"}],
    "gpt2": [],
    "vit": [{"q_proj", "k_proj", "v_proj"}],
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
}


def make_base(architecture: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    cls, config = CONFIGS[architecture]()
    return cls(config).eval()


def fine_tune(base: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    """A stand-in for a fine-tune: the base plus noise on every parameter."""
    torch.manual_seed(seed)
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, expert.parameters()):
            parameter.add_(torch.randn_like(parameter) * size)
    return expert


def make_batches(architecture: str, seed: int, count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Inputs with padding (left out of Grams by the mask) for text models, pictures for the ViT."""
    generator = torch.Generator().manual_seed(seed)
    if architecture == "vit":
        return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)} for _ in range(count)]
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 9, [1] * 2 + [0] * 7])
    return [
        {"input_ids": torch.randint(3, VOCABULARY, (4, 9), generator=generator), "attention_mask": mask}
        for _ in range(count)
    ]


def save(model: nn.Module, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def family(architecture: str, folder: Path, experts: int = 2) -> tuple[nn.Module, list[nn.Module], Path, list[Path]]:
    """A base and its fine-tunes, live and on disk."""
    base = make_base(architecture)
    tuned = [fine_tune(base, seed + 1) for seed in range(experts)]
    paths = [save(model, folder / f"expert-{i}") for i, model in enumerate(tuned)]
    return base, tuned, save(base, folder / "base"), paths
