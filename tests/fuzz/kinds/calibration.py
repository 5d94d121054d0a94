"""Calibration: texts, tables, model inputs and pictures; the Grams are those of the samples that a strict reader finds."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests.fuzz.case import Case, Invalid, Unjudged
from tests.fuzz.material import Material
from tests.fuzz.oracles import differs
from tests.fuzz.place import displace
from tests.fuzz.reading import parse_json, regular, tensors_in
from tests.fuzz.tensors import mutate_tensors
from tests.fuzz.text import ODD_JSON, mutate_bytes
from tests.tiny import VOCABULARY

_ODD_CELLS = (
    "",
    '""',
    '"',
    "null",
    "None",
    "NaN",
    "x,y",
    '"a\nb"',
    "\x00",
    "\ufeff",
    "é" * 10,
    "w" * 200_000,
    "[b]",
    "\t",
    " ",
    "\u2028",
    "\x85",
    "\x0c",
)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def make_calibration_case(rng: random.Random, material: Material, folder: Path) -> Case:
    kind = rng.choice(("txt", "jsonl", "csv", "tsv", "safetensors", "safetensors", "pictures"))
    if kind == "pictures":
        return _make_pictures_case(rng, material, folder)
    material.copy(folder, "llama/expert-0", f"texts/rows.{kind}")
    path = folder / "texts" / f"rows.{kind}"
    if rng.random() < 0.08:
        did = displace(rng, path)
    elif kind == "safetensors":
        did, content = _mutate_inputs(rng, path)
        path.write_bytes(content)
    else:
        did, content = _mutate_rows(rng, kind, path.read_bytes())
        path.write_bytes(content)
    argv = ["collect", "llama/expert-0", f"texts/rows.{kind}", "-o", "grams.safetensors"]
    return Case(f"rows.{kind}: {did}", argv, (path.name,), lambda _: _check_rows(folder, path))


def _mutate_rows(rng: random.Random, kind: str, content: bytes) -> tuple[str, bytes]:
    if rng.random() < 0.45:
        return mutate_bytes(rng, content)
    lines = content.decode().splitlines()
    at = rng.randrange(len(lines))
    if kind == "jsonl":
        odd = rng.choice(ODD_JSON)
        form = rng.choice(('{{"text": {}, "label": 1}}', '{{"text": "the cat", "text": {}}}', "{}", '{{"label": {}}}'))
        lines[at] = form.format(odd)
        did = f"line {at + 1} is {lines[at][:60]}"
    else:
        odd = rng.choice(_ODD_CELLS)
        cut = {"csv": ",", "tsv": "\t"}.get(kind)
        cells = lines[at].split(cut) if cut else [lines[at]]
        action = rng.randrange(4)
        if action == 0:
            cells[rng.randrange(len(cells))] = odd
        elif action == 1:
            cells.append(odd)
        elif action == 2:
            cells.pop()
        else:
            cells.insert(0, odd)
        lines[at] = (cut or " ").join(cells)
        did = f"line {at + 1} is {lines[at][:60]!r}"
    return did, ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _mutate_inputs(rng: random.Random, path: Path) -> tuple[str, bytes]:
    if rng.random() < 0.35:
        return mutate_tensors(rng, path.read_bytes())
    tensors = tensors_in(path)
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    did = rng.choice(
        ("id too large", "id negative", "id huge", "ids as floats", "ids as int32", "mask of twos", "mask negative", "mask of floats",
         "mask other shape", "other samples", "scalar", "one dimension", "three dimensions", "odd name", "extra name", "no ids",
         "longer than positions", "no samples", "no columns", "all padding", "labels too", "mask alone", "position ids")
    )  # fmt: skip
    row, column = rng.randrange(ids.shape[0]), rng.randrange(ids.shape[1])
    if did.startswith("id "):
        ids[row, column] = {"id too large": VOCABULARY, "id negative": -1, "id huge": 10**12}[did]
    elif did == "ids as floats":
        tensors["input_ids"] = ids.float()
    elif did == "ids as int32":
        tensors["input_ids"] = ids.int()
    elif did == "mask of twos":
        mask[row] = 2
    elif did == "mask negative":
        mask[row, column] = -1
    elif did == "mask of floats":
        tensors["attention_mask"] = mask.float() * 0.5
    elif did == "mask other shape":
        tensors["attention_mask"] = mask[:, :-1].contiguous()
    elif did == "other samples":
        tensors["attention_mask"] = mask[:-1].contiguous()
    elif did == "scalar":
        tensors["input_ids"] = torch.tensor(3)
    elif did == "one dimension":
        tensors = {name: tensor[0].contiguous() for name, tensor in tensors.items()}
    elif did == "three dimensions":
        tensors["input_ids"] = ids[..., None].expand(-1, -1, 2).contiguous()
    elif did == "odd name":
        odd = rng.choice(
            ("", "x", "inputs", "self", "Input_IDs", "[/b]", "input_ids ", "kwargs", "return_dict", "n" * 3000)
        )
        tensors = {odd: ids, "attention_mask": mask}
    elif did == "extra name":
        odd = rng.choice(
            ("x", "token_type_ids", "self", "use_cache", "output_attentions", "return_dict", "logits_to_keep")
        )
        tensors[odd] = torch.zeros_like(ids)
    elif did == "no ids" or did == "mask alone":
        del tensors["input_ids"]
    elif did == "longer than positions":
        tensors = {"input_ids": ids.repeat(1, 8), "attention_mask": mask.repeat(1, 8)}
    elif did == "no samples":
        tensors = {name: tensor[:0].contiguous() for name, tensor in tensors.items()}
    elif did == "no columns":
        tensors = {name: tensor[:, :0].contiguous() for name, tensor in tensors.items()}
    elif did == "all padding":
        mask.zero_()
    elif did == "labels too":
        tensors["labels"] = ids.clone()
    else:
        tensors["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape[0], -1).contiguous()
    return did, save(tensors)


def _check_rows(folder: Path, path: Path) -> str | None:
    try:
        ready = path.suffix == ".safetensors"
        batch = _inputs_of(path) if ready else _batch_of(folder, _rows_of(path.suffix, regular(path)))
    except Invalid as error:
        return f"accepted: {error}"
    return _check_grams(folder, folder / "llama" / "expert-0", [batch])


def _check_grams(folder: Path, model: Path, batches: list[dict[str, Any]]) -> str | None:
    import transformers

    from bmm_engine import collect_grams

    config = json.loads((model / "config.json").read_text())
    live = getattr(transformers, config["architectures"][0]).from_pretrained(model).eval()
    right = collect_grams(live, batches)
    got = tensors_in(folder / "grams.safetensors")
    for group in dict.fromkeys(right.modules.values()):
        if wrong := differs(group, got[f"gram.{group}"], right.get(group).total, 1e-3):
            return wrong
    return None


def _batch_of(folder: Path, rows: list[str]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    if not rows:
        raise Invalid("no rows")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama" / "expert-0")
    batch = tokenizer(rows, padding=True, truncation=True, max_length=128, return_tensors="pt")
    return dict(batch)


def _rows_of(suffix: str, content: bytes) -> list[str]:
    """The texts, without those that are empty."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Invalid(f"no UTF-8: {error}") from None
    if suffix == ".txt":
        rows = re.split(r"\r\n|\r|\n", text)
    elif suffix == ".jsonl":
        rows = [_cell(parse_json(line, finite=False)) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    elif suffix == ".csv":
        rows = _csv_cells(text)
    else:
        lines = re.split(r"\r\n|\r|\n", text)
        header = lines[0].split("\t")
        if header.count("text") != 1 or len(set(header)) < len(header):
            raise Invalid("no column of texts, or a column twice")
        rows = []
        for line in lines[1:]:
            cells = line.split("\t", len(header) - 1)
            if line.strip() and len(cells) < len(header):
                raise Invalid("a row with too few cells")
            rows += cells[header.index("text") :][:1]
    for row in rows:
        if "\0" in row:
            raise Unjudged("a NUL in a text")
    return [row for row in rows if row.strip()]


def _cell(row: Any) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise Invalid(f"a row without a text: {str(row)[:40]}")
    try:
        row["text"].encode("utf-8")
    except UnicodeEncodeError:
        raise Invalid("a lone surrogate") from None
    return row["text"]


def _csv_cells(text: str) -> list[str]:
    try:
        table = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise Invalid(f"no CSV: {error}") from None
    if not table or table[0].count("text") != 1:
        raise Invalid("no column of texts")
    if len(set(table[0])) < len(table[0]):
        raise Invalid("a column twice")
    if any(len(row) != len(table[0]) for row in table[1:]):
        raise Invalid("a row of another number of cells")
    return [row[table[0].index("text")] for row in table[1:]]


def _inputs_of(path: Path) -> dict[str, torch.Tensor]:
    tensors = tensors_in(path)
    allowed = {"input_ids", "attention_mask", "position_ids", "labels"}
    if unknown := sorted(set(tensors) - allowed):
        raise Invalid(f"an input called {unknown[0][:40]!r}")
    if "input_ids" not in tensors:
        raise Invalid("no input_ids")
    ids = tensors["input_ids"]
    if ids.dtype not in (torch.int64, torch.int32):
        raise Invalid(f"ids of {ids.dtype}")
    if ids.dim() != 2 or not ids.numel():
        raise Invalid(f"ids of shape {tuple(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= VOCABULARY:
        raise Invalid(f"ids between {int(ids.min())} and {int(ids.max())}")
    mask = tensors.get("attention_mask")
    if mask is not None and (mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all()):
        raise Invalid("a mask that is none")
    return tensors


def _make_pictures_case(rng: random.Random, material: Material, folder: Path) -> Case:
    material.copy(folder, "vit/expert-0", "vit/pictures")
    pictures = folder / "vit" / "pictures"
    path = rng.choice(sorted(pictures.iterdir()))
    action = rng.randrange(5)
    if action == 0:
        did = displace(rng, path)
    elif action == 1:
        name = rng.choice(("a.png", "b.txt", "c.gif", ".png", "d.PNG"))
        (pictures / name).write_bytes(rng.choice((b"", b"text", path.read_bytes())))
        did = f"beside them {name}"
    elif action == 2:
        from PIL import Image

        size = rng.choice(((1, 1), (1, 3000), (3000, 1), (16, 16)))
        Image.new(rng.choice(("RGB", "L", "RGBA", "1")), size, 7).save(path.with_suffix(".png"))
        did = f"a picture of {size}"
    else:
        did, content = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(content)
    argv = ["collect", "vit/expert-0", "vit/pictures", "-o", "grams.safetensors"]
    return Case(f"{path.name}: {did}", argv, ("pictures",), lambda _: _check_pictures(folder, pictures))


def _check_pictures(folder: Path, pictures: Path) -> str | None:
    from PIL import Image
    from transformers import AutoImageProcessor

    opened = []
    for path in sorted(p for p in pictures.rglob("*") if p.suffix.lower() in _SUFFIXES):
        try:
            with Image.open(io.BytesIO(regular(path))) as picture:
                opened.append(picture.convert("RGB"))
        except (Invalid, OSError, ValueError, SyntaxError) as error:
            return f"accepted: {path.name}: {error}"
    processor = AutoImageProcessor.from_pretrained(folder / "vit" / "expert-0")
    return _check_grams(folder, folder / "vit" / "expert-0", [dict(processor(opened, return_tensors="pt"))])
