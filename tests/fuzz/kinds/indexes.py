"""Indexes: model.safetensors.index.json of a checkpoint in shards, and the shards it names."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from tests.fuzz.case import Case
from tests.fuzz.material import Material
from tests.fuzz.oracles import check_average, check_inspected
from tests.fuzz.place import displace
from tests.fuzz.text import edited, harmless_json, mutate_bytes, mutate_json

_NAMES = (
    "../base/model.safetensors",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b",
    "model.safetensors.index.json",
    "config.json",
    "\x00",
    "n" * 300,
    "nowhere.safetensors",
    "[/x]",
    "\ud800",
)


def make_index_case(rng: random.Random, material: Material, folder: Path) -> Case:
    material.copy(folder, "sharded")
    (folder / "recipe.yaml").write_text(
        "base: sharded/base\nexperts: [sharded/expert-0, sharded/expert-1]\nalpha: .inf\n"
    )
    victim = rng.choice(("base", "expert-0", "expert-1"))
    place = folder / "sharded" / victim
    did, harmless = _mutate(rng, place)
    if rng.random() < 0.7:
        experts = [folder / "sharded" / f"expert-{i}" for i in range(2)]
        argv = ["merge", "recipe.yaml", "-o", "out"]
        judge = lambda _: check_average(folder / "out", folder / "sharded" / "base", experts)  # noqa: E731
    else:
        argv = ["inspect", f"sharded/{victim}", "--json"]
        judge = lambda ended: check_inspected(ended, place)  # noqa: E731
    return Case(
        f"{victim}: {did}", argv, ("model.safetensors.index.json", "model-0000", f"sharded/{victim}"), judge, harmless
    )


def _mutate(rng: random.Random, place: Path) -> tuple[str, bool]:
    path = place / "model.safetensors.index.json"
    tree = json.loads(path.read_text())
    tensor = rng.choice(list(tree["weight_map"]))
    shards = sorted(set(tree["weight_map"].values()))
    action = rng.randrange(10)
    if action == 0:
        return displace(rng, path), False
    if action == 1:
        return displace(rng, place / rng.choice(shards)), False
    if action == 2:
        did, text = harmless_json(rng, tree)
    elif action == 3:
        did, content = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(content)
        return did, False
    elif action == 4:
        name = rng.choice((*_NAMES, *shards))
        did, text = f"{tensor} is in {name[:40]!r}", edited(tree, ("weight_map", tensor), json.dumps(name))
    elif action == 5:
        name = rng.choice(shards)
        did, text = (
            f"{tensor} twice, at last in {name}",
            edited(tree, ("weight_map", tensor), json.dumps(name), twice=True),
        )
    elif action == 6:
        first, second = rng.choice(shards), rng.choice(shards)
        shutil.copyfile(place / first, place / second) if first != second else None
        return f"{second} is a copy of {first}", first == second
    elif action == 7:
        name = rng.choice(shards)
        os.rename(place / name, place / "other.safetensors")
        tree["weight_map"] = {t: "other.safetensors" if f == name else f for t, f in tree["weight_map"].items()}
        did, text = f"{name} is called other.safetensors", json.dumps(tree)
    else:
        did, text = mutate_json(rng, tree, ("weight_map",))
    path.write_text(text, errors="surrogatepass")
    return did, action in (2, 7)
