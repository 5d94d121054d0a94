"""Measured files: Grams, Fisher information and sensitivities, each in a merge that reads them."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.case import Case, Invalid, Unjudged
from tests.fuzz.material import Material
from tests.fuzz.oracles import differs
from tests.fuzz.place import displace
from tests.fuzz.reading import metadata_in, model_in, parse_json, tensors_in
from tests.fuzz.tensors import joined, mutate_tensors, split
from tests.fuzz.text import mutate_json

ALPHA = 0.03
_RECIPES = {
    "grams": "anchor: average\nmode: plain\ngram_source: data\nalpha: 0.03\ntask_weights: none\noutput_weights: none\n",
    "fisher": "anchor: {name: fisher, normalize: false, floor: 0}\nalpha: .inf\n",
    "sensitivity": "anchor: average\nmode: plain\ngram_source: data\nalpha: 0.03\ntask_weights: none\noutput_weights: sensitivity\n",
}
_FORMATS = {"grams": "bmm-grams", "fisher": "bmm-fisher", "sensitivity": "bmm-sensitivity"}


def make_measured_case(rng: random.Random, material: Material, folder: Path) -> Case:
    what = rng.choice(("grams", "grams", "fisher", "sensitivity"))
    kinds = ["grams", "sensitivity"] if what == "sensitivity" else [what]
    material.copy(folder, "llama", *(f"measured/{kind}-{i}.safetensors" for kind in kinds for i in range(2)))
    experts = [
        {"model": f"llama/expert-{i}", **{kind: f"measured/{kind}-{i}.safetensors" for kind in kinds}} for i in range(2)
    ]
    (folder / "recipe.yaml").write_text(f"base: llama/base\nexperts: {json.dumps(experts)}\n{_RECIPES[what]}")
    victim = rng.randrange(2)
    path = folder / "measured" / f"{what}-{victim}.safetensors"
    pristine = path.read_bytes()
    did = _mutate(rng, path, what, victim)
    names = (path.name,)
    return Case(
        f"{path.name}: {did}",
        ["merge", "recipe.yaml", "-o", "out"],
        names,
        lambda _: _check(folder, what, victim, pristine),
    )


def _mutate(rng: random.Random, path: Path, what: str, victim: int) -> str:
    action = rng.random()
    if action < 0.08:
        return displace(rng, path)
    if action < 0.14:
        shutil.copyfile(path.with_name(f"{what}-{1 - victim}.safetensors"), path)
        return "is the other expert's"
    header, data = split(path.read_bytes())
    if action < 0.5:
        record = json.loads(next(iter(header["__metadata__"].values())))
        key = next(iter(header["__metadata__"]))
        did, text = mutate_json(
            rng, record, ("rows", "modules", "fingerprints", "weights_dtype", "kind", "version", "unread")
        )
        header["__metadata__"] = {key: text.encode("utf-8", "replace").decode()}
        path.write_bytes(joined(header, data))
        return f"record: {did}"
    if action < 0.75:
        did, data = _other_values(rng, header, data)
        path.write_bytes(joined(header, data))
        return did
    did, content = mutate_tensors(rng, path.read_bytes())
    path.write_bytes(content)
    return did


def _other_values(rng: random.Random, header: dict[str, Any], data: bytes) -> tuple[str, bytes]:
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    begin, end = entry["data_offsets"]
    dtype = {"F32": torch.float32, "F64": torch.float64}[entry["dtype"]]
    tensor = torch.frombuffer(bytearray(data[begin:end]), dtype=dtype).reshape(entry["shape"]).clone()
    change = rng.choice(("zero", "negative", "half", "asymmetric", "indefinite", "nan", "tiny", "huge", "one negative"))
    if change == "zero":
        tensor.zero_()
    elif change == "negative":
        tensor.neg_()
    elif change == "half":
        tensor.mul_(0.5)
    elif change == "asymmetric":
        tensor.view(-1)[min(1, tensor.numel() - 1)] += tensor.abs().max()
    elif change == "indefinite" and tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]:
        tensor -= 0.9 * tensor.diagonal().max() * torch.eye(tensor.shape[0], dtype=dtype)
    elif change == "nan":
        tensor.view(-1)[rng.randrange(tensor.numel())] = math.nan
    elif change == "one negative":
        tensor.view(-1)[0] = -tensor.abs().max()
    else:
        tensor.mul_({"tiny": 1e-30, "huge": 1e30}.get(change, 1.0))
    return f"{name} {change}", data[:begin] + tensor.numpy().tobytes() + data[end:]


def _check(folder: Path, what: str, victim: int, pristine: bytes) -> str | None:
    try:
        for path in (folder / "measured").iterdir():
            if path.is_symlink() and not path.exists():
                raise Invalid(f"{path.name} leads nowhere")
        sets = [_read(folder, what, index) for index in range(2)]
    except Invalid as error:
        return f"accepted: {error}"
    base = model_in(folder / "llama" / "base")
    tuned = [model_in(folder / "llama" / f"expert-{i}") for i in range(2)]
    got = model_in(folder / "out")
    if what == "sensitivity":
        path = folder / "measured" / f"{what}-{victim}.safetensors"
        if _same(path, pristine):
            return None
        raise Unjudged("other sensitivities, which are well formed")
    for name in base:
        values = [own[name].double() for own in tuned]
        mean = (values[0] + values[1]) / 2
        expected = _solved(sets, name, values, mean) if what == "grams" else _fisher(sets, name, values, mean)
        if wrong := differs(name, got[name], expected, 1e-4):
            return wrong
    return None


def _same(path: Path, pristine: bytes) -> bool:
    header, data = split(pristine)
    return path.read_bytes() == joined(header, data) or path.read_bytes() == pristine


def _read(folder: Path, what: str, index: int) -> dict[str, Any]:
    """One file, once all of it is known to make sense for its expert."""
    path = folder / "measured" / f"{what}-{index}.safetensors"
    tensors, metadata = tensors_in(path), metadata_in(path)
    if _FORMATS[what] not in metadata:
        raise Invalid("no record in the file")
    record = parse_json(metadata[_FORMATS[what]])
    if not isinstance(record, dict) or record.get("version") != 1 or isinstance(record.get("version"), bool):
        raise Invalid("the record has no version, or another")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.double()).all():
            raise Invalid(f"{name} holds NaN or infinity")
    weights = model_in(folder / "llama" / f"expert-{index}")
    check = {"grams": _check_grams, "fisher": _check_fisher, "sensitivity": _check_sensitivity}[what]
    check(record, tensors, weights)
    return {"record": record, "tensors": tensors}


def _check_prints(record: dict[str, Any], weights: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    prints = record.get("fingerprints")
    if not isinstance(prints, dict):
        raise Invalid("no fingerprints")
    for name, weight in names.items():
        found = hashlib.sha256(weights[weight].contiguous().numpy().tobytes()).hexdigest()[:16]
        if prints.get(name) != found:
            raise Invalid(f"the fingerprint of {name} is {str(prints.get(name))[:40]!r}, not {found}")
    if record.get("weights_dtype") != "float32":
        raise Invalid(f"weights_dtype is {str(record.get('weights_dtype'))[:40]!r}")


def _check_grams(record: dict[str, Any], tensors: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    modules, rows = record.get("modules"), record.get("rows")
    if (
        not isinstance(modules, dict)
        or not isinstance(rows, dict)
        or not all(isinstance(v, str) for v in modules.values())
    ):
        raise Invalid("no modules or rows")
    if record.get("kind", "expert") != "expert":
        raise Invalid(f"kind is {str(record['kind'])[:40]!r}")
    for module, group in modules.items():
        gram = tensors.get(f"gram.{group}")
        if gram is None or group not in rows:
            raise Invalid(f"{module} has no Gram {group!r}")
        _check_square(f"gram.{group}", gram)
        if type(rows[group]) is not int or rows[group] < 1:
            raise Invalid(f"{group} has {str(rows[group])[:40]} rows")
        if f"{module}.weight" not in weights:
            raise Unjudged(f"a module {module[:40]!r}, which the expert has not")
    _check_prints(record, weights, {m: f"{m}.weight" for m in modules})


def _check_square(name: str, matrix: torch.Tensor) -> None:
    wide = matrix.double()
    if wide.dim() != 2 or wide.shape[0] != wide.shape[1]:
        raise Invalid(f"{name} is no square")
    largest = float(wide.abs().max())
    if not largest > 0:
        raise Invalid(f"{name} is zero")
    if float((wide - wide.mT).abs().max()) > 1e-5 * largest:
        raise Invalid(f"{name} is not symmetric")
    if float(torch.linalg.eigvalsh(wide)[0]) < -1e-4 * largest:
        raise Invalid(f"{name} is indefinite")


def _check_fisher(record: dict[str, Any], tensors: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    names = [name.removeprefix("fisher.") for name in tensors]
    if missing := sorted(set(weights) - set(names)):
        raise Invalid(f"no Fisher information of {missing[0]}")
    for name, tensor in tensors.items():
        if (tensor < 0).any():
            raise Invalid(f"{name} is negative")
        own = weights.get(name.removeprefix("fisher."))
        if own is not None and own.shape != tensor.shape:
            raise Invalid(f"{name} has another shape")
    _check_prints(record, weights, {n: n for n in weights if n in names})


def _check_sensitivity(
    record: dict[str, Any], tensors: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> None:
    names = [name.removeprefix("sensitivity.") for name in tensors]
    unread = record.get("unread", [])
    if not isinstance(unread, list) or not all(name in names for name in unread):
        raise Invalid(f"unread is {str(unread)[:40]}")
    for name, tensor in tensors.items():
        if name.removeprefix("sensitivity.") in unread:
            if tensor.any():
                raise Invalid(f"{name} is told as unread, and is not zero")
        else:
            _check_square(name, tensor)
    _check_prints(record, weights, {n: f"{n}.weight" for n in names if f"{n}.weight" in weights})
    if lost := sorted(n for n in names if f"{n}.weight" not in weights):
        raise Unjudged(f"a sensitivity of {lost[0]!r}, which the expert has not")


def _solved(sets: list[dict[str, Any]], name: str, values: list[torch.Tensor], mean: torch.Tensor) -> torch.Tensor:
    """`W = M + sum_t (W_t - M) G_t (sum_t G_t + lam I)^-1`, `lam = alpha trace(sum_t G_t) / in`."""
    module = name.removesuffix(".weight")
    if any(module not in own["record"]["modules"] for own in sets):
        return mean
    grams = []
    for own in sets:
        group = own["record"]["modules"][module]
        grams.append(own["tensors"][f"gram.{group}"].double() / own["record"]["rows"][group])
    total = sum(grams)
    width = total.shape[0]
    total = total + ALPHA * total.trace() / width * torch.eye(width, dtype=torch.float64)
    pull = sum((value - mean) @ gram for value, gram in zip(values, grams))
    return mean + torch.linalg.solve(total, pull.mT).mT


def _fisher(sets: list[dict[str, Any]], name: str, values: list[torch.Tensor], mean: torch.Tensor) -> torch.Tensor:
    information = [own["tensors"][f"fisher.{name}"].double() for own in sets]
    total = information[0] + information[1]
    weighted = sum(f * v for f, v in zip(information, values)) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, weighted, mean)
