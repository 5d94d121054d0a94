"""LoRA adapters over their base: files in PEFT's format, checked against the formula in float64, and against PEFT where it is installed."""

from __future__ import annotations

import json
import logging
import math
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bmm_engine.checkpoint import AdapterSource, Checkpoint, StateDictSource, input_record, is_adapter, open_adapter
from bmm_engine.errors import CheckpointError, MissingTensorError, ShapeMismatchError

WIDTH, HEIGHT, RANK = 12, 20, 4
PREFIX = "base_model.model."


def write(
    folder: Path, tensors: dict[str, Tensor], *, prefix: str = PREFIX, binary: bool = False, **options: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 10, "base_model_name_or_path": "org/base", **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
    if binary:
        torch.save(named, folder / "adapter_model.bin")
    else:
        save_file(named, folder / "adapter_model.safetensors")
    return folder


def pair(
    module: str, out: int = HEIGHT, width: int = WIDTH, rank: int = RANK, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": torch.randn(rank, width).to(dtype),
        f"{module}.lora_B.weight": torch.randn(out, rank).to(dtype),
    }


def product(tensors: dict[str, Tensor], module: str) -> Tensor:
    """B A in float64; of a convolution, flattened."""
    a, b = (tensors[f"{module}.lora_{letter}.weight"].double() for letter in "AB")
    return b.flatten(1) @ a.flatten(1)


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def assert_rows_are_the_whole(source: AdapterSource, name: str) -> None:
    """To the bit where the sum in float64 is rounded once; a float64 weight is that sum itself, and a BLAS may add it up otherwise for few rows."""
    whole = source.load(name)
    rounding = 4 * torch.finfo(torch.float64).eps if whole.dtype == torch.float64 else 0.0
    for rows in (slice(0, 1), slice(3, 8), slice(5, None), slice(-2, None), slice(4, 4)):
        torch.testing.assert_close(source.load(name, rows), whole[rows], rtol=rounding, atol=rounding)


def encoder(*names: str, dtype: torch.dtype = torch.float32) -> StateDictSource:
    """A base of linear modules (20, 12) with biases."""
    tensors = {}
    for name in names or ("encoder.0.query", "encoder.0.key", "encoder.1.query"):
        tensors[f"{name}.weight"] = torch.randn(HEIGHT, WIDTH).to(dtype)
        tensors[f"{name}.bias"] = torch.randn(HEIGHT).to(dtype)
    return StateDictSource(tensors, "the base")


# The formula


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_base_plus_scaled_product(
    tmp_path: Path, base_dtype: torch.dtype, adapter_dtype: torch.dtype, binary: bool
) -> None:
    base = encoder(dtype=base_dtype)
    tensors = pair("encoder.0.query", dtype=adapter_dtype)
    source = AdapterSource(base, write(tmp_path, tensors, binary=binary))
    name, wide = "encoder.0.query.weight", torch.float64 if base_dtype == torch.float64 else torch.float32
    delta = 10 / RANK * product(tensors, "encoder.0.query")
    merged = source.load(name)
    assert (merged.dtype, source.spec(name).dtype, source.spec(name).shape) == (wide, wide, (HEIGHT, WIDTH))
    assert error(merged, base.load(name).double() + delta) < (1e-15 if wide == torch.float64 else 5e-8)
    assert_rows_are_the_whole(source, name)
    factors = source.low_rank(name)
    assert factors is not None
    assert (factors.dtype, factors.rank) == (wide, RANK)
    assert error(factors.dense(), delta) < 1e-7
    assert source.changed == (name,)
    for other in (n for n in base.names() if n != name):
        assert torch.equal(source.load(other), base.load(other))
        assert source.spec(other) == base.spec(other)
        assert source.low_rank(other) is None


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 10 / 4),
        ({"lora_alpha": 7.5}, 7.5 / 4),
        ({"use_rslora": True}, 10 / 2),
        ({"rank_pattern": {"query": 4}, "r": 8}, 10 / 4),
        ({"alpha_pattern": {"0.query": 3}}, 3 / 4),
        ({"alpha_pattern": {"uery": 3, "1.query": 5}}, 10 / 4),  # a part of a name, another module
        ({"alpha_pattern": {r"encoder\.\d+\.query": 3, "query": 5}}, 3 / 4),  # the first that matches
        ({"alpha_pattern": {"^encoder.0.query": 3}}, 3 / 4),
        ({"alpha_pattern": {"query.weight": 3}}, 10 / 4),
        ({"alpha_pattern": {"key|query": 3}, "rank_pattern": {"key|query": 4}, "r": 2, "use_rslora": True}, 3 / 2),
    ],
)
def test_scaling(tmp_path: Path, options: dict[str, Any], scaling: float) -> None:
    base, tensors = encoder(), pair("encoder.0.query")
    source = AdapterSource(base, write(tmp_path, tensors, **options))
    truth = base.load("encoder.0.query.weight").double() + scaling * product(tensors, "encoder.0.query")
    assert error(source.load("encoder.0.query.weight"), truth) < 1e-7


def test_name_of_the_adapter_in_the_keys(tmp_path: Path) -> None:
    base, tensors = encoder(), pair("encoder.0.query")
    named = {name.replace(".weight", ".math.weight"): tensor for name, tensor in tensors.items()}
    plain = AdapterSource(base, write(tmp_path / "plain", tensors))
    for prefix in (PREFIX, ""):
        source = AdapterSource(base, write(tmp_path / "named", named, prefix=prefix))
        assert torch.equal(source.load("encoder.0.query.weight"), plain.load("encoder.0.query.weight"))


def test_transposed_weights(tmp_path: Path) -> None:
    """GPT-2's are stored (in, out): the shape tells, and where it does not, the config."""
    base = StateDictSource({"c_attn.weight": torch.randn(12, 20), "c_proj.weight": torch.randn(12, 12)}, "gpt2")
    tensors = pair("c_attn") | pair("c_proj", 12, 12)
    source = AdapterSource(base, write(tmp_path, tensors, fan_in_fan_out=True))
    for module in ("c_attn", "c_proj"):
        delta = 2.5 * product(tensors, module)
        assert error(source.load(f"{module}.weight"), base.load(f"{module}.weight").double() + delta.mT) < 1e-7
        factors = source.low_rank(f"{module}.weight")
        assert factors is not None
        assert error(factors.dense(), delta) < 1e-7  # oriented
        assert_rows_are_the_whole(source, f"{module}.weight")
    # What the caller knows of the architecture has the last word.
    unsure = write(tmp_path / "unsure", tensors, fan_in_fan_out=False)
    known = AdapterSource(base, unsure, transposed=["transformer.c_attn.weight", "transformer.c_proj.weight"])
    assert torch.equal(known.load("c_proj.weight"), source.load("c_proj.weight"))
    with pytest.raises(CheckpointError, match=r"fan_in_fan_out=False.*square 'c_proj\.weight'.*transposed=\["):
        AdapterSource(base, unsure)
    with pytest.raises(
        ShapeMismatchError, match=r"'c_attn' has A \(4, 12\) and B \(20, 4\).*'c_attn\.weight'.*\(12, 20\)"
    ):
        AdapterSource(base, unsure, transposed=[])
    plain = AdapterSource(base, write(tmp_path / "plain", pair("c_proj", 12, 12)))
    factors = plain.low_rank("c_proj.weight")
    assert factors is not None
    torch.testing.assert_close(factors.dense(), plain.load("c_proj.weight") - base.load("c_proj.weight"))


def test_embedding(tmp_path: Path) -> None:
    base = StateDictSource({"embed.weight": torch.randn(30, 8)}, "the base")
    for name in ("", ".default"):
        tensors = {
            f"embed.lora_embedding_A{name}": torch.randn(4, 30),
            f"embed.lora_embedding_B{name}": torch.randn(8, 4),
        }
        a, b = tensors.values()
        delta = 2.5 * (b.double() @ a.double()).mT
        source = AdapterSource(base, write(tmp_path, tensors))
        assert error(source.load("embed.weight"), base.load("embed.weight").double() + delta) < 1e-7
        assert_rows_are_the_whole(source, "embed.weight")
        factors = source.low_rank("embed.weight")
        assert factors is not None
        assert error(factors.dense(), delta) < 1e-7


@pytest.mark.parametrize("kernel", [(3,), (1, 1), (3, 2)])
def test_convolution(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    base = StateDictSource({"conv.weight": torch.randn(10, 6, *kernel)}, "the base")
    tensors = {
        "conv.lora_A.weight": torch.randn(4, 6, *kernel),
        "conv.lora_B.weight": torch.randn(10, 4, *(1 for _ in kernel)),
    }
    source = AdapterSource(base, write(tmp_path, tensors))
    truth = base.load("conv.weight").double() + 2.5 * product(tensors, "conv").reshape(10, 6, *kernel)
    assert error(source.load("conv.weight"), truth) < 1e-7
    assert_rows_are_the_whole(source, "conv.weight")
    assert source.low_rank("conv.weight") is None
    grouped = StateDictSource({"conv.weight": torch.randn(10, 3, *kernel)}, "the base")
    with pytest.raises(ShapeMismatchError, match="'conv' has A"):
        AdapterSource(grouped, tmp_path)


@pytest.mark.parametrize("magnitude_name", ["lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
def test_dora(tmp_path: Path, magnitude_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmm_engine.checkpoint.adapter._BLOCK_ELEMENTS", 50)
    base = StateDictSource({"linear.weight": torch.randn(20, 12), "conv1d.weight": torch.randn(12, 20)}, "the base")
    tensors = {f"{module}.{magnitude_name}": torch.rand(20) + 0.5 for module in ("linear", "conv1d")}
    tensors |= pair("linear") | pair("conv1d")
    source = AdapterSource(base, write(tmp_path, tensors, use_dora=True))
    for module, stored in (("linear", lambda w: w), ("conv1d", lambda w: w.mT)):
        changed = stored(base.load(f"{module}.weight")).double() + 2.5 * product(tensors, module)
        m = tensors[f"{module}.{magnitude_name}"].double()[:, None]
        truth = stored(m * changed / changed.norm(dim=1, keepdim=True))
        assert error(source.load(f"{module}.weight"), truth) < 5e-8
        assert_rows_are_the_whole(source, f"{module}.weight")
        assert source.low_rank(f"{module}.weight") is None


# What is trained whole


def test_biases_and_heads(tmp_path: Path) -> None:
    base = encoder()
    trained = {
        "encoder.0.query.base_layer.bias": torch.randn(HEIGHT),
        "encoder.1.query.bias": torch.randn(HEIGHT).half(),
        "classifier.dense.weight": torch.randn(3, HEIGHT),
        "encoder.0.key.weight": torch.randn(HEIGHT, WIDTH).half(),
        # What PEFT writes beside the module itself: what its wrapper holds.
        "encoder.0.key.original_module.bias": torch.zeros(HEIGHT),
        "encoder.0.key.modules_to_save.bias": torch.zeros(HEIGHT),
    }
    tensors = pair("encoder.0.query") | trained | {"encoder.0.query.lora_B.bias": torch.randn(HEIGHT)}
    folder = write(tmp_path, tensors, bias="all", lora_bias=True, modules_to_save=["key", "classifier"])
    source = AdapterSource(base, folder)
    for name in ("encoder.1.query.bias", "classifier.dense.weight", "encoder.0.key.weight"):
        assert torch.equal(source.load(name), trained[name])
        assert source.spec(name).dtype == trained[name].dtype
        assert source.low_rank(name) is None
    moved = trained["encoder.0.query.base_layer.bias"].double() + 2.5 * tensors["encoder.0.query.lora_B.bias"].double()
    assert error(source.load("encoder.0.query.bias"), moved) < 1e-7
    assert_rows_are_the_whole(source, "encoder.0.query.bias")
    assert source.names() == (*base.names(), "classifier.dense.weight")
    assert "classifier.dense.weight" in source
    assert set(source.changed) == {
        "encoder.0.query.weight",
        "encoder.0.query.bias",
        "encoder.1.query.bias",
        "encoder.0.key.weight",
    }
    with pytest.raises(MissingTensorError, match="holds no tensor 'other'"):
        source.load("other")


def test_weight_in_the_place_of_the_base_s(tmp_path: Path) -> None:
    """PEFT saves an adapted embedding's base with it, and one whose vocabulary has grown."""
    base = StateDictSource({"embed.weight": torch.randn(30, 8)}, "the base")
    tensors = {
        "embed.lora_embedding_A": torch.randn(4, 33),
        "embed.lora_embedding_B": torch.randn(8, 4),
        "embed.base_layer.weight": torch.randn(33, 8),
    }
    source = AdapterSource(base, write(tmp_path, tensors))
    a, b, stored = tensors.values()
    assert error(source.load("embed.weight"), stored.double() + 2.5 * (b.double() @ a.double()).mT) < 1e-7
    assert source.spec("embed.weight").shape == (33, 8)
    assert source.low_rank("embed.weight") is None


# Names


@pytest.mark.parametrize(("base_prefix", "adapter_prefix"), [("", "bert."), ("bert.", ""), ("bert.", "bert.")])
def test_prefix_of_the_base_model(tmp_path: Path, base_prefix: str, adapter_prefix: str) -> None:
    base = encoder(f"{base_prefix}encoder.0.query", f"{base_prefix}encoder.1.query")
    tensors = pair(f"{adapter_prefix}encoder.0.query") | {
        f"{adapter_prefix}encoder.1.query.bias": torch.randn(HEIGHT),
        "classifier.weight": torch.randn(3, HEIGHT),
    }
    source = AdapterSource(base, write(tmp_path, tensors, modules_to_save=["classifier"]))
    assert source.changed == (f"{base_prefix}encoder.0.query.weight", f"{base_prefix}encoder.1.query.bias")
    assert source.names() == (*base.names(), "classifier.weight")


def test_head_beside_a_prefixed_body(tmp_path: Path) -> None:
    base = encoder("bert.encoder.0.query", "classifier")
    head = torch.randn(HEIGHT, WIDTH)
    source = AdapterSource(
        base, write(tmp_path, pair("encoder.0.query") | {"classifier.weight": head}, modules_to_save=["classifier"])
    )
    assert source.changed == ("bert.encoder.0.query.weight", "classifier.weight")
    assert source.names() == base.names()


@pytest.mark.parametrize("file_prefix", ["", "vit."])
def test_names_of_the_live_model(tmp_path: Path, file_prefix: str) -> None:
    """Other names in the file than live, and either may lack the prefix."""
    base = StateDictSource(
        {f"{file_prefix}encoder.layer.0.attention.query.weight": torch.randn(HEIGHT, WIDTH)}, "the base"
    )
    tensors = pair("vit.layers.0.q_proj")
    write(tmp_path, tensors)
    live_names = {"vit.layers.0.q_proj.weight": "vit.encoder.layer.0.attention.query.weight"}
    with pytest.raises(MissingTensorError, match=r"'vit\.layers\.0\.q_proj\.weight'"):
        AdapterSource(base, tmp_path)
    (name,) = base.names()
    assert AdapterSource(base, tmp_path, live_names=live_names).changed == (name,)
    bare = {live.removeprefix("vit."): file.removeprefix("vit.") for live, file in live_names.items()}
    assert AdapterSource(base, tmp_path, live_names=bare).changed == (name,)
    # An adapter by the names of the file needs no map, and one does it no harm.
    write(tmp_path, pair("vit.encoder.layer.0.attention.query"))
    assert AdapterSource(base, tmp_path, live_names=live_names).changed == (name,)


def test_old_names_of_layer_norms(tmp_path: Path) -> None:
    base = StateDictSource({"q.weight": torch.randn(HEIGHT, WIDTH), "LayerNorm.beta": torch.randn(3)}, "the base")
    bias = torch.randn(3)
    source = AdapterSource(base, write(tmp_path, pair("q") | {"LayerNorm.bias": bias}, bias="all"))
    assert torch.equal(source.load("LayerNorm.beta"), bias)


@pytest.mark.parametrize("prefix", ["", "gpt."])
def test_into_a_live_model(tmp_path: Path, prefix: str) -> None:
    base = encoder("encoder.0.query", "encoder.1.query")
    head = torch.randn(3, HEIGHT)
    folder = write(tmp_path, pair("encoder.1.query") | {"head.weight": head}, modules_to_save=["head"])
    source = AdapterSource(base, folder)
    names = {f"live.{name}": f"{prefix}{name}" for name in base.names()} | {"live.head.weight": "head.weight"}
    changed = dict(source.live_tensors(names))
    assert changed.keys() == {"live.encoder.1.query.weight", "live.head.weight"}
    assert torch.equal(changed["live.encoder.1.query.weight"], source.load("encoder.1.query.weight"))
    assert torch.equal(changed["live.head.weight"], head)
    with pytest.raises(MissingTensorError, match=r"none of which the live model has \(it has 'other\.weight'\)"):
        list(source.live_tensors({"other.weight": "other.weight"}))


# Tied weights


def tied() -> StateDictSource:
    weight = torch.randn(30, 8)
    return StateDictSource({"embed.weight": weight, "lm_head.weight": weight}, "the tied base")


def test_a_change_on_one_side_of_a_tie(tmp_path: Path) -> None:
    embedding = {"embed.lora_embedding_A": torch.randn(4, 30), "embed.lora_embedding_B": torch.randn(8, 4)}
    whole = {"lm_head.weight": torch.randn(30, 8)}
    for tensors, changed, other in (
        (pair("lm_head", 30, 8), "lm_head", "embed"),
        (embedding, "embed", "lm_head"),
        (whole, "lm_head", "embed"),
    ):
        message = rf"changes '{changed}\.weight' but not '{other}\.weight', and the tied base ties.*tie_word_embeddings: false"
        with pytest.raises(CheckpointError, match=message):
            AdapterSource(tied(), write(tmp_path, tensors, modules_to_save=["lm_head"]))
    with pytest.raises(CheckpointError, match=r"changes 'embed\.weight', 'lm_head\.weight' but not alike"):
        AdapterSource(tied(), write(tmp_path, embedding | pair("lm_head", 30, 8)))
    with pytest.raises(CheckpointError, match="but not alike"):
        AdapterSource(
            tied(), write(tmp_path, whole | {"embed.weight": torch.randn(30, 8)}, modules_to_save=["lm_head", "embed"])
        )


def test_the_same_change_on_both_sides_of_a_tie(tmp_path: Path) -> None:
    base = tied()
    a, b = torch.randn(4, 30), torch.randn(8, 4)
    tensors = {
        "embed.lora_embedding_A": a,
        "embed.lora_embedding_B": b,
        "lm_head.lora_A.weight": b.mT,
        "lm_head.lora_B.weight": a.mT,
    }
    source = AdapterSource(base, write(tmp_path, tensors, ensure_weight_tying=True))
    truth = base.load("embed.weight").double() + 2.5 * (b.double() @ a.double()).mT
    for name in ("embed.weight", "lm_head.weight"):
        assert error(source.load(name), truth) < 1e-7
        assert source.spec(name).name == name
        assert source.low_rank(name) is not None
    assert (source.names(), source.aliases) == (("embed.weight",), {"lm_head.weight": "embed.weight"})
    whole = torch.randn(30, 8)
    folder = write(
        tmp_path, {"embed.weight": whole, "lm_head.weight": whole.clone()}, modules_to_save=["lm_head", "embed"]
    )
    assert torch.equal(AdapterSource(base, folder).load("lm_head.weight"), whole)


# Reading no more than needed


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"layer.{i}" for i in range(5)]
    base = encoder(*names)
    tensors = {key: tensor for name in names[:4] for key, tensor in pair(name).items()}
    source = AdapterSource(base, write(tmp_path, tensors))
    read: list[tuple[str, slice | None]] = []
    file, load = source._file.read, base.load
    monkeypatch.setattr(
        source._file.__class__, "read", lambda _, key, rows=None: read.append((key, rows)) or file(key, rows)
    )
    monkeypatch.setattr(base, "load", lambda name, rows=None: read.append((name, rows)) or load(name, rows))
    assert (source.names(), source.spec("layer.2.weight").dtype) == (base.names(), torch.float32)
    assert not read
    source.load("layer.2.weight", slice(3, 5))
    factors = [(f"{PREFIX}layer.2.lora_B.weight", slice(3, 5)), (f"{PREFIX}layer.2.lora_A.weight", None)]
    assert read == [("layer.2.weight", slice(3, 5)), *factors]
    read.clear()
    source.low_rank("layer.1.weight")
    assert {key for key, _ in read} == {f"{PREFIX}layer.1.lora_{letter}.weight" for letter in "AB"}
    read.clear()
    source.load("layer.4.weight")
    assert read == [("layer.4.weight", None)]


# What is refused


@pytest.mark.parametrize(
    "options",
    [
        {"peft_type": "ADALORA"},
        {"peft_type": None},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"megatron_config": {"x": 1}},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["experts.down_proj"]},
        {"alora_invocation_tokens": [5]},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"kasa_config": {"x": 1}},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
    ],
)
def test_not_a_plain_lora(tmp_path: Path, options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: .*{key}.*merge_and_unload") as caught:
        AdapterSource(encoder(), write(tmp_path, pair("encoder.0.query"), **options))
    assert str(next(iter(options.values()))) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0 is no positive integer"),
        ({"lora_alpha": "high"}, "lora_alpha='high' is no positive number"),
        ({"rank_pattern": {"query": 2.5}}, r"rank_pattern\['query'\]=2\.5"),
        ({"alpha_pattern": {"que(ry": 2}}, r"alpha_pattern: 'que\(ry' is no regular expression"),
        ({"alpha_pattern": [3]}, r"alpha_pattern=\[3\] is no map"),
        ({"modules_to_save": "classifier"}, "modules_to_save='classifier' is no list"),
        ({"modules_to_save": {"classifier": 1}}, "modules_to_save={'classifier': 1} is no list"),
        ({"modules_to_save": 3}, "modules_to_save=3 is no list"),
        ({"r": -4}, "r=-4 is no positive integer"),
        ({"r": "4"}, "r='4' is no positive integer"),
        ({"r": 4.0}, "r=4.0 is no positive integer"),
        ({"r": True}, "r=True is no positive integer"),
        ({"r": 10**9}, "r=1000000000 is more than 65536"),
        ({"lora_alpha": 0}, "lora_alpha=0 is no positive number"),
        ({"lora_alpha": -16}, "lora_alpha=-16 is no positive number"),
        ({"lora_alpha": "16"}, "lora_alpha='16' is no positive number"),
        ({"lora_alpha": [16]}, r"lora_alpha=\[16\] is no positive number"),
        ({"lora_alpha": math.nan}, "the value of .lora_alpha. is nan"),
        ({"lora_alpha": math.inf}, "the value of .lora_alpha. is inf"),
        ({"lora_alpha": 1e30}, r"lora_alpha=1e\+30 is more than 1000000"),
        ({"lora_alpha": 10**400}, r"lora_alpha=1000.*is more than 1000000"),
        ({"lora_alpha": None}, "lora_alpha=None is no positive number"),
        ({"alpha_pattern": {"query": "8"}}, r"alpha_pattern\['query'\]='8' is no positive number"),
        ({"rank_pattern": "query"}, "rank_pattern='query' is no map"),
        ({"rank_pattern": ""}, "rank_pattern='' is no map"),
        ({"alpha_pattern": False}, "alpha_pattern=False is no map"),
        ({"modules_to_save": ""}, "modules_to_save='' is no list"),
        ({"use_rslora": "false"}, "use_rslora = 'false': it should be a valid boolean"),
        ({"use_rslora": 0}, "use_rslora = 0: it should be a valid boolean"),
        ({"use_dora": "no"}, "use_dora = 'no': it should be a valid boolean"),
        ({"fan_in_fan_out": "False"}, "fan_in_fan_out = 'False': it should be a valid boolean"),
        ({"use_qalora": "false"}, "use_qalora = 'false': it should be a valid boolean"),
        ({"lora_dropout": "0.1"}, "lora_dropout = '0.1': it should be a valid number"),
        ({"target_modules": [["query"]]}, r"target_modules.* it should be a valid string"),
        ({"target_modules": {"query": 1}}, "target_modules.* it should be a valid"),
        (
            {"base_model_name_or_path": ["org/base"]},
            r"base_model_name_or_path = \['org/base'\]: it should be a valid string",
        ),
        ({"bias": "some"}, "bias = 'some': it should be 'none', 'all' or 'lora_only'"),
        ({"bias": ["none"]}, r"bias = \['none'\]: it should be 'none'"),
        ({"init_lora_weights": [True]}, "init_lora_weights.* it should be a valid"),
        ({"layers_to_transform": "3"}, "layers_to_transform.* it should be a valid"),
    ],
)
def test_config_that_makes_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: .*{message}") as caught:
        AdapterSource(encoder(), write(tmp_path, pair("encoder.0.query"), **options))
    assert len(str(caught.value)) < 1500


def test_keys_that_peft_may_add_are_let_pass(tmp_path: Path) -> None:
    tensors = pair("encoder.0.query")
    plain = AdapterSource(encoder(), write(tmp_path / "plain", tensors))
    options = {
        "eva_config": None,
        "corda_config": None,
        **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "modules_to_save")),
        "peft_version": "0.19",
        "qalora_group_size": 16,
    }
    more = AdapterSource(plain.base, write(tmp_path / "more", tensors, **options))
    assert torch.equal(more.load("encoder.0.query.weight"), plain.load("encoder.0.query.weight"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_B.bias"])
def test_factors_that_are_quantised(tmp_path: Path, part: str, dtype: torch.dtype) -> None:
    tensors = pair("encoder.0.query") | {"encoder.0.query.lora_magnitude_vector": torch.ones(HEIGHT)}
    tensors["encoder.0.query.lora_B.bias"] = torch.ones(HEIGHT)
    tensors[f"encoder.0.query.{part}"] = tensors[f"encoder.0.query.{part}"].to(dtype)
    with pytest.raises(CheckpointError, match=rf"{part}' is {dtype}, .* quantised .*float32"):
        AdapterSource(encoder(), write(tmp_path, tensors, use_dora=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
def test_factors_that_are_not_finite_are_the_adapters_fault(tmp_path: Path, part: str, value: float) -> None:
    tensors = pair("encoder.0.query")
    tensors[f"encoder.0.query.{part}"].view(-1)[:2] = value
    source = AdapterSource(encoder(), write(tmp_path, tensors))
    for read in (source.load, source.low_rank):
        with pytest.raises(
            CheckpointError, match=rf"adapter_model\.safetensors: .*{part}' holds 2 values that are NaN"
        ):
            read("encoder.0.query.weight")


A, B = (f"encoder.0.query.lora_{letter}.weight" for letter in "AB")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({B: None}, CheckpointError, "'encoder.0.query' has lora_A, but no lora_B"),
        (
            {A: torch.ones(RANK, 13)},
            ShapeMismatchError,
            r"'encoder.0.query' has A \(4, 13\) and B \(20, 4\).*\(20, 12\)",
        ),
        ({B: torch.ones(20, 3)}, ShapeMismatchError, r"A \(4, 12\) and B \(20, 3\), but rank 4 by .*adapter_config"),
        ({A: torch.ones(RANK)}, ShapeMismatchError, r"A \(4,\)"),
        (pair("encoder.0.value"), MissingTensorError, r"'encoder.0.value.weight'; the nearest .*'org/base'"),
        ({"encoder.0.value.bias": torch.ones(3)}, MissingTensorError, r"trains tensors .*'encoder\.0\.value\.bias'"),
        ({"encoder.0.query.lora_E": torch.ones(3)}, CheckpointError, "lora_E' is not part of a plain LoRA"),
        ({"e.token_adapter.trainable_tokens_delta": torch.ones(3)}, CheckpointError, "is not part of a plain LoRA"),
        ({"encoder.0.query.lora_A.b.weight": torch.ones(RANK, 12)}, CheckpointError, "are the same part of one module"),
        ({"encoder.0.query.lora_magnitude_vector": torch.ones(20)}, CheckpointError, "but use_dora is not set"),
        (pair("bert.encoder.0.query"), CheckpointError, "both mean 'encoder.0.query.weight'"),
        ({"encoder.0.query.lora_B.bias": torch.ones(3)}, ShapeMismatchError, r"has shape \(3,\).*\(20,\)"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, change: dict[str, Tensor | None], kind: type[Exception], message: str
) -> None:
    tensors = {n: t for n, t in (pair("encoder.0.query") | change).items() if t is not None}
    with pytest.raises(kind, match=message):
        AdapterSource(encoder(), write(tmp_path, tensors))


def test_dora_without_magnitude(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="but no lora_magnitude_vector"):
        AdapterSource(encoder(), write(tmp_path, pair("encoder.0.query"), use_dora=True))
    tensors = pair("encoder.0.query") | {"encoder.0.query.lora_magnitude_vector": torch.ones(3)}
    with pytest.raises(ShapeMismatchError, match=r"magnitude of shape \(3,\)"):
        AdapterSource(encoder(), write(tmp_path, tensors, use_dora=True))


def test_nothing_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: holds no tensors"):
        AdapterSource(encoder(), write(tmp_path, {}))


def test_bias_of_a_module_without_one(tmp_path: Path) -> None:
    base = StateDictSource({"q.weight": torch.ones(HEIGHT, WIDTH)}, "the base")
    with pytest.raises(CheckpointError, match=r"'q' has a lora_B\.bias, but the base the base has no bias"):
        AdapterSource(base, write(tmp_path, pair("q") | {"q.lora_B.bias": torch.ones(HEIGHT)}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base = StateDictSource({"q.weight": torch.ones(HEIGHT, WIDTH).to(dtype)}, "the base")
    with pytest.raises(
        CheckpointError, match=rf"the base: is quantised .*'q\.weight'.*{dtype}.*original floating-point"
    ):
        AdapterSource(base, write(tmp_path, pair("q")))


# Files and the hub


def test_what_is_an_adapter(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", pair("q"))
    assert is_adapter(folder)
    assert is_adapter(str(folder))
    model = tmp_path / "model"
    model.mkdir()
    save_file({"q.weight": torch.ones(2)}, model / "model.safetensors")
    assert not is_adapter(model)
    assert not is_adapter(model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"PEFT adapter, not a full model; .* can be an expert"):
        Checkpoint.open(folder)
    (folder / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"a PEFT adapter .* and a full model \(model\.safetensors\)"):
        is_adapter(folder)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        is_adapter(tmp_path / "missing")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        open_adapter(folder, encoder())


def test_record(tmp_path: Path) -> None:
    source = open_adapter(str(write(tmp_path, pair("encoder.0.query"))), encoder())
    record = input_record("expert 1", source)
    assert (record["source"], record["adapter_of"]) == (str(tmp_path), "the base")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert {name: file["bytes"] for name, file in record["files"].items()} == sizes
    assert set(sizes) == {"adapter_model.safetensors", "adapter_config.json"}
    assert all(len(file["sha256"]) == 64 for file in record["files"].values())
    assert source.trained_on == "org/base"


@pytest.mark.parametrize("binary", [False, True])
def test_adapter_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binary: bool) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--adapter" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    write(snapshot, pair("encoder.0.query"), binary=binary)
    files = [path.name for path in snapshot.iterdir()]
    asked: dict[str, Any] = {}
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda hub_id, **options: asked.update(options) or str(snapshot)
    )
    assert is_adapter("org/adapter")
    source = open_adapter("org/adapter", encoder())
    assert (source.label, source.hub_id, source.revision) == ("org/adapter", "org/adapter", commit)
    assert input_record("expert", source)["revision"] == commit
    assert all(any(fnmatchcase(name, pattern) for pattern in asked["allow_patterns"]) for name in files)


# In a merge


def test_a_merge_of_adapters_is_the_merge_of_the_models(tmp_path: Path) -> None:
    from bmm_engine.merging.merge import merge

    names = [f"layer.{i}" for i in range(3)]
    base = {f"{name}.weight": torch.randn(HEIGHT, WIDTH) for name in names}
    adapters, whole = [], []
    for t in range(2):
        tensors = {key: tensor for name in names for key, tensor in pair(name).items()}
        tensors["head.weight"] = torch.randn(3, WIDTH)
        folder = write(tmp_path / str(t), tensors, modules_to_save=["head"])
        adapters.append(AdapterSource(StateDictSource(base), folder))
        whole.append({f"{n}.weight": (base[f"{n}.weight"].double() + 2.5 * product(tensors, n)).float() for n in names})
    options: dict[str, Any] = {"modules": ["*"], "task_weights": "energy"}
    got, truth = merge(base, adapters, **options), merge(base, whole, **options)
    assert got.tensors is not None
    assert truth.tensors is not None
    for name, tensor in truth.tensors.items():
        assert error(got.tensors[name], tensor.double()) < 1e-6
    assert all(names == ["head.weight"] for names in got.summary()["left_out_of_experts"].values())


# PEFT's own numbers


def peft_case(name: str) -> tuple[str, dict[str, Any]]:
    bert = ["query", "value", "dense"]
    return {
        "bert": ("bert", {"target_modules": bert}),
        "bert rslora": ("bert", {"target_modules": bert, "use_rslora": True}),
        "bert patterns": (
            "bert",
            {
                "target_modules": bert,
                "rank_pattern": {"query": 3, r"encoder\.layer\.1\.output\.dense": 2},
                "alpha_pattern": {r".*\.1\.attention.*": 5, "attention.output.dense": 7},
            },
        ),
        "bert heads and biases": (
            "bert",
            {"target_modules": bert, "bias": "all", "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
        ),
        "bert lora_only": ("bert", {"target_modules": bert, "bias": "lora_only"}),
        "bert lora_bias": ("bert", {"target_modules": bert, "lora_bias": True}),
        "bert embeddings": ("bert", {"target_modules": ["word_embeddings", "query"]}),
        "bert dora": ("bert", {"target_modules": ["word_embeddings", *bert], "use_dora": True}),
        "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        "gpt2 dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
        "llama": ("llama", {"target_modules": "all-linear"}),
        "vit": ("vit", {"target_modules": ["q_proj", "projection", "fc1"], "modules_to_save": ["classifier"]}),
        "vit dora": ("vit", {"target_modules": ["q_proj", "projection"], "use_dora": True}),
    }[name]


PEFT_CASES = [
    *(
        "bert",
        "bert rslora",
        "bert patterns",
        "bert heads and biases",
        "bert lora_only",
        "bert lora_bias",
        "bert embeddings",
    ),
    *("bert dora", "gpt2", "gpt2 dora", "llama", "vit", "vit dora"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PEFT_CASES)
def test_as_peft_merges_it(tmp_path: Path, case: str) -> None:
    peft = pytest.importorskip("peft")
    from bmm_engine.models.architecture import linear_modules
    from bmm_engine.models.naming import checkpoint_names
    from tests import tiny

    logging.getLogger("peft").setLevel(logging.ERROR)
    architecture, options = peft_case(case)
    model = tiny.make_base(architecture)
    live_names = checkpoint_names(model)
    transposed = [m.weight for m in linear_modules(model, ["*"]).values() if m.transposed]
    tiny.save(model, tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=10, init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    truth = adapted.merge_and_unload().state_dict()
    live = tiny.make_base(architecture)
    with torch.no_grad():
        for name, tensor in open_adapter(tmp_path / "adapter", base, live_names=live_names).live_tensors(live_names):
            live.get_parameter(name).copy_(tensor)
    for name, tensor in live.state_dict().items():
        torch.testing.assert_close(tensor, truth[name], rtol=2e-6, atol=2e-6)
    for hint in ({}, {"transposed": transposed}):
        source = open_adapter(tmp_path / "adapter", base, live_names=live_names, **hint)
        assert source.changed
        for live, tensor in truth.items():
            name = live_names[live]
            merged = source.load(name)
            torch.testing.assert_close(merged, tensor, rtol=2e-6, atol=2e-6)
            assert name in source.changed or name in base.aliases or torch.equal(merged, base.load(name))
            factors = source.low_rank(name)
            if factors is not None and math.prod(factors.shape):
                stored = factors.mT if live in transposed else factors
                torch.testing.assert_close(stored.dense(), merged - base.load(name), rtol=1e-5, atol=1e-6)
