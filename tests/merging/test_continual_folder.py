"""The directory of a continual merge is ours by its state; nothing else in it is deleted."""

from __future__ import annotations

import json
import os

import pytest

from bmm_engine.errors import CheckpointError, ConfigError, OutputExistsError
from bmm_engine.merging.continual import ContinualMerge
from tests.killed import models
from tests.tiny import family


def opened(path):
    return ContinualMerge(models()[0], state=path, modules=["a", "b"])


@pytest.mark.parametrize(
    "name", ["notes", "step-00001/model.safetensors", "step-notes/a", ".step-00001.partial-1-ab/out/a"]
)
def test_a_strangers_folder_is_refused_by_name(tmp_path, name):
    file = tmp_path / "state" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(OutputExistsError, match=rf"is no state of a continual merge, and holds '{name.split('/')[0]}"):
        opened(tmp_path / "state")
    assert file.read_text() == "precious"


def test_what_is_put_into_ours_later_stays(tmp_path):
    state = tmp_path / "state"
    state.mkdir()  # an empty one is adopted
    merge, (first, second) = opened(state), models()[1:]
    merge.add(first)
    theirs = ["notes", "step-notes/a", "step-00001/notes", ".step-00009.partial-notes/a", "step-00009"]
    for name in theirs:
        (state / name).parent.mkdir(exist_ok=True)
        (state / name).write_text("precious")
    merge.add(second)
    merge.write(tmp_path / "out")
    assert [(state / name).read_text() for name in theirs] == ["precious"] * 5
    assert not (state / "step-00001" / "model.safetensors").exists()
    assert opened(state).count == 2


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_state_that_is_no_regular_file_is_refused(tmp_path, kind):
    file = tmp_path / "continual.json"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to(tmp_path / "absent")
    else:
        file.mkdir()
    with pytest.raises(CheckpointError, match="no regular file"):
        opened(tmp_path)


def test_an_expert_of_another_function_is_refused_as_by_merge(tmp_path):
    _, _, base, experts = family("llama", tmp_path / "models")
    config = json.loads((experts[1] / "config.json").read_text())
    (experts[1] / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    merge = ContinualMerge(base, state=tmp_path / "state")
    merge.add(experts[0])
    with pytest.raises(
        ConfigError, match=r"expert-1: .*rms_norm_eps = 0\.001.*`add\(expert, unchecked_configs=True\)`"
    ):
        merge.add(experts[1])
    assert merge.count == 1
    merge.add(experts[1], unchecked_configs=True)
    assert merge.count == 2
