"""What lies beside the weights comes along: by a rule, whole folders where the model names them, never weights or a training's state."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bmm_engine import merge
from bmm_engine.checkpoint import Checkpoint
from bmm_engine.checkpoint.sidecars import sidecar_files
from bmm_engine.errors import CheckpointError
from tests.checkpoint.test_models import copy_checkpoint
from tests.tiny import family

NEEDED = [
    *("sentencepiece.bpe.model", "vocab.txt", "spiece.model", "tekken.json", "source.spm", "qwen.tiktoken", "tokenizer.model.v3", "bpe.codes"),
    *("vocab.bpe", "dict.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json", "chat_templates/tool_use.jinja"),
    *("additional_chat_templates/rag.jinja", "video_preprocessor_config.json", "preprocessor_config.json", "feature_extractor_config.json"),
    *("LICENSE", "LICENSE.txt", "license.md", "LICENSE.pdf", "Llama-LICENSE", "NOTICE", "Notice.txt", "USE_POLICY.md", "COPYING"),
    *("generation_config.json", "dataset_statistics.json", "mel_filters.npz", "speaker_embeddings_path.json", "prompts/en/a.npy"),
    *("voices/af.pt", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
]  # fmt: skip
LEFT = [
    *("README.md", "model-00001-of-00009.safetensors", "pytorch_model.bin", "tf_model.h5", "rust_model.bin", "model.onnx_data", "flax_model.msgpack"),
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin", "training_args.json"),
    *("all_results.json", "eval_results.txt", "events.out.tfevents.17", "train.log", "train.csv", "corpus.jsonl", "plot.png", "run.sh"),
    *(".git/config", ".gitattributes", ".env", "checkpoint-500/tokenizer.json", "checkpoint-500/config.json", "runs/a/events.out.tfevents.1"),
    *("onnx/config.json", "data/train.txt", "modeling_x.py", "x.index.json", "adapter_config.json", "bmm_merge.json"),
]  # fmt: skip


def filled(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith("config.json") else name)
    return folder


def beside(folder: Path) -> set[str]:
    return set(sidecar_files(folder, None).files)


def test_every_kind_comes_along_and_no_weights(tmp_path: Path) -> None:
    folder = filled(tmp_path / "model", *NEEDED, *LEFT)
    (folder / "speaker_embeddings_path.json").write_text(
        '{"repo_or_path": "suno/bark", "en": {"a": "prompts/en/a.npy"}}'
    )
    assert beside(folder) == set(NEEDED)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling_x.Model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "processing_x.X"}}),
        ("modules.json", [{"idx": 0, "path": "", "type": "custom_st.Transformer"}]),
    ],
)
def test_code_comes_where_the_model_runs_it(tmp_path: Path, name: str, content: object) -> None:
    code = {"modeling_x.py", "layers/attention.py", "layers/deep/ops.py"}
    folder = filled(tmp_path / "model", *code, "layers/notes.txt", "layers/__pycache__/a.pyc", ".git/a.py")
    assert beside(folder) == set()
    (folder / name).write_text(json.dumps(content))
    config = content if name == "config.json" else None
    assert set(sidecar_files(folder, config).files) == code | {name}  # type: ignore[arg-type]


def sentence_transformer(folder: Path) -> Path:
    """As sentence-transformers writes one, with a dense module of its own weights."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    text = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{t}"}
        for i, (p, t) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(text))
    filled(
        folder, "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"
    )
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "query: "}}')
    filled(folder, "README.md", "sentence_bert_config.json")
    return folder


def test_a_sentence_transformer_is_one_after_the_merge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModel

    _, _, base, experts = family("bert", tmp_path)
    sentence_transformer(base)
    out = merge(base, experts, output=tmp_path / "out", progress=False).path
    assert out is not None
    assert (out / "2_Dense" / "model.safetensors").read_text() == "2_Dense/model.safetensors"
    assert not (out / "2_Dense" / "pytorch_model.bin").exists()  # the other form of the same
    assert json.loads((out / "config_sentence_transformers.json").read_text())["prompts"] == {"query": "query: "}
    for module in json.loads((out / "modules.json").read_text())[1:3]:
        assert (out / module["path"] / "config.json").exists()
    assert "the modules beside the model are copied from the base, not merged: 2_Dense/model.safetensors" in caplog.text
    assert "merged" in (out / "README.md").read_text()
    AutoModel.from_pretrained(out)
    files = json.loads((out / "bmm_merge.json").read_text())["files"]
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors"} <= set(files)
    # All of it is ours, so it can be replaced; a file put into one of its folders is not.
    merge(base, experts[:1], output=out, overwrite=True, progress=False)
    (out / "1_Pooling" / "notes").write_text("precious")
    with pytest.raises(Exception, match="1_Pooling/notes"):
        merge(base, experts, output=out, overwrite=True, progress=False)


def test_a_model_in_a_folder_is_pointed_at(tmp_path: Path) -> None:
    _, _, base, _ = family("bert", tmp_path / "old")
    os.rename(base, tmp_path / "old" / "0_Transformer")
    with pytest.raises(CheckpointError, match=r"Its folder '0_Transformer' holds a model: pass .*old/0_Transformer"):
        Checkpoint.open(tmp_path / "old")
    Checkpoint.open(tmp_path / "old" / "0_Transformer")


def test_a_snapshot_of_the_hub_is_links_to_blobs_in_folders_too(tmp_path: Path) -> None:
    _, _, base, _ = family("bert", tmp_path)
    sentence_transformer(base)
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in base.rglob("*") if p.is_file())):
        blob = repository / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    out = copy_checkpoint(Checkpoint.open(snapshot), tmp_path / "out", 10**9)
    copied = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= copied
    assert not any(p.is_symlink() for p in out.rglob("*"))
    (snapshot / "1_Pooling" / "config.json").unlink()
    (snapshot / "1_Pooling" / "config.json").symlink_to(base / "config.json")
    with pytest.raises(
        CheckpointError, match=r"1_Pooling/config\.json: is a link to .*base/config\.json, outside .*models--org--name"
    ):
        copy_checkpoint(Checkpoint.open(snapshot), tmp_path / "out2", 10**9)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b", 3, None])
def test_modules_may_not_lead_outside(tmp_path: Path, path: object) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path, "type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(CheckpointError, match=r"modules\.json: names the folder .*, which is no path inside"):
        sidecar_files(tmp_path, None)


def test_what_cannot_come_is_said_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = filled(tmp_path / "model", "vocab.txt")
    (folder / "notes").symlink_to(tmp_path / "secret")
    (folder / "elsewhere").symlink_to(tmp_path)  # a folder
    os.mkfifo(folder / "pipe")
    found = sidecar_files(folder, None)
    assert set(found.files) == {"vocab.txt"}
    assert set(found.left_out) == {"notes", "pipe"}
    assert "outside" in found.left_out["notes"]
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"LICENSE: is a link to .*secret, outside"):
        sidecar_files(folder, None)


def test_a_killed_run_that_copied_is_cleaned_by_the_next(tmp_path: Path) -> None:
    """Names that no list holds are known for ours by the marker of the stage."""
    import subprocess
    import sys

    source = tmp_path / "in"
    code = (
        "import os, sys, torch\nfrom pathlib import Path\nfrom safetensors.torch import save_file\n"
        "from bmm_engine.checkpoint import Checkpoint, CheckpointWriter\n"
        "source = Path(sys.argv[1]); (source / '1_Pooling').mkdir(parents=True)\n"
        "save_file({'w': torch.ones(2)}, source / 'model.safetensors')\n"
        "for name in ('NOTICE', 'odd name', '1_Pooling/x.yaml'): (source / name).write_text('{}')\n"
        "base = Checkpoint.open(source)\n"
        "with CheckpointWriter(sys.argv[2], [base.spec('w')]) as writer:\n"
        "    assert len(writer.copy_sidecars(base)) == 3\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "out")]).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    copy_checkpoint(Checkpoint.open(source), tmp_path / "out", 10**9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert torch.equal(Checkpoint.open(tmp_path / "out").load("w"), torch.ones(2))


def test_what_cannot_come_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, base, experts = family("bert", tmp_path)
    (tmp_path / "secret").write_text("secret")
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    monkeypatch.setattr("bmm_engine.merging.merge.run_stream", lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(CheckpointError, match=r"LICENSE: is a link to .*secret, outside"):
        merge(base, experts, output=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
