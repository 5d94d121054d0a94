"""Models whose tokens differ: each token of the output has its own row, the output's tokenizer has all of them, and it loads; or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bmm_engine.errors import ConfigError
from bmm_engine.pipeline.run import run_recipe
from bmm_engine.recipe.recipe import Recipe
from tests.tiny import fine_tune, save
from tests.words import WORDS, tokenizer_in

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
BASE_TOKENS = len(WORDS) + 2


def model(rows: int, seed: int, **options: Any) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **options,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


def made(folder: Path, rows: int, seed: int, *added: str, words: list[str] = WORDS, **options: Any) -> Path:
    """A model of some rows, whose tokenizer has tokens that were added."""
    save(model(rows, seed, **options), folder)
    tokenizer = tokenizer_in(folder, words, SPECIAL)
    if added:
        tokenizer.add_tokens(list(added), special_tokens=True)
        tokenizer.save_pretrained(folder)
    return folder


def merged(base: Path, *experts: Path, out: str = "out", **options: Any) -> tuple[dict[str, torch.Tensor], Any, Path]:
    """Tensors in float64, and the tokenizer, once both load."""
    recipe = Recipe.parse({"base": str(base), "experts": [str(e) for e in experts], "alpha": float("inf"), **options})
    path = run_recipe(recipe, base.parent / out, progress=False).path
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not told["missing_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) <= loaded.get_input_embeddings().weight.shape[0]
    return rows_of(path), tokenizer, path


def rows_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(path / "model.safetensors").items()}


def assert_rows(
    merged: dict[str, torch.Tensor], tokenizer: Any, models: list[Path], expected: dict[str, list[int | None]]
) -> None:
    """Token -> the row that it has in each expert; the average of those, the base's (`models[0]`, or the mean of the others) for None."""
    base, *experts = [rows_of(m) for m in models]
    for token, rows in expected.items():
        number = tokenizer.convert_tokens_to_ids(token)
        assert tokenizer(token)["input_ids"] == [number]
        own_base, *own = rows
        for name in (EMBED, HEAD):
            present = [e[name][r] for e, r in zip(experts, own, strict=True) if r is not None]
            filled = base[name][own_base] if own_base is not None else torch.stack(present).mean(0)
            all_rows = [e[name][r] if r is not None else filled for e, r in zip(experts, own, strict=True)]
            torch.testing.assert_close(merged[name][number], torch.stack(all_rows).mean(0), rtol=1e-6, atol=1e-7)


def test_tokens_that_were_added_keep_their_rows_and_the_tokenizer_has_them(tmp_path: Path) -> None:
    base = made(tmp_path / "base", BASE_TOKENS, 0)
    a = made(tmp_path / "a", BASE_TOKENS + 2, 1, "<think>", "<end>")
    b = made(tmp_path / "b", BASE_TOKENS, 2)
    out, tokenizer, path = merged(base, a, b, vocabulary="pad")
    assert out[EMBED].shape[0] == json.loads((path / "config.json").read_text())["vocab_size"] == BASE_TOKENS + 2
    n = BASE_TOKENS
    assert_rows(
        out, tokenizer, [base, a, b], {"cat": [3, 3, 3], "<think>": [None, n, None], "<end>": [None, n + 1, None]}
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_two_experts_add_other_tokens_under_one_number(tmp_path: Path, swapped: bool) -> None:
    n = BASE_TOKENS
    base = made(tmp_path / "base", n, 0)
    a = made(tmp_path / "a", n + 2, 1, "<think>", "<tool>")
    b = made(tmp_path / "b", n + 3, 2, "<tool>", "<user>", "<bot>")
    experts = [b, a] if swapped else [a, b]
    out, tokenizer, _ = merged(base, *experts, vocabulary="pad")
    expected = {
        "cat": [3, 3, 3],
        "<think>": [None, n, None],
        "<tool>": [None, n + 1, n],
        "<user>": [None, None, n + 1],
        "<bot>": [None, None, n + 2],
    }
    assert_rows(
        out,
        tokenizer,
        [base, *experts],
        {t: [own[0], *(own[:0:-1] if swapped else own[1:])] for t, own in expected.items()},
    )
    assert sorted(tokenizer.convert_tokens_to_ids([*expected][1:])) == [n, n + 1, n + 2, n + 3]
    # Whatever the order of the experts: by the lowest number that a token has anywhere, then by its text.
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "<tool>")] == [n, n + 1]


def test_a_token_far_behind_comes_right_after_the_others(tmp_path: Path) -> None:
    """Tokenizers number added tokens without a gap, so the union must."""
    n = BASE_TOKENS
    base = made(tmp_path / "base", n, 0)
    a = made(tmp_path / "a", n + 1, 1, "<a>")
    b = made(tmp_path / "b", n + 4, 2, "<a>", "<b>", "<c>", "<d>")
    c = made(tmp_path / "c", n + 1, 3, "<z>")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the middle ones were taken away again
        config = json.loads((b / name).read_text())
        config["added_tokens"] = [t for t in config.get("added_tokens", []) if t["content"] not in ("<b>", "<c>")]
        config.pop("added_tokens_decoder", None)
        (b / name).write_text(json.dumps(config))
    out, tokenizer, _ = merged(base, a, b, c, vocabulary="pad")
    assert tokenizer.convert_tokens_to_ids(["<a>", "<z>", "<d>"]) == [n, n + 1, n + 2]
    expected = {
        "<a>": [None, n, n, None],
        "<z>": [None, None, None, n],
        "<d>": [None, None, n + 3, None],
        "cat": [3] * 4,
    }
    assert_rows(out, tokenizer, [base, a, b, c], expected)


def test_one_row_of_two_tokens_is_refused_and_the_remedies_are_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    n = BASE_TOKENS
    base = made(tmp_path / "base", n + 4, 0)
    a, b = made(tmp_path / "a", n + 4, 1, "<think>"), made(tmp_path / "b", n + 4, 2, "<user>")
    with pytest.raises(
        ConfigError,
        match=rf"token {n} is '<think>' in .*/a, '<user>' in .*/b, so one row .*`vocabulary: pad`.*unchecked_configs",
    ):
        merged(base, a, b)
    out, tokenizer, _ = merged(base, a, b, vocabulary="pad")
    assert out[EMBED].shape[0] == n + 4  # the base has rows to spare
    assert_rows(out, tokenizer, [base, a, b], {"<think>": [None, n, None], "<user>": [None, None, n], "mat": [7, 7, 7]})
    out, _, _ = merged(base, a, b, unchecked_configs=True, out="unchecked")
    torch.testing.assert_close(out[EMBED], (rows_of(a)[EMBED] + rows_of(b)[EMBED]) / 2)
    assert "so one row of the embeddings would be merged of two tokens" in caplog.text
    # Embeddings that are not merged may differ.
    merged(base, a, b, keep_base=[EMBED, HEAD], out="kept")


def test_a_reserved_row_that_got_a_name_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [*WORDS, "<reserved_0>"]
    base = made(tmp_path / "base", BASE_TOKENS + 1, 0, words=words)
    a = made(tmp_path / "a", BASE_TOKENS + 1, 1, words=[*WORDS, "<think>"])
    out, _, _ = merged(base, a)
    torch.testing.assert_close(out[EMBED], rows_of(a)[EMBED])
    assert (
        f"token {BASE_TOKENS} is '<reserved_0>' in {base}, '<think>' in {a}: a reserved row that got a name"
        in caplog.text
    )


def test_tokens_in_another_order_are_matched_by_their_texts(tmp_path: Path) -> None:
    base = made(tmp_path / "base", BASE_TOKENS, 0)
    a = made(tmp_path / "a", BASE_TOKENS, 1, words=WORDS[::-1])
    out, tokenizer, _ = merged(base, a, vocabulary="pad")
    assert tokenizer.convert_tokens_to_ids(WORDS) == list(range(2, BASE_TOKENS))
    assert_rows(out, tokenizer, [base, a], {word: [i + 2, BASE_TOKENS - 1 - i] for i, word in enumerate(WORDS)})


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base = made(tmp_path / "base", BASE_TOKENS, 0)
    a = made(tmp_path / "a", BASE_TOKENS, 1, words=[f"other{i}" for i in range(len(WORDS))])
    with pytest.raises(
        ConfigError, match=r"a: its tokenizer is of another vocabulary than that of .*base: 16 tokens, such as 'other0'"
    ):
        merged(base, a, vocabulary="pad")


def test_crop_takes_the_tokenizer_that_fits(tmp_path: Path) -> None:
    base = made(tmp_path / "base", BASE_TOKENS + 2, 0, "<a>", "<b>")
    a, b = made(tmp_path / "a", BASE_TOKENS, 1), made(tmp_path / "b", BASE_TOKENS + 2, 2, "<a>", "<b>")
    out, tokenizer, _ = merged(base, a, b, vocabulary="crop")
    assert out[EMBED].shape[0] == len(tokenizer) == BASE_TOKENS
    assert_rows(out, tokenizer, [base, a, b], {word: [i + 2] * 3 for i, word in enumerate(WORDS)})
    c = made(tmp_path / "c", BASE_TOKENS + 1, 2, "<x>", "<y>")
    with pytest.raises(ConfigError, match=rf"token {BASE_TOKENS} is '<a>' in .*, '<x>' in .*`vocabulary: pad` matches"):
        merged(base, c, vocabulary="crop", out="no")
    (tmp_path / "a" / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "b" / "tokenizer.json", tmp_path / "a")
    with pytest.raises(
        ConfigError,
        match=rf"crop leaves {BASE_TOKENS} tokens, and every tokenizer has more \({BASE_TOKENS + 2} at the least\)",
    ):
        merged(base, a, b, vocabulary="crop", out="no")


@pytest.mark.parametrize("where", ["config", "generation_config", "list"])
def test_crop_below_a_token_that_a_config_names(tmp_path: Path, where: str) -> None:
    n = BASE_TOKENS
    base = made(tmp_path / "base", n + 4, 0, **({"pad_token_id": n + 2} if where == "config" else {}))
    if where != "config":
        ids = {"pad_token_id": n + 2} if where == "generation_config" else {"eos_token_id": [1, n + 2]}
        (base / "generation_config.json").write_text(json.dumps(ids))
    a = made(tmp_path / "a", n, 1)
    key = "eos_token_id" if where == "list" else "pad_token_id"
    with pytest.raises(
        ConfigError, match=rf"crop leaves {n} tokens, and .* has {key} = {n + 2}\. Say `vocabulary: pad`"
    ):
        merged(base, a, vocabulary="crop")
    merged(base, a, vocabulary="pad")


def test_a_base_without_a_tokenizer_has_its_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save(model(BASE_TOKENS, 0), tmp_path / "base")
    a = save(fine_tune(model(BASE_TOKENS, 0), 1), tmp_path / "a")
    tokenizer_in(a, WORDS, SPECIAL)
    _, tokenizer, _ = merged(base, a)
    assert tokenizer.convert_tokens_to_ids("cat") == 3
    assert f"{base}: has no tokenizer; that of {a} is put beside the output" in caplog.text


def test_tokens_of_files_of_words(tmp_path: Path) -> None:
    """A BERT vocabulary as it was saved before tokenizer.json."""
    from bmm_engine.checkpoint import Checkpoint
    from bmm_engine.checkpoint.tokens import Vocabulary

    save(model(6, 0), tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\ncat\n")
    (tmp_path / "added_tokens.json").write_text('{"<x>": 3}')
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"4": {"content": "<y>"}}}')
    found = Vocabulary.of(Checkpoint.open(tmp_path))
    assert found is not None
    assert found.numbers == {"[PAD]": 0, "[UNK]": 1, "cat": 2, "<x>": 3, "<y>": 4}
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    found = Vocabulary.of(Checkpoint.open(tmp_path))
    assert found is not None
    assert (found.numbers["b"], found.rows) == (1, 5)


@pytest.mark.parametrize("mode", ["sequential", "plain"])
def test_a_walk_reads_each_expert_by_its_own_numbers(tmp_path: Path, mode: str) -> None:
    """An expert whose tokens are in another order, and the same with its rows put in the base's order before, give one merge."""
    base = made(tmp_path / "base", BASE_TOKENS, 0, tie_word_embeddings=True)
    b = made(tmp_path / "b", BASE_TOKENS, 2, tie_word_embeddings=True)
    turned, straight = (
        made(tmp_path / n, BASE_TOKENS, 1, words=w, tie_word_embeddings=True)
        for n, w in (("turned", WORDS[::-1]), ("straight", WORDS))
    )
    state = load_file(straight / "model.safetensors")
    state[EMBED][2:] = state[EMBED][2:].flip(0).clone()
    save_file(state, straight / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "t.txt").write_text("\n".join(" ".join(WORDS[i % 7 : i % 7 + 4]) for i in range(20)))
    outputs = []
    for expert in (turned, straight):
        experts = [{"model": str(e), "calibration": str(tmp_path / "t.txt")} for e in (expert, b)]
        recipe = Recipe.parse({"base": str(base), "experts": experts, "vocabulary": "pad", "mode": mode})
        outputs.append(rows_of(run_recipe(recipe, tmp_path / f"out-{expert.name}", progress=False).path))
    for name, truth in outputs[1].items():
        torch.testing.assert_close(outputs[0][name], truth, rtol=1e-5, atol=1e-6)
