"""What is promised of bits: merges from the same files do not depend on the number of threads. (What is measured may.)"""

from __future__ import annotations

import math

import pytest
import torch

import bmm_engine as bmm
from bmm_engine.solving.moments import DenseMoment
from bmm_engine.solving.task_weights import task_energy
from tests.tiny import family, make_batches


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    _, experts, base, paths = family("bert", folder)
    grams = [
        bmm.collect_grams(expert, make_batches("bert", t)).save(folder / f"grams-{t}.safetensors")
        for t, expert in enumerate(experts)
    ]
    return base, paths, grams


def on_threads(count, call):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


MERGES = {
    "data": {"grams": True},
    "hybrid": {"grams": True, "hybrid": 0.5},
    "data-free": {},
    "energy": {"grams": True, "task_weights": "energy"},
    "biases": {"grams": True, "fit_bias": True},
    "ties": {"anchor": "ties", "alpha": math.inf},
    "regmean": {"grams": True, "anchor": "regmean", "alpha": math.inf},
    "bfloat16": {"grams": True, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", MERGES)
def test_merges_from_the_same_files_are_the_same_bytes_on_any_number_of_threads(kind, files, tmp_path):
    base, paths, grams = files
    options = dict(MERGES[kind])
    if options.pop("grams", False):
        options["grams"] = grams

    def merged(name):
        path = bmm.merge(base, paths, **options, output=tmp_path / name, progress=False).path
        return (path / "model.safetensors").read_bytes()

    one, two, three = (on_threads(count, lambda count=count: merged(f"on-{count}")) for count in (1, 2, 3))
    assert one == two == three


@pytest.mark.parametrize("seed", range(4))
def test_energies_do_not_depend_on_threads_where_sums_are_cut_by_them(seed):
    generator = torch.Generator().manual_seed(seed)
    x, change = (torch.randn(700, 513, generator=generator) for _ in range(2))
    moment = DenseMoment(x.mT @ x, 700)
    assert len({on_threads(count, lambda: task_energy(moment, change)) for count in (1, 2, 3)}) == 1
