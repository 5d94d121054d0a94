"""Recipes: what a merge records is what the file says."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case, Ended, Invalid, Unjudged
from tests.fuzz.material import Material
from tests.fuzz.place import displace
from tests.fuzz.text import mutate_bytes
from tests.fuzz.yaml_core import parse_yaml

_RECIPES = (
    """\
mode: plain
base: llama/base
experts:
  - {model: llama/expert-0, name: first}
  - model: llama/expert-1
anchor: {name: ties, density: 0.5}
alpha: 0.03
filter: exponential
directions: 0.65
prior: 1.2
scale: 0.9
task_weights: [1.0, 0.5]
normalization: trace
keep_base: ['*norm*']
same_tokenizer: true
dtype: float32
max_shard_size: 5GB
""",
    """\
base: llama/base
experts: [llama/expert-0, llama/expert-1]
alpha: .inf
anchor: average
calibrate: larv
host: 1
vocabulary: error
search:
  trials: 3
  seed: 7
  alpha_range: [0.01, 10.0]
calibration: {samples: 8, batch_size: 4}
""",
    """\
# two models, one tensor each way
base: {model: llama/base}
experts:
- model: llama/expert-0
  parameters: {weight: 0.25}
- model: llama/expert-1
  parameters: {weight: 2}
anchor: average
gram_source: task_vectors
modules: ['*self_attn*']
scale: 1
fit_bias: false
device: cpu
""",
    """\
base: llama/base
experts: [{model: llama/expert-0, name: first}, llama/expert-1]
anchor: {name: core_space, rule: ties, rule_parameters: {density: 0.5}}
filter: truncated
directions: participation
calibrate: svc
task_weights: frobenius
host: first
""",
    """\
base: llama/base
experts:
- {model: llama/expert-0, calibration: texts/rows.txt}
- {model: llama/expert-1, calibration: texts/rows.txt}
mode: sequential
output_weights: none
task_weights: energy
prior: 1.1
calibration: {samples: 4}
sequential:
  drift: 0.8
  token_rows: last
  token_weight: 0.1
  token_blocks: 1
  remeasure: false
""",
)
_ODD = (
    "1:30", "010", "0o17", "0x1F", "1_000", "yes", "on", "off", "No", "y", "~", "", "null", ".inf", "-.inf", ".nan", "1e3", "1e-3", "+1", "1.",
    ".5", '"0.5"', "'1'", "true", '"true"', "False", "2026-01-01", "!!python/name:os.system", "!!int '3'", "!!float 1", "!!binary aGk=",
    "!!set {a, b}",
    "[]", "{}", "[1, 2]", "{a: 1}", "-1", "0", "1000000000", "1" + "0" * 30, "1" * 5000, "'" + "y" * 20_000 + "'", "[/red]", "'[b]x[/b]'", "../x",
    "/etc/passwd", "'\\0'", '"\\0"', '"\\ud800"', "*a", "&a 1", "? x", "|\n  text", ">-\n  text", "[" * 2000,
    "{a: " * 500 + "1" + "}" * 500, "é", "nan", "inf", "llama", "llama/base/config.json", "organisation/name", "https://example.org/x",
)  # fmt: skip
# A model that is nowhere is named by its reference.
_NAMED = ("recipe.yaml", "llama/", "no such directory")
_BOMB = "".join(
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
    ]
)


def make_recipe_case(rng: random.Random, material: Material, folder: Path) -> Case:
    material.copy(folder, "llama", "texts")
    path = folder / "recipe.yaml"
    text = rng.choice(_RECIPES)
    path.write_text(text)
    did, content = _mutate(rng, text)
    path.write_bytes(content)
    if rng.random() < 0.05:
        did = displace(rng, path)
    if rng.random() < 0.85:
        return Case(did, ["merge", "recipe.yaml", "-o", "out"], _NAMED, lambda _: _check_recorded(folder))
    return Case(
        did,
        ["inspect", "recipe.yaml", "--json"],
        _NAMED,
        lambda ended: _check_inspected(ended, folder),
    )


def _mutate(rng: random.Random, text: str) -> tuple[str, bytes]:
    lines = text.splitlines()
    keyed = [i for i, line in enumerate(lines) if ": " in line or line.endswith(":")]
    number = rng.choice(keyed)
    line = lines[number]
    key = line.split(":")[0]
    action = rng.randrange(12)
    if action < 5:
        odd = rng.choice(_ODD)
        lines[number] = f"{key}: {odd}"
        did = f"{key.strip()}: {odd[:40]}"
    elif action == 5:
        at = rng.randrange(len(lines) + 1)
        lines.insert(at, line)
        did = f"line {line[:40]!r} again at {at + 1}"
    elif action == 6:
        odd = rng.choice(_ODD)
        lines.append(f"{key.strip(' -')}: {odd}")
        did = f"{key.strip(' -')} again, at last {odd[:40]}"
    elif action == 7:
        wrong = rng.choice(
            ("aplha", "Alpha", "models", "merge_method", "[/x]", "null", "1", "<<", "slices", "'" + "k" * 3000 + "'")
        )
        lines[number] = line.replace(key.strip(" -{"), wrong, 1)
        did = f"{key.strip()} is called {wrong[:20]}"
    elif action == 8:
        rng.shuffle(lines) if rng.random() < 0.3 else lines.reverse()
        did = "lines in another order"
    elif action == 9:
        lines = [
            *lines,
            rng.choice(
                (_BOMB, "---\nbase: x", "...", "\tx: 1", "%YAML 1.1\n---", "b: &b {c: *b}", "x: " + "[1, " * 200)
            ),
        ]
        did = f"at the end {lines[-1][:30]!r}"
    else:
        did, content = mutate_bytes(rng, text.encode())
        return did, content
    return did, ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _check_recorded(folder: Path) -> str | None:
    try:
        said = parse_yaml((folder / "recipe.yaml").read_bytes())
    except Invalid as error:
        return f"accepted: {error}"
    except OSError as error:
        return f"accepted: {error}"
    if not isinstance(said, dict):
        return "accepted: no mapping"
    if {"merge_method", "models", "slices", "modules"} & set(said) and "merge_method" in said:
        raise Unjudged("a configuration of mergekit")
    return _differing(said, json.loads((folder / "out" / "bmm_merge.json").read_text())["recipe"], folder, "")


def _check_inspected(ended: Ended, folder: Path) -> str | None:
    try:
        said = parse_yaml((folder / "recipe.yaml").read_bytes())
    except (Invalid, OSError) as error:
        return f"accepted: {error}"
    shown = json.loads(ended.out)
    anchor = said.get("anchor", "average")
    right = {
        "anchor": anchor["name"] if isinstance(anchor, dict) else anchor,
        "mode": said.get("mode") or "plain",
        "experts": len(said["experts"]),
    }
    found = {**shown, "experts": len(shown["experts"])}
    wrong = {key: found[key] for key, value in right.items() if found[key] != value}
    return f"shown {wrong}, right is {right}" if wrong else None


def _differing(said: Any, recorded: Any, folder: Path, where: str) -> str | None:
    """The first place where the record is not what the file says; what the file leaves out may be any default."""
    if isinstance(said, dict) and isinstance(recorded, dict):
        for key, value in said.items():
            here = f"{where}/{key}"
            if key not in recorded:
                if value is None or value == {}:
                    continue
                return f"{here} is not recorded"
            if found := _differing(value, recorded[key], folder, here):
                return found
        return None
    if isinstance(said, list) and isinstance(recorded, list):
        if len(said) != len(recorded):
            return f"{where} has {len(said)} items, {len(recorded)} are recorded"
        return next(
            filter(None, (_differing(a, b, folder, f"{where}/{i}") for i, (a, b) in enumerate(zip(said, recorded)))),
            None,
        )
    if isinstance(said, str) and isinstance(recorded, dict):  # a name or path alone
        return _differing(said, recorded.get("model", recorded.get("name")), folder, where)
    if _same_scalar(said, recorded, folder):
        return None
    return f"{where} is {str(said)[:60]!r}, recorded as {str(recorded)[:80]!r}"


def _same_scalar(said: Any, recorded: Any, folder: Path) -> bool:
    if isinstance(said, bool) or isinstance(recorded, bool):
        return said is recorded
    if said is None or recorded is None:
        return said is None  # null: whatever follows from the rest
    if isinstance(said, float) and not math.isfinite(said):
        return str(said) == str(recorded)
    if isinstance(said, str):
        if isinstance(recorded, str):
            return recorded in (said, str(folder / said))
        try:
            return float(said) == float(recorded)  # a quoted number
        except (TypeError, ValueError):
            return False
    return not isinstance(recorded, (list, dict, str)) and float(said) == float(recorded)
