"""A sequential merge that was stopped, however it was stopped, goes on to the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bmm_engine import merge_sequential
from bmm_engine.errors import BmmError, CheckpointError, ConfigError, OutputExistsError, OutputWriteError
from bmm_engine.locks import LockFile
from bmm_engine.sequential.state import Sweep
from tests.architectures import ARCHITECTURES
from tests.tiny import family, fine_tune, make_batches

KILLS = int(os.environ.get("BMM_KILLS", "1"))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


class StoppedError(Exception):
    pass


@pytest.fixture
def models(tmp_path):
    _, _, base, experts = family("llama", tmp_path / "models")
    return base, experts, [make_batches("llama", 10 + t) for t in range(2)]


def stop_after(monkeypatch, count):
    """Die once `count` stages are finished."""
    publish, left = Sweep.publish, [count]

    def stopping(self, *args):
        if left[0] == 0:
            raise StoppedError
        left[0] -= 1
        return publish(self, *args)

    monkeypatch.setattr(Sweep, "publish", stopping)


@pytest.mark.parametrize("options", [{}, {"hidden_memory": 0, "norms": "fit"}, {"hidden_dtype": "bfloat16"}])
def test_it_goes_on_after_the_last_finished_block(models, tmp_path, monkeypatch, options):
    whole = merge_sequential(*models, sweeps=2, output=tmp_path / "whole", **options)
    # Before the blocks, two blocks, and, where there is something to solve, after them.
    stages = 2 * (3 + any(r.stage == "after the blocks" for r in whole.inputs))
    for count in range(stages):
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            with pytest.raises(StoppedError):
                merge_sequential(*models, sweeps=2, output=tmp_path / "parts", **options)
        assert not (tmp_path / "parts").exists()
        finished = sorted(p.name for p in (tmp_path / "parts.walk").glob("sweep-*/stage-*"))
        said = []
        parts = merge_sequential(*models, sweeps=2, output=tmp_path / "parts", report=said.append, **options)
        assert weights(tmp_path / "parts") == weights(tmp_path / "whole"), count
        assert [r.after for r in parts.inputs] == [r.after for r in whole.inputs]
        assert len(finished) == count
        assert not (tmp_path / "parts.walk").exists()
        subprocess.run(["rm", "-r", tmp_path / "parts"], check=True)


@pytest.mark.parametrize("architecture", ["t5", "albert"])
def test_several_chains_or_none_end_in_the_same_bits(architecture, tmp_path, monkeypatch):
    """A walk of several chains runs its finished blocks again; one of the whole model begins anew."""
    own = ARCHITECTURES[architecture]
    base, folders = own.make(), [tmp_path / name for name in ("base", "a", "b")]
    for number, folder in enumerate(folders):
        (fine_tune(base, number) if number else base).save_pretrained(folder)
    models = (folders[0], folders[1:], [[own.batch(10 * t + b) for b in range(3)] for t in range(2)])
    whole = merge_sequential(*models, output=tmp_path / "whole")
    assert len({record.stage for record in whole.inputs}) == (4 if architecture == "t5" else 1)
    merge_sequential(*models, output=tmp_path / "in-files", hidden_memory=0)
    assert weights(tmp_path / "in-files") == weights(tmp_path / "whole")
    for count in range(6 if architecture == "t5" else 1):
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            with pytest.raises(StoppedError):
                merge_sequential(*models, output=tmp_path / f"parts-{count}")
        parts = merge_sequential(*models, output=tmp_path / f"parts-{count}", hidden_memory=0 if count % 2 else "4GB")
        assert weights(tmp_path / f"parts-{count}") == weights(tmp_path / "whole"), count
        assert [r.after for r in parts.inputs] == [r.after for r in whole.inputs]


def test_what_is_finished_is_not_done_again(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedError):
            merge_sequential(*models, output=tmp_path / "out")
    from bmm_engine.sequential.modules import ModuleSolver

    solved, solve = [], ModuleSolver.solve
    monkeypatch.setattr(
        ModuleSolver,
        "solve",
        lambda self, stage, *rest, **more: (solved.append(stage), solve(self, stage, *rest, **more))[1],
    )
    said = []
    merge_sequential(*models, output=tmp_path / "out", report=said.append)
    assert said[0] == "going on after model.layers.0"
    assert set(solved) == {"model.layers.1"}


def test_another_merge_is_refused_and_nothing_of_the_first_is_lost(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedError):
            merge_sequential(*models, output=tmp_path / "out")
    before = sorted(p.relative_to(tmp_path) for p in (tmp_path / "out.walk").rglob("*"))
    base, experts, batches = models
    for what, change in (
        ("alpha", {"alpha": 0.5}),
        ("anchor", {"anchor": "ties"}),
        ("experts", {"experts": experts[::-1]}),
        ("calibration", {"batches": batches[::-1]}),
        ("fit_bias", {"fit_bias": False}),
    ):
        given = {"experts": experts, "batches": batches, **change}
        words = (
            rf"out\.walk: holds an unfinished sequential merge with another {what} .*, 2 stages of which .*--overwrite"
        )
        with pytest.raises(ConfigError, match=words) as caught:
            merge_sequential(base, given.pop("experts"), given.pop("batches"), output=tmp_path / "out", **given)
        assert len(str(caught.value)) < 1500
    assert before == sorted(p.relative_to(tmp_path) for p in (tmp_path / "out.walk").rglob("*"))
    whole = merge_sequential(*models, output=tmp_path / "whole", alpha=0.5)
    merge_sequential(*models, output=tmp_path / "out", alpha=0.5, overwrite=True)
    assert weights(tmp_path / "out") == weights(whole.path)
    assert not list(tmp_path.glob("*walk*"))


def test_after_an_error_the_corrected_recipe_runs(models, tmp_path):
    """One that ends before a stage is finished leaves nothing; what a kill left then is in nobody's way either."""
    base, experts, batches = models
    far = [[{**batch, "input_ids": batch["input_ids"].float()} for batch in own] for own in batches]
    with pytest.raises(BmmError):
        merge_sequential(base, experts, far, output=tmp_path / "out")
    assert not list(tmp_path.glob("*walk*"))
    whole = merge_sequential(*models, output=tmp_path / "whole")
    for name, stop in (("killed", StoppedError), ("killed early", KeyboardInterrupt)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sweep, "publish", mock.Mock(side_effect=stop))
            with pytest.raises(stop):
                merge_sequential(*models, output=tmp_path / name, alpha=0.7)
        assert (tmp_path / f"{name}.walk" / "anchor").exists()
        merge_sequential(*models, output=tmp_path / name)
        assert weights(tmp_path / name) == weights(whole.path)
        assert not (tmp_path / f"{name}.walk").exists()


def test_what_a_user_put_into_another_merges_folder_is_not_removed(models, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "publish", mock.Mock(side_effect=StoppedError))
        with pytest.raises(StoppedError):
            merge_sequential(*models, output=tmp_path / "out", alpha=0.7)
    (tmp_path / "out.walk" / "notes").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match=r"belongs to another merge, with another alpha .*'notes'.*Move it"):
            merge_sequential(*models, output=tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out.walk" / "notes").read_text() == "precious"
    assert (tmp_path / "out.walk" / "anchor").exists()


def test_a_second_process_is_refused(models, tmp_path):
    folder = tmp_path / "out.walk"
    folder.mkdir()
    lock = LockFile.open(folder / "lock", create=True)
    assert lock.acquire(0)
    try:
        with pytest.raises(OutputExistsError, match=f"process {os.getpid()} is at work"):
            merge_sequential(*models, output=tmp_path / "out")
    finally:
        lock.close()


@pytest.mark.parametrize("theirs", ["thesis.txt", "sweep-1/notes", "identity.json", "lock"])
def test_a_strangers_folder_is_refused_by_name_before_any_work(models, tmp_path, monkeypatch, theirs):
    file = tmp_path / "out.walk" / theirs
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    monkeypatch.setattr("bmm_engine.sequential.run.make_plan", None)
    name = theirs.split("/")[0]
    with pytest.raises(
        OutputExistsError, match=rf"out\.walk: was not made by a sequential merge.*'{name}/?'\. Move it"
    ):
        merge_sequential(*models, output=tmp_path / "out")
    assert file.read_text() == "precious"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_folder_of_its_own_is_refused(models, tmp_path, kind):
    place = tmp_path / "out.walk"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.write_text("precious")
    with pytest.raises(OutputExistsError, match=r"out\.walk: is no folder of its own"):
        merge_sequential(*models, output=tmp_path / "out")
    assert place.is_symlink() if kind == "link" else place.read_text() == "precious"


def test_an_empty_folder_is_adopted_and_what_is_put_into_it_later_is_kept(models, tmp_path, monkeypatch):
    folder = tmp_path / "out.walk"
    folder.mkdir()
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedError):
            merge_sequential(*models, output=tmp_path / "out")
    for name in ("notes", "sweep-1/stage-notes/notes", "sweep-1/stage-000/mine.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("precious")
    said = []
    merge_sequential(*models, output=tmp_path / "out", report=said.append)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert [line for line in said if "is kept, since it holds 'notes', 'sweep-1/stage-000/mine.bin'" in line]
    assert (folder / "notes").read_text() == (folder / "sweep-1/stage-000/mine.bin").read_text() == "precious"


def test_hidden_states_that_are_not_as_they_were_written_are_found_out(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedError):
            merge_sequential(*models, output=tmp_path / "out")
    (file,) = (tmp_path / "out.walk").glob("sweep-1/stage-001/merged-0.bin")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"merged-0\.bin: does not hold what was written.*Remove the folder"):
        merge_sequential(*models, output=tmp_path / "out")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_is_reported_and_what_is_finished_is_kept(models, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount here")

    def fill(line):
        """Called when the first block is done."""
        subprocess.run(["dd", "if=/dev/zero", f"of={small}/filler", "bs=1k"], capture_output=True)

    try:
        with pytest.raises(OutputWriteError, match=r"(?i)free some space"):
            merge_sequential(*models, output=small / "out", hidden_memory=0, report=fill)
        assert not (small / "out").exists()
        assert (small / "out.walk" / "sweep-1" / "stage-001").exists()
        (small / "filler").unlink()
        merge_sequential(*models, output=small / "out", hidden_memory=0)
        merge_sequential(*models, output=tmp_path / "whole")
        assert weights(small / "out") == weights(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(300 + 60 * KILLS)
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    family("bert", tmp_path)
    for t in range(2):
        batches = make_batches("bert", 10 + t, 6)
        save_file({k: torch.cat([b[k] for b in batches]) for k in batches[0]}, tmp_path / f"data-{t}.safetensors")
    recipe = {
        "base": "base",
        "experts": [{"model": f"expert-{t}", "calibration": f"data-{t}.safetensors"} for t in range(2)],
        "anchor": "tsv_m",
        "calibration": {"batch_size": 1},
        "sequential": {"sweeps": 2, "norms": "fit"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    command = [
        sys.executable,
        "-c",
        "from bmm_engine.cli import main; main()",
        "merge",
        "recipe.yaml",
        "--sequential",
        "--json",
    ]

    def start(output):
        return subprocess.Popen([*command, "-o", output], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    started = time.monotonic()
    out, err = start("whole").communicate(timeout=120)
    assert out, err
    duration, rng = time.monotonic() - started, random.Random(KILLS)
    for _ in range(KILLS):
        process = start("parts")
        time.sleep(rng.uniform(0.4, 1.0) * duration)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        subprocess.run(["rm", "-rf", "parts"], check=True)  # where it was done already
    out, err = start("parts").communicate(timeout=120)
    assert json.loads(out)["solved_modules"] == 13, err
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert not (tmp_path / "parts.walk").exists()
