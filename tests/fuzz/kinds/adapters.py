"""LoRA adapters: adapter_config.json and adapter_model.safetensors, averaged with a full expert."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.case import Case, Invalid, Unjudged
from tests.fuzz.material import Material
from tests.fuzz.oracles import check_tensors
from tests.fuzz.place import displace
from tests.fuzz.reading import model_in, parse_json, regular, tensors_in
from tests.fuzz.tensors import mutate_tensors
from tests.fuzz.text import harmless_json, mutate_bytes, mutate_json

_PREFIX = "base_model.model."
# Those that no weight depends on.
_WITHOUT_EFFECT = {"task_type", "base_model_name_or_path", "lora_dropout", "bias", "target_modules", "inference_mode"}
_FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out")


def make_adapter_case(rng: random.Random, material: Material, folder: Path) -> Case:
    material.copy(folder, "llama/base", "llama/expert-1", "adapter")
    (folder / "recipe.yaml").write_text("base: llama/base\nexperts: [adapter, llama/expert-1]\nalpha: .inf\n")
    config, weights = folder / "adapter" / "adapter_config.json", folder / "adapter" / "adapter_model.safetensors"
    tree = json.loads(config.read_text())
    harmless, action = False, rng.random()
    if action < 0.1:
        did = displace(rng, rng.choice((config, weights)))
    elif action < 0.4:
        did, content = mutate_tensors(rng, weights.read_bytes())
        weights.write_bytes(content)
    elif action < 0.45:
        harmless = True
        did, text = harmless_json(rng, tree)
        config.write_text(text)
    elif action < 0.52:
        did, content = mutate_bytes(rng, config.read_bytes())
        config.write_bytes(content)
    else:
        did, text = mutate_json(
            rng,
            tree,
            (
                "r",
                "lora_alpha",
                *_FLAGS,
                "rank_pattern",
                "alpha_pattern",
                "modules_to_save",
                "init_lora_weights",
                "peft_type",
            ),
        )
        config.write_text(text, errors="surrogatepass")
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter")
    return Case(did, ["merge", "recipe.yaml", "-o", "out"], names, lambda _: _check(folder, tree), harmless)


def _check(folder: Path, before: dict[str, Any]) -> str | None:
    try:
        config = parse_json(regular(folder / "adapter" / "adapter_config.json"))
        if not isinstance(config, dict):
            raise Invalid("the config is no object")
        settings = _settings(config, before)
        factors = tensors_in(folder / "adapter" / "adapter_model.safetensors")
        for path in (folder / "adapter").iterdir():
            if path.is_symlink():
                raise Invalid(f"{path.name} is a link that leads elsewhere")
        base = model_in(folder / "llama" / "base")
        applied = _applied(base, factors, settings)
    except Invalid as error:
        return f"accepted: {error}"
    return check_tensors(folder / "out", base, [applied, model_in(folder / "llama" / "expert-1")])


def _settings(config: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    found = {**{"r": 8, "lora_alpha": 8}, **config}
    for key in ("r", "lora_alpha"):
        if isinstance(found[key], bool) or not isinstance(found[key], (int, float)) or not found[key] > 0:
            raise Invalid(f"{key} is {str(found[key])[:40]!r}")
    if not isinstance(found["r"], int):
        raise Invalid(f"r is {found['r']!r}")
    if found.get("peft_type") != "LORA":
        raise Invalid(f"peft_type is {str(found.get('peft_type'))[:40]!r}")
    for key in _FLAGS:
        if found.get(key) is not None and not isinstance(
            found[key], bool
        ):  # null is off for PEFT, whose dataclass takes any value
            raise Invalid(f"{key} is {str(found[key])[:40]!r}, no truth value")
    for key in ("rank_pattern", "alpha_pattern"):
        if found.get(key) is not None and not isinstance(found[key], dict):
            raise Invalid(f"{key} is {str(found[key])[:40]!r}")
    if found.get("use_dora"):
        raise Invalid("DoRA without magnitudes")
    changed = {k for k in {*config, *before} if k not in config or k not in before or config[k] != before[k]}
    unclear = changed - _WITHOUT_EFFECT - {"r", "lora_alpha", "use_rslora", "extra", ""}
    found["unclear"] = sorted(key for key in unclear if key in config and config[key] not in (None, False, {}, []))
    return found


def _applied(
    base: dict[str, torch.Tensor], factors: dict[str, torch.Tensor], settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    applied = dict(base)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in factors.items():
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.(lora_[AB])\.weight", name)
        if match is None:
            raise Unjudged(f"a tensor called {name[:60]!r}")
        modules.setdefault(match[1], {})[match[2]] = tensor
    for module, own in modules.items():
        if set(own) != {"lora_A", "lora_B"}:
            raise Invalid(f"{module} has only {sorted(own)}")
        a, b = own["lora_A"], own["lora_B"]
        if not a.is_floating_point() or not b.is_floating_point():
            raise Invalid(f"the factors of {module} are no floating-point numbers")
        weight = base.get(f"{module}.weight")
        if weight is None or a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise Invalid(f"{module} does not fit the base")
        if a.shape[0] != b.shape[1] or a.shape[0] != settings["r"]:
            raise Invalid(f"{module} has rank {a.shape[0]} and {b.shape[1]}, the config says {settings['r']}")
        scaling = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])
        applied[f"{module}.weight"] = weight.double() + scaling * (b.double() @ a.double())
    if settings["unclear"]:
        raise Unjudged(f"another {settings['unclear'][0]}")
    return applied
