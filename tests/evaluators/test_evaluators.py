from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from bmm_engine.errors import CheckpointError, ConfigError, DataError
from bmm_engine.evaluators.build import build_evaluator
from bmm_engine.evaluators.classification import random_rows
from bmm_engine.evaluators.contract import TaskData
from bmm_engine.evaluators.function import FunctionEvaluator
from bmm_engine.evaluators.heads import with_head
from bmm_engine.recipe.sections import EvaluationRecipe
from tests.tiny import make_base, make_batches, save
from tests.words import WORDS, tokenizer_in


@pytest.fixture
def bert(tmp_path):
    """A live classifier, its folder with a tokenizer, and sentences of all lengths."""
    model = make_base("bert")
    folder = save(model, tmp_path / "bert")
    texts = [" ".join(WORDS[(3 * i) % 7 : (3 * i) % 7 + 1 + (5 * i) % 9]) for i in range(23)]
    return SimpleNamespace(model=model, folder=folder, tokenizer=tokenizer_in(folder), texts=texts, root=tmp_path)


def logits_one_by_one(bert, model=None):
    """Without padding: a sentence at a time."""
    with torch.no_grad():
        rows = [bert.tokenizer(text, return_tensors="pt") for text in bert.texts]
        return torch.cat(
            [(model or bert.model)(**{k: r[k] for k in ("input_ids", "attention_mask")}).logits for r in rows]
        )


def options(**changes):
    return EvaluationRecipe(**{"kind": "text_classification", "batch_size": 4, **changes})


def write_table(path, texts, labels):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in zip(texts, labels)))
    else:
        comma = "," if path.suffix == ".csv" else "\t"
        path.write_text(f"label{comma}text\n" + "".join(f"{y}{comma}{t}\n" for t, y in zip(texts, labels)))
    return path


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_texts_are_scored_as_one_by_one(bert, suffix):
    labels = [i % 3 for i in range(len(bert.texts))]
    path = write_table(bert.root / f"data{suffix}", bert.texts, labels)
    evaluator = build_evaluator(options(), [TaskData("t", path, bert.folder)], "validation")
    bert.model.train()
    expected = logits_one_by_one(SimpleNamespace(**{**vars(bert), "model": bert.model.eval()})).softmax(1)
    bert.model.train()
    torch.testing.assert_close(evaluator.probabilities(bert.model, "t"), expected, rtol=1e-5, atol=1e-6)
    assert bert.model.training
    assert evaluator.labels("t").tolist() == labels
    score = evaluator(bert.model, "t")
    assert score.value == pytest.approx((expected.argmax(1) == torch.tensor(labels)).double().mean())
    assert score.samples == len(labels)
    assert set(score.details) == {"nll", "expected_calibration_error"}


def test_label_names_follow_the_checkpoint_or_a_list_beside_the_data(bert):
    names = ["neutral", "good", "bad"]
    path = write_table(bert.root / "named.tsv", bert.texts, [names[i % 3] for i in range(len(bert.texts))])
    task = TaskData("t", path, bert.folder)
    with pytest.raises(ConfigError, match=r"labels are names.*labels\.json"):
        build_evaluator(options(), [task], "validation")
    (bert.root / "labels.json").write_text(json.dumps(names))
    assert build_evaluator(options(), [task], "validation").labels("t").tolist() == [i % 3 for i in range(23)]
    config = json.loads((bert.folder / "config.json").read_text())
    config["label2id"] = {"bad": 0, "good": 1, "neutral": 2}
    (bert.folder / "config.json").write_text(json.dumps(config))
    assert build_evaluator(options(), [task], "validation").labels("t").tolist()[:3] == [2, 1, 0]
    write_table(path, bert.texts, ["awful"] * 23)
    with pytest.raises(DataError, match="'awful' is none of the names"):
        build_evaluator(options(), [task], "validation")


def test_a_head_of_its_own_on_a_bare_encoder(bert):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(5, 16, generator=generator), torch.randn(5, generator=generator)
    save_file({"weight": weight, "bias": bias}, bert.root / "head.safetensors")
    path = write_table(bert.root / "data.tsv", bert.texts, [i % 5 for i in range(23)])
    task = TaskData("t", path, bert.folder, head=bert.root / "head.safetensors")
    evaluator = build_evaluator(options(), [task], "test")
    encoder = bert.model.bert.eval()
    for pooling in ("mean", "cls"):
        model = with_head(encoder, bert.root / "head.safetensors", pooling).eval()
        with torch.no_grad():
            hidden = [encoder(**bert.tokenizer(t, return_tensors="pt")).last_hidden_state[0] for t in bert.texts]
        pooled = torch.stack([h.mean(0) if pooling == "mean" else h[0] for h in hidden])
        expected = (pooled @ weight.T + bias).softmax(1)
        torch.testing.assert_close(evaluator.probabilities(model, "t"), expected, rtol=1e-5, atol=1e-6)
    save_file({"weight": weight[:, :8].contiguous(), "bias": bias}, bert.root / "narrow.safetensors")
    with pytest.raises(CheckpointError, match=r"`weight` is \(5, 8\).*width is 16"):
        with_head(encoder, bert.root / "narrow.safetensors", "mean")


def test_images_in_a_folder_for_each_class(tmp_path):
    from PIL import Image

    model = make_base("vit")
    folder = save(model, tmp_path / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16},
                 "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    colours = []
    for i in range(7):
        (tmp_path / "images" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (30 * i, 255 - 30 * i, 9)).save(tmp_path / "images" / str(i % 3) / f"{i}.png")
    files = sorted((tmp_path / "images").rglob("*.png"))
    for file in files:
        i = int(file.stem)
        colours.append([30 * i, 255 - 30 * i, 9])
    pixels = (torch.tensor(colours) / 255 * 2 - 1)[:, :, None, None].expand(7, 3, 16, 16)
    task = TaskData("t", tmp_path / "images", folder)
    evaluator = build_evaluator(options(kind="image_classification"), [task], "validation")
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits.softmax(1)
    torch.testing.assert_close(evaluator.probabilities(model, "t"), expected, rtol=1e-4, atol=1e-5)
    assert evaluator.labels("t").tolist() == [int(f.parent.name) for f in files]


def test_ready_inputs(tmp_path):
    model = make_base("vit")
    batches = make_batches("vit", 3, count=2)
    pixels = torch.cat([b["pixel_values"] for b in batches])
    labels = torch.arange(8) % 3
    save_file({"pixel_values": pixels, "label": labels}, tmp_path / "data.safetensors")
    task = TaskData("t", tmp_path / "data.safetensors", save(model, tmp_path / "vit"))
    evaluator = build_evaluator(options(kind="image_classification", samples=4), [task], "validation")
    assert evaluator.labels("t").tolist() == labels[::2].tolist()
    with torch.no_grad():
        expected = model(pixel_values=pixels[::2]).logits.softmax(1)
    torch.testing.assert_close(evaluator.probabilities(model, "t"), expected, rtol=1e-5, atol=1e-6)


def test_a_share_of_the_samples_is_part_of_a_larger_share():
    whole = random_rows(50, 1.0, 3)
    half, tenth = random_rows(50, 0.5, 3), random_rows(50, 0.1, 3)
    assert whole == list(range(50))
    assert set(tenth) < set(half)
    assert len(half) == 25
    assert random_rows(50, 0.5, 4) != half
    assert len(random_rows(50, 0.001, 0)) == 1


def test_the_subset_of_an_evaluator_is_scored_like_the_whole(bert):
    labels = [i % 3 for i in range(23)]
    path = write_table(bert.root / "data.tsv", bert.texts, labels)
    evaluator = build_evaluator(options(), [TaskData("t", path, bert.folder)], "validation")
    part = evaluator.subset(0.4, 7)
    rows = random_rows(23, 0.4, 7)
    assert part.labels("t").tolist() == [labels[i] for i in rows]
    torch.testing.assert_close(part.probabilities(bert.model, "t"), evaluator.probabilities(bert.model, "t")[rows])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_texts_under_a_language_model(tmp_path, architecture):
    model = make_base(architecture)
    folder = save(model, tmp_path / "model")
    tokenizer = tokenizer_in(folder)
    texts = [" ".join(WORDS[i : i + 2 + i]) for i in range(6)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    evaluator = build_evaluator(
        options(kind="language_model", max_length=6), [TaskData("t", tmp_path / "texts.txt", folder)], "validation"
    )
    total, tokens = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=6)["input_ids"]
            logits = model(input_ids=ids).logits
            total += float(nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
    found = evaluator(model, "t")
    assert found.details["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found.samples == len(texts)


def test_what_is_wrong_with_data_is_said(bert):
    task = TaskData("t", bert.root / "absent.tsv", bert.folder)
    with pytest.raises(ConfigError, match=r"task 't'.*absent\.tsv does not exist"):
        build_evaluator(options(), [task], "validation")
    path = write_table(bert.root / "data.tsv", bert.texts, [7] * 23)
    evaluator = build_evaluator(options(), [TaskData("t", path, bert.folder)], "validation")
    with pytest.raises(DataError, match=r"labels run from 7 to 7, the head of task 't' has the classes 0 to 2"):
        evaluator(bert.model, "t")
    with pytest.raises(ConfigError, match="no column 'target'"):
        build_evaluator(options(label_field="target"), [TaskData("t", path, bert.folder)], "validation")
    with pytest.raises(CheckpointError, match="gives no logits"):
        evaluator(bert.model.bert, "t")
    bad = make_base("bert")
    with torch.no_grad():
        bad.classifier.weight.fill_(float("nan"))
    path = write_table(bert.root / "data.tsv", bert.texts, [1] * 23)
    with pytest.raises(DataError, match="not finite"):
        build_evaluator(options(), [TaskData("t", path, bert.folder)], "validation")(bad, "t")


def test_functions(tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text("def score(model, task):\n    return len(task)\n")
    monkeypatch.syspath_prepend(tmp_path)
    section = options(kind="function", function="own_judge:score", tasks=["four"])
    assert build_evaluator(section, [], "validation")(nn.Identity(), "four").value == 4
    with pytest.raises(DataError, match=r"task 'a'.*returned None"):
        FunctionEvaluator(lambda model, task: None, ["a"], "validation")(nn.Identity(), "a")
    with pytest.raises(ConfigError, match=r"own_judge:other.*cannot be imported"):
        build_evaluator(options(kind="function", function="own_judge:other"), [], "validation")


def test_the_harness_in_process(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    folder = save(make_base("gpt2"), tmp_path / "model")
    tokenizer_in(folder)
    lines = [{"q": "the cat sat on a", "a": i % 2, "c": ["mat", "show"]} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    task = {
        "task": "own_choice", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "doc_to_choice": "{{c}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(yaml.safe_dump(task))
    section = options(kind="lm_eval", tasks=["own_choice"], include_path=str(tmp_path / "tasks"))
    evaluator = build_evaluator(section, [TaskData("t", None, folder)], "validation")
    found = evaluator(make_base("gpt2"), "own_choice")
    assert found.metric == "acc"
    assert found.samples == 6
    assert 0 <= found.value <= 1
