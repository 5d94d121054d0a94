"""What is written is what is read, here and by the safetensors library."""

from __future__ import annotations

import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bmm_engine.checkpoint import Checkpoint, CheckpointWriter, StateDictSource, open_source, parse_size
from bmm_engine.checkpoint.safetensors_io import DTYPES
from bmm_engine.errors import ConfigError, MissingTensorError, ShapeMismatchError

SHAPES = [(), (0,), (1,), (7,), (3, 5), (0, 4), (4, 0), (2, 3, 5), (1, 1, 1, 9)]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern of the dtype, NaN included: only a copy of the bytes brings it through."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (nbytes,), dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(first: torch.Tensor, second: torch.Tensor) -> None:
    assert (first.shape, first.dtype) == (second.shape, second.dtype)
    assert bits(first) == bits(second)


def write(path: Path, tensors: dict[str, torch.Tensor], **options: object) -> Path:
    source = StateDictSource(tensors)
    with CheckpointWriter(path, [source.spec(name) for name in tensors], **options) as writer:  # type: ignore[arg-type]
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])
        return writer.commit()


@given(
    entries=st.lists(
        st.tuples(st.sampled_from(SHAPES), st.sampled_from(sorted(DTYPES))),
        min_size=1,
        max_size=12,
    ),
    max_shard_bytes=st.sampled_from([1, 40, 200, 10**9]),
)
def test_any_tensors_round_trip(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[tuple[int, ...], str]], max_shard_bytes: int
) -> None:
    tensors = {f"t{i}.{tag}": random_bits(shape, DTYPES[tag]) for i, (shape, tag) in enumerate(entries)}
    path = write(tmp_path_factory.mktemp("out") / "model", tensors, max_shard_bytes=max_shard_bytes)

    checkpoint = Checkpoint.open(path)
    assert set(checkpoint.names()) == set(tensors)
    assert len(checkpoint.names()) == len(tensors)
    by_library = {}
    for file in checkpoint.shard_sizes():
        by_library |= load_file(path / file)
        with safe_open(path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            order = [name for name in checkpoint.names() if checkpoint.spec(name).file == file]
            assert set(order) == set(opened.keys())
    for name, tensor in tensors.items():
        spec = checkpoint.spec(name)
        assert (spec.shape, spec.dtype, spec.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert_same(checkpoint.load(name), tensor)
        assert_same(by_library[name], tensor)


@pytest.mark.parametrize("tag", sorted(DTYPES))
def test_files_of_the_library_are_read(tmp_path: Path, tag: str) -> None:
    tensors = {f"t{i}": random_bits(shape, DTYPES[tag]) for i, shape in enumerate(SHAPES)}
    save_file(tensors, tmp_path / "weights.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "weights.safetensors")
    assert checkpoint.config is None
    for name, tensor in tensors.items():
        assert_same(checkpoint.load(name), tensor)


@given(rows=st.integers(0, 9), width=st.integers(0, 4), data=st.data())
def test_row_ranges_read_like_slices(
    tmp_path_factory: pytest.TempPathFactory, rows: int, width: int, data: st.DataObject
) -> None:
    tensor = random_bits((rows, width), torch.bfloat16)
    path = write(tmp_path_factory.mktemp("out") / "model", {"before": torch.ones(3), "w": tensor})
    bound = st.none() | st.integers(-11, 11)
    chosen = slice(data.draw(bound), data.draw(bound))
    for source in (Checkpoint.open(path), StateDictSource({"w": tensor})):
        assert_same(source.load("w", chosen), tensor[chosen])


@given(cuts=st.sets(st.integers(1, 12), max_size=5), seed=st.randoms(use_true_random=False))
def test_row_ranges_written_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, cuts: set[int], seed: random.Random
) -> None:
    tensor = random_bits((13, 3), torch.float16)
    edges = [0, *sorted(cuts), 13]
    spans = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
    seed.shuffle(spans)
    source = StateDictSource({"w": tensor})
    with CheckpointWriter(tmp_path_factory.mktemp("out") / "model", [source.spec("w")]) as writer:
        for span in spans:
            writer.write("w", tensor[span], rows=span)
        path = writer.commit()
    assert_same(Checkpoint.open(path).load("w"), tensor)


def test_strided_tensors_and_owned_memory(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    path = write(tmp_path / "model", {"t": base.t(), "every": base[::2, ::3]})
    checkpoint = Checkpoint.open(path)
    assert_same(checkpoint.load("t"), base.t().contiguous())
    loaded = StateDictSource({"t": base.t()}).load("t")
    loaded.zero_()
    assert base.sum() == 276
    assert loaded.is_contiguous()
    checkpoint.load("t").zero_()
    assert_same(checkpoint.load("t"), base.t().contiguous())


def test_order_is_file_then_offset(tmp_path: Path) -> None:
    tensors = {"z": torch.ones(2), "half": torch.ones(3).half(), "long": torch.ones(1).long(), "a": torch.ones(4)}
    path = write(tmp_path / "model", tensors, max_shard_bytes=24)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.names() == ("long", "z", "half", "a")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"]["a"] == "model-00002-of-00002.safetensors"
    assert checkpoint.shard_sizes() == {file.name: file.stat().st_size for file in path.glob("*.safetensors")}


def test_metadata_and_alignment(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3, dtype=torch.uint8), "d": torch.ones(2).double(), "f": torch.ones(1)}
    path = write(tmp_path / "model", tensors, metadata={"made_by": "test"})
    with safe_open(path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "made_by": "test"}
        assert opened.offset_keys() == ["d", "f", "b"]
    with (path / "model.safetensors").open("rb") as file:
        assert int.from_bytes(file.read(8), "little") % 8 == 0


def test_misuse_is_refused(tmp_path: Path) -> None:
    source = StateDictSource({"w": torch.ones(4, 2), "s": torch.tensor(1.0)})
    with CheckpointWriter(tmp_path / "model", [source.spec("w"), source.spec("s")]) as writer:
        with pytest.raises(ConfigError, match=r"'other' is not among the planned"):
            writer.write("other", torch.ones(1))
        with pytest.raises(ConfigError, match=r"'w': has dtype torch.float16, planned is torch.float32; cast"):
            writer.write("w", torch.ones(4, 2).half())
        with pytest.raises(ShapeMismatchError, match=r"'w': has shape \(2, 4\), planned is \(4, 2\)"):
            writer.write("w", torch.ones(2, 4))
        with pytest.raises(ShapeMismatchError, match=r"planned is \(2, 2\) for rows 2:4 of \(4, 2\)"):
            writer.write("w", torch.ones(4, 2), rows=slice(2, 6))
        with pytest.raises(ConfigError, match="'s' is a scalar"):
            writer.write("s", torch.tensor(1.0), rows=slice(0, 1))
        with pytest.raises(ConfigError, match="step 2"):
            writer.write("w", torch.ones(2, 2), rows=slice(0, 4, 2))
        writer.write("w", torch.ones(2, 2), rows=slice(1, 3))
        with pytest.raises(ConfigError, match="rows 2:4 are written a second time"):
            writer.write("w", torch.ones(2, 2), rows=slice(2, 4))
        writer.write("w", torch.ones(0, 2), rows=slice(2, 2))
        with pytest.raises(MissingTensorError, match="2 of 2 tensors were not written completely: w, s;"):
            writer.commit()
        for name in ("../evil.json", "", "..", "model.safetensors", "model.safetensors.index.json"):
            with pytest.raises(ConfigError, match="plain file name"):
                writer.write_text(name, "")
        with pytest.raises(ConfigError, match=r"x\.json: cannot be written as JSON"):
            writer.write_json("x.json", {"alpha": float("inf")})
    with pytest.raises(ConfigError, match="not open"):
        writer.write("w", torch.ones(4, 2))
    assert list(tmp_path.iterdir()) == []


def test_empty_tensors_must_be_written_too(tmp_path: Path) -> None:
    source = StateDictSource({"none": torch.ones(0, 3)})
    with CheckpointWriter(tmp_path / "model", [source.spec("none")]) as writer:
        with pytest.raises(MissingTensorError, match="none"):
            writer.commit()
        writer.write("none", torch.ones(0, 3))
        assert Checkpoint.open(writer.commit()).load("none").shape == (0, 3)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no tensors"),
        (["w", "w"], "'w' is listed twice"),
        (["__metadata__"], "__metadata__"),
    ],
)
def test_bad_specs(tmp_path: Path, specs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckpointWriter(tmp_path / "m", [StateDictSource({name: torch.ones(1)}).spec(name) for name in specs])


def test_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    spec = StateDictSource({"c": torch.ones(1, dtype=torch.complex128)}).spec("c")
    with pytest.raises(ConfigError, match=r"'c': safetensors cannot store torch.complex128; cast it"):
        CheckpointWriter(tmp_path / "m", [spec])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("512MiB", 2**29), ("1.5 gb", 15 * 10**8), ("200", 200), (17, 17), ("3B", 3), ("2TiB", 2**41)],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "5 XB", "-1GB", "0", 0, -3, True, "1e3", 1.5])
def test_bad_sizes(text: object) -> None:
    with pytest.raises(ConfigError, match="write it as 5GB"):
        parse_size(text)  # type: ignore[arg-type]


def test_open_source_takes_every_kind_of_model(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    path = write(tmp_path / "m", module.state_dict())
    state = StateDictSource(module.state_dict(), label="mine")
    for model in (module, module.state_dict(), path, str(path), state, Checkpoint.open(path)):
        assert_same(open_source(model).load("weight"), module.weight.detach())
    assert open_source(state) is state
    assert open_source(module, label="expert 2").label == "expert 2"
    with pytest.raises(ConfigError, match="type int is no model"):
        open_source(3)  # type: ignore[arg-type]
    with pytest.raises(MissingTensorError, match=r"expert 2: holds no tensor 'wieght'; the nearest names are 'weight'"):
        open_source(module, label="expert 2").load("wieght")


def test_several_threads_may_read_one_checkpoint_in_bin_shards(tmp_path):
    """A merge reads from several threads, and a bin file is unmapped when another one is read."""
    tensors = {f"w{i}": torch.full((50, 50), float(i)) for i in range(6)}
    index: dict[str, dict[str, str]] = {"weight_map": {}}
    for i, (name, tensor) in enumerate(tensors.items()):
        file = f"pytorch_model-{i + 1:05d}-of-00006.bin"
        torch.save({name: tensor}, tmp_path / file)
        index["weight_map"][name] = file
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint.open(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for name, found in pool.map(lambda name: (name, checkpoint.load(name)), list(tensors) * 50):
            assert torch.equal(found, tensors[name])
