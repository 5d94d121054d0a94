"""Tiny random models of many architectures of transformers, each with the head that its checkpoints have, fine-tunes, and inputs to run them on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, TOKENS, WIDTH = 99, 12, 32

# What configs call their sizes; each gets those that its class declares.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "projection_dim"), WIDTH),
    **dict.fromkeys(("embedding_size", "n_embed"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size"), 40),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "d_inner"), 40),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "rotary_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_selected_experts"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "image_size": 16,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "type_vocab_size": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """`inputs`: "text", "unmasked" text, "pairs" (an encoder's text and a decoder's), "images", "waves" (raw sound), "spectrum" (of sound),
    "captions" (text with a picture in four of its places), "patches" (text with a picture that is four patches in one of its places)."""

    cls: str
    config: str
    inputs: str = "text"
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make_config(self) -> Any:
        cls = getattr(transformers, self.config)
        declared = set(inspect.signature(cls.__init__).parameters)
        sizes = {key: value for key, value in _SIZES.items() if key in declared}
        if self.cls.endswith("Classification"):
            sizes["num_labels"] = 3
        return cls(**{**sizes, **self.sizes})

    def make(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, self.cls)(self.make_config()).eval()
        with torch.no_grad():  # norms and biases as training leaves them: not all one or zero
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        return model

    def batch(self, seed: int, samples: int = 4) -> dict[str, Tensor]:
        """Model inputs, samples first; texts with padding."""
        generator = torch.Generator().manual_seed(seed)
        if self.inputs == "images":
            size = self.sizes.get("image_size", 16)
            return {"pixel_values": torch.randn(samples, 3, size, size, generator=generator)}
        if self.inputs == "waves":
            return {"input_values": torch.randn(samples, 400, generator=generator)}
        if self.inputs == "spectrum":
            return {
                "input_features": torch.randn(samples, 16, 24, generator=generator),
                "decoder_input_ids": torch.randint(3, VOCABULARY, (samples, 7), generator=generator),
            }
        if self.inputs in ("captions", "patches"):
            places = 4 if self.inputs == "captions" else 1
            ids = torch.randint(3, 90, (samples, TOKENS), generator=generator)
            ids[:, 1], ids[:, 2 : 2 + places] = 97, 98  # a picture begins; its places
            text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if self.inputs == "captions":
                return {**text, "pixel_values": torch.randn(samples, 3, 16, 16, generator=generator)}
            return {
                **text,
                "mm_token_type_ids": (ids == 98).int(),
                "pixel_values": torch.randn(4 * samples, 3 * 2 * 8 * 8, generator=generator),
                "image_grid_thw": torch.tensor([[1, 2, 2]] * samples),
            }
        lengths = [TOKENS if i % 2 == 0 else 4 + i % 7 for i in range(samples)]
        mask = torch.tensor([[1] * n + [0] * (TOKENS - n) for n in lengths])
        text = {
            "input_ids": torch.randint(3, VOCABULARY, (samples, TOKENS), generator=generator) * mask,
            "attention_mask": mask,
        }
        for row, length in enumerate(lengths):  # some read what stands at the end of a sentence
            text["input_ids"][row, length - 1] = 2
        if self.inputs == "unmasked":
            del text["attention_mask"]
        if self.inputs == "pairs":
            text["decoder_input_ids"] = torch.randint(3, VOCABULARY, (samples, 7), generator=generator)
        return text


def _causal(name: str, **sizes: Any) -> Architecture:
    return Architecture(f"{name}ForCausalLM", f"{name}Config", sizes=sizes)


def _masked(name: str, **sizes: Any) -> Architecture:
    return Architecture(f"{name}ForMaskedLM", f"{name}Config", sizes=sizes)


def _classes(name: str, **sizes: Any) -> Architecture:
    return Architecture(f"{name}ForSequenceClassification", f"{name}Config", sizes=sizes)


def _pairs(name: str, **sizes: Any) -> Architecture:
    return Architecture(f"{name}ForConditionalGeneration", f"{name}Config", "pairs", sizes)


def _images(name: str, **sizes: Any) -> Architecture:
    return Architecture(f"{name}ForImageClassification", f"{name}Config", "images", sizes)


_PICTURE = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
}
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_SSM = {"state_size": 8, "expand": 2, "conv_kernel": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}

_WAVES = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

ARCHITECTURES: dict[str, Architecture] = {
    # Decoders
    "llama": _causal("Llama"),
    "llama-tied": _causal("Llama", tie_word_embeddings=True),
    "mistral": _causal("Mistral"),
    "mixtral": _causal("Mixtral"),
    "qwen2": _causal("Qwen2"),
    "qwen2_moe": _causal("Qwen2Moe", shared_expert_intermediate_size=40),
    "qwen3": _causal("Qwen3"),
    "qwen3_moe": _causal("Qwen3Moe"),
    "gemma": _causal("Gemma"),
    "gemma2": _causal("Gemma2"),
    "gemma3_text": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig"),
    "phi": _causal("Phi"),
    "phi3": _causal("Phi3"),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config"),
    "gpt_neo": Architecture(
        "GPTNeoForCausalLM", "GPTNeoConfig", sizes={"attention_types": [[["global", "local"], 1]], "num_layers": 2}
    ),
    "gptj": _causal("GPTJ"),
    "gpt_neox": _causal("GPTNeoX"),
    "opt": _causal("OPT", word_embed_proj_dim=WIDTH),
    "bloom": _causal("Bloom"),
    "falcon": _causal("Falcon"),
    "mpt": _causal("Mpt"),
    "codegen": _causal("CodeGen"),
    "gpt_bigcode": _causal("GPTBigCode"),
    "stablelm": _causal("StableLm"),
    "starcoder2": _causal("Starcoder2"),
    "olmo": _causal("Olmo"),
    "olmo2": _causal("Olmo2"),
    "olmoe": _causal("Olmoe"),
    "cohere": _causal("Cohere"),
    "cohere2": _causal("Cohere2"),
    "granite": _causal("Granite"),
    "granitemoe": _causal("GraniteMoe"),
    "glm": _causal("Glm"),
    "glm4": _causal("Glm4"),
    "deepseek_v3": _causal(
        "DeepseekV3", n_group=2, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4, head_dim=8
    ),
    "gpt_oss": _causal("GptOss"),
    "ernie4_5_moe": _causal("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_layer_start_index=0),
    "nemotron": _causal("Nemotron"),
    "persimmon": _causal("Persimmon"),
    "xglm": _causal("XGLM", attention_heads=4),
    "biogpt": _causal("BioGpt"),
    "smollm3": _causal("SmolLM3"),
    "helium": _causal("Helium"),
    # State spaces and hybrids
    "mamba": _causal("Mamba", state_size=8),
    "mamba2": _causal("Mamba2", **_SSM),
    "falcon_mamba": _causal("FalconMamba", state_size=8),
    "jamba": _causal(
        "Jamba", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, mamba_d_state=8
    ),
    "recurrent_gemma": _causal("RecurrentGemma", num_hidden_layers=3, lru_width=WIDTH, attention_window_size=16),
    "lfm2": _causal("Lfm2", layer_types=["conv", "full_attention"]),
    "bamba": _causal(
        "Bamba",
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
    # Encoders
    "bert": _classes("Bert"),
    "bert-masked": _masked("Bert"),
    "roberta": _classes("Roberta"),
    "roberta-masked": _masked("Roberta"),
    "xlm-roberta": _classes("XLMRoberta"),
    "distilbert": _classes("DistilBert"),
    "electra": _classes("Electra"),
    "deberta": _classes("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": _classes(
        "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True, position_buckets=8
    ),
    "albert": _classes("Albert"),
    "mpnet": _classes("MPNet"),
    "modernbert": _classes("ModernBert"),
    "xlnet": _classes("XLNet"),
    "xlm": Architecture("XLMWithLMHeadModel", "XLMConfig", sizes={"n_words": VOCABULARY}),
    "funnel": _classes("Funnel", block_sizes=[1, 1], d_head=8),
    "longformer": _classes("Longformer", attention_window=[4, 4]),
    "rembert": _classes("RemBert", input_embedding_size=WIDTH, output_embedding_size=WIDTH),
    "convbert": _classes("ConvBert"),
    "mobilebert": _classes(
        "MobileBert", intra_bottleneck_size=WIDTH, true_hidden_size=WIDTH, num_feedforward_networks=2
    ),
    "nystromformer": _classes("Nystromformer", num_landmarks=TOKENS, segment_means_seq_len=TOKENS),
    "fnet": Architecture("FNetForSequenceClassification", "FNetConfig", "unmasked"),
    "esm": _classes("Esm", mask_token_id=3),
    # Encoders with decoders
    "t5": _pairs("T5"),
    "t5-v1.1": _pairs("T5", tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "mt5": _pairs("MT5"),
    "umt5": _pairs("UMT5"),
    "longt5": _pairs("LongT5", local_radius=4),
    "bart": _pairs("Bart"),
    "bart-classes": _classes("Bart"),
    "mbart": _pairs("MBart"),
    "pegasus": _pairs("Pegasus"),
    "blenderbot": _pairs("Blenderbot"),
    "m2m_100": _pairs("M2M100"),
    "marian": Architecture("MarianMTModel", "MarianConfig", "pairs"),
    "switch_transformers": _pairs("SwitchTransformers", num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    # Images
    "vit": _images("ViT"),
    "deit": _images("DeiT"),
    "beit": _images("Beit"),
    "data2vec-vision": _images("Data2VecVision"),
    "swin": _images("Swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "dinov2": _images("Dinov2"),
    "dinov3": Architecture("DINOv3ViTModel", "DINOv3ViTConfig", "images", {"num_register_tokens": 2}),
    "convnext": _images("ConvNext", image_size=64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    "segformer": _images(
        "Segformer", image_size=64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 4]
    ),
    # Pictures in texts
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        "captions",
        {
            "vision_config": {"model_type": "clip_vision_model", **_PICTURE, "image_size": 16},
            "text_config": {"model_type": "llama", **_TEXT},
            "image_token_id": 98,
            "image_seq_length": 4,
        },
    ),
    "qwen2_vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        "patches",
        {
            "vision_config": {
                "depth": 2,
                "embed_dim": WIDTH,
                "hidden_size": WIDTH,
                "num_heads": 4,
                "patch_size": 8,
                "mlp_ratio": 1,
            },
            "text_config": {
                **_TEXT,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            "image_token_id": 98,
            "video_token_id": 96,
            "vision_start_token_id": 97,
            "vision_end_token_id": 95,
        },
    ),
    # Sound
    "wav2vec2": Architecture(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        "waves",
        _WAVES,
    ),
    "hubert": Architecture(
        "HubertForSequenceClassification",
        "HubertConfig",
        "waves",
        _WAVES,
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        "spectrum",
        {"num_mel_bins": 16, "max_source_positions": 12, "max_target_positions": 16, "decoder_start_token_id": 1},
    ),
}


def names() -> Iterator[str]:
    return iter(ARCHITECTURES)
