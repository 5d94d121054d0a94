from __future__ import annotations

import pytest

from bench import llama, memory


@pytest.mark.parametrize("samples", [0, 3], ids=["plain", "sequential"])
def test_memory_of_a_merge_is_measured_and_within_its_bound(tmp_path, samples):
    shapes = llama.llama_shapes(layers=1, hidden=64, intermediate=160, vocabulary=300, key_value=32)
    report = memory.run(tmp_path, experts=2, heads=4, shard="100KB", shapes=shapes, samples=samples)
    assert report["modules"] == 7
    assert 50 < report["peak_mib"] < report["bound_mib"]
    merged = tmp_path / "merged"
    assert (merged / "model.safetensors.index.json").exists() or (merged / "model.safetensors").exists()
