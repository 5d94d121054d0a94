from __future__ import annotations

from bench import sequential


def test_a_small_sequential_merge_is_timed(tmp_path):
    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100,
    }  # fmt: skip
    report = sequential.run(tmp_path, experts=2, sentences=20, anchor="average", target="module", shape=shape)
    assert report["modules"] == 12
    assert report["target"] == "module"
    assert report["seconds"] > 0
    assert report["peak_mib"] > 50
    tokens = [int(b["attention_mask"].sum()) for t in range(2) for b in sequential.make_batches(t, 20, 100)]
    assert report["tokens"] == sum(tokens)
