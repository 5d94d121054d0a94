"""Files that are cut while they are read: a typed error in every case, and never the signal that a mapped file would end the process with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from bmm_engine.checkpoint import Checkpoint
from bmm_engine.errors import CheckpointError
from bmm_engine.pipeline.models import live_model
from bmm_engine.statistics.grams import GramAccumulator, GramSet
from bmm_engine.statistics.sensitivity import SensitivitySet
from tests.tiny import make_base, save

_LEFT = 2048  # bytes: of what was mapped beyond, no page could be read


def _in_a_child(read: Callable[[], object], said: Path) -> None:
    """Run `read` in a forked process, which a signal may end; `said` gets the message of its `CheckpointError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks of a process with threads
        pid = os.fork()
    if not pid:
        code = 1
        try:
            read()
        except CheckpointError as error:
            said.write_text(str(error))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0  # negative: the signal


def _cut_while_read(path: Path, what: str) -> None:
    """Read what is at `path`, whose file is cut once it is open."""
    file = path if path.is_file() else next(path.glob("*.bin"), path / "model.safetensors")
    if what == "model":
        whole = Checkpoint.load

        def load(self: Checkpoint, name: str) -> torch.Tensor:
            os.truncate(file, _LEFT)
            return whole(self, name)

        Checkpoint.load = load  # type: ignore[method-assign, assignment]
        live_model(Checkpoint.open(path))
        return
    if what == "tensor":
        opened: Any = Checkpoint.open(path)
        read = partial(opened.load, opened.names()[-1])
    else:
        opened = {"grams": GramSet, "sensitivity": SensitivitySet}[what].load(path)
        read = partial(opened.get, "a")
    read()
    os.truncate(file, _LEFT)
    read()


WIDTH = 128


def _make(folder: Path, what: str, suffix: str) -> Path:
    gram = GramAccumulator(WIDTH, name="a").update(torch.randn(200, WIDTH))
    if what == "grams":
        return GramSet({"a": gram}, {"a": "a"}, calibration="texts").save(folder / "grams.safetensors")
    if what == "sensitivity":
        return SensitivitySet({"a": gram.mean()}, calibration="texts").save(folder / "sensitivity.safetensors")
    model = make_base("bert")
    save(model, folder / "model")
    if suffix == "bin":
        torch.save(model.state_dict(), folder / "model" / "pytorch_model.bin")
        os.unlink(folder / "model" / "model.safetensors")
    return folder / "model"


@pytest.mark.parametrize(
    ("what", "suffix"),
    [("model", "safetensors"), ("model", "bin"), ("tensor", "bin"), ("grams", ""), ("sensitivity", "")],
)
def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path, what: str, suffix: str) -> None:
    path = _make(tmp_path, what, suffix)
    _in_a_child(partial(_cut_while_read, path, what), tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert "changed on disk since it was opened" in said
    assert path.name in said


def test_what_runs_is_what_transformers_loads(tmp_path: Path) -> None:
    """Its renames, fused experts, ties and dtypes included."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 30, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral", max_shard_size="8KB")
    save(make_base("gpt2"), tmp_path / "gpt2")
    for folder in ("mixtral", "gpt2"):
        live, _ = live_model(Checkpoint.open(tmp_path / folder), dtype="bfloat16")
        right = type(live).from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        assert not live.training
        ours, theirs = live.state_dict(), right.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(live.named_buffers(), right.named_buffers()))


def test_what_its_files_lack_is_told_with_their_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(make_base("bert"), tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    tensors["extra"] = tensors.pop("classifier.bias")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    live_model(Checkpoint.open(folder))
    assert "1 tensors are not in its files, and are random now: 'classifier.bias'" in caplog.text
    assert "1 tensors have no place in it: 'extra'" in caplog.text
    assert str(folder) in caplog.text
    caplog.clear()
    live_model(Checkpoint.open(folder), reports=False)
    assert not caplog.text
