"""Texts for models of every kind: what their tokenizers make is what the models take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bmm_engine.errors import ConfigError
from bmm_engine.merging.merge import MergeResult
from bmm_engine.pipeline.measure import batches_of
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.sections import CalibrationRecipe
from bmm_engine.statistics.calibration import read_calibration
from tests.architectures import ARCHITECTURES
from tests.tiny import fine_tune
from tests.words import ENDED, ENDLESS, WORDS, tokenizer_in

TEXTS = [" ".join(WORDS[i : i + 3 + i % 5]) for i in range(12)] * 2


def written(name: str, folder: Path, special: dict[str, str] = ENDED, **config: Any) -> dict[str, Any]:
    """A recipe of two experts with texts, each beside its tokenizer."""
    base = ARCHITECTURES[name].make()
    for key, value in config.items():
        setattr(base.config, key, value)
    for number, model in enumerate((base, fine_tune(base, 1, 0.02), fine_tune(base, 2, 0.02))):
        model.save_pretrained(folder / str(number))
        tokenizer_in(folder / str(number), special=special)
    rows = [{"text": text, "wanted": text.split()[-1]} for text in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    experts = [{"model": str(folder / str(n)), "calibration": str(folder / "texts.jsonl")} for n in (1, 2)]
    return {"base": str(folder / "0"), "experts": experts}


def merged(raw: dict[str, Any], output: Path) -> tuple[MergeResult, list[str]]:
    lines: list[str] = []
    return run_recipe(Recipe.parse(raw), output, progress=False, report=lines.append), lines


@pytest.mark.parametrize("name", ["t5", "bart", "albert", "fnet", "distilbert", "mamba", "gpt2"])
def test_texts_are_read_by_models_of_every_kind(name: str, tmp_path: Path) -> None:
    raw = written(name, tmp_path)
    for mode in (None, "plain"):
        result, lines = merged({**raw, "mode": mode}, tmp_path / f"out-{mode}")
        assert len(result.modules) >= 4
        assert any("target_field: COLUMN" in line for line in lines) == (name in ("t5", "bart") and mode is None)


def test_a_decoder_reads_the_texts_or_their_targets_one_token_later(tmp_path: Path) -> None:
    raw = written("t5", tmp_path)
    model = ARCHITECTURES["t5"].make()
    model.config.decoder_start_token_id = 7

    def batch(**options: Any) -> dict[str, Tensor]:
        data = read_calibration(tmp_path / "texts.jsonl", target_field=options.get("target_field"))
        return batches_of(data, tmp_path / "1", CalibrationRecipe(**options, batch_size=24), model)[0]

    own, other = batch(), batch(target_field="wanted")
    for found, tokens in ((own, own["input_ids"]), (other, None)):
        assert found["decoder_input_ids"][:, 0].eq(7).all()
        if tokens is not None:
            assert torch.equal(found["decoder_input_ids"][:, 1:], tokens[:, :-1])
    assert other["decoder_input_ids"].shape == (24, 1), "one word, read one token later"
    assert torch.equal(own["decoder_attention_mask"], own["attention_mask"])
    with pytest.raises(ConfigError, match="has no decoder"):
        batches_of(
            read_calibration(tmp_path / "texts.jsonl", target_field="wanted"),
            tmp_path / "1",
            CalibrationRecipe(),
            ARCHITECTURES["bert"].make(),
        )
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    with pytest.raises(ConfigError, match=r"texts\.txt: .* no column 'wanted'"):
        read_calibration(tmp_path / "texts.txt", target_field="wanted")
    raw["calibration"] = {"target_field": "wanted"}
    _, lines = merged(raw, tmp_path / "out")
    assert not any("target_field" in line for line in lines)


@pytest.mark.parametrize("special", [{"unk_token": "[UNK]"}, ENDLESS], ids=["neither padding nor end", "no end"])
def test_a_tokenizer_without_padding_or_end(special: dict[str, str], tmp_path: Path) -> None:
    result, _ = merged(written("llama", tmp_path, special), tmp_path / "out")
    assert len(result.modules) == 14


def test_a_classifier_without_a_padding_token(tmp_path: Path) -> None:
    """Its own forward refuses batches; its sensitivities are those of its samples one by one."""
    from transformers import LlamaForSequenceClassification

    from bmm_engine import collect_sensitivity

    config = ARCHITECTURES["llama"].make_config()
    config.pad_token_id = None
    config.num_labels = 3
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval().double()
    batch = ARCHITECTURES["llama"].batch(1)
    together = collect_sensitivity(model, [batch])
    rows = [int(n) for n in batch["attention_mask"].sum(1)]
    single = [{k: v[i : i + 1, :n] for k, v in batch.items()} for i, n in enumerate(rows)]
    apart = collect_sensitivity(model, single)
    assert config.pad_token_id is None
    for name in apart.names:
        torch.testing.assert_close(together.get(name), apart.get(name), rtol=1e-9, atol=1e-12)
