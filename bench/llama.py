"""Checkpoints of Llama's shape with random weights, for benchmarks of whole merges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from bmm_engine.checkpoint import CheckpointWriter, TensorSpec

Shapes = Mapping[str, tuple[int, ...]]

COMMON_STREAM = 2**40  # of random numbers, beyond those of any seed


def llama_shapes(
    layers: int, hidden: int, intermediate: int, vocabulary: int, key_value: int
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama with tied embeddings."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (key_value, hidden),
            f"{prefix}.self_attn.v_proj.weight": (key_value, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    return {**shapes, "model.norm.weight": (hidden,)}


def parameter_count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def make_checkpoint(folder: Path, shapes: Shapes, heads: int, seed: int, shard: str) -> None:
    """bfloat16 weights that all checkpoints share, plus, for a `seed` above 0, a small task vector; a fifth of its square norm is common to all."""
    specs = [TensorSpec(name, shape, torch.bfloat16, "memory") for name, shape in shapes.items()]
    hidden = shapes["model.norm.weight"][0]
    key_value = shapes["model.layers.0.self_attn.k_proj.weight"][0]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in shapes),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value * heads // hidden,
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "tie_word_embeddings": True,
    }

    def normal(spec: TensorSpec, std: float, stream: int) -> torch.Tensor:
        return torch.empty(spec.shape).normal_(0, std, generator=torch.Generator().manual_seed(stream))

    with CheckpointWriter(folder, specs, max_shard_bytes=shard) as writer:
        for position, spec in enumerate(specs):
            tensor = normal(spec, 0.02, position)
            if seed:
                tensor += normal(spec, 0.001, COMMON_STREAM + position)
                tensor += normal(spec, 0.002, seed * 100_003 + position)
            writer.write(spec.name, tensor.bfloat16())
        writer.write_json("config.json", config)
        writer.commit()
