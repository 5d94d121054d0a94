"""Configs: config.json of the base or of an expert, in merges, measurements and inspections."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case, Ended, Invalid, Unjudged
from tests.fuzz.material import Material
from tests.fuzz.oracles import check_average
from tests.fuzz.place import displace
from tests.fuzz.reading import parse_json, regular
from tests.fuzz.text import harmless_json, mutate_bytes, mutate_json

# Keys that change what the network computes or which tensors it has.
FUNCTION = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "rms_norm_eps", "hidden_act", "rope_parameters", "attention_bias", "mlp_bias", "tie_word_embeddings",
)  # fmt: skip
# What a Llama's config means where it does not say it.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OFTEN = (*FUNCTION, "architectures", "max_position_embeddings", "pad_token_id", "dtype")


def make_config_case(rng: random.Random, material: Material, folder: Path) -> Case:
    material.copy(folder, "llama")
    victim = rng.choice(("base", "base", "expert-0", "expert-1"))
    path = folder / "llama" / victim / "config.json"
    tree = json.loads(path.read_text())
    harmless = rng.random() < 0.08
    if harmless:
        did, text = harmless_json(rng, tree)
        path.write_text(text)
    elif rng.random() < 0.1:
        did = displace(rng, path)
    elif rng.random() < 0.12:
        did, content = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(content)
    else:
        did, text = mutate_json(rng, tree, _OFTEN)
        path.write_text(text, errors="surrogatepass")
    names = ("config.json", f"llama/{victim}")
    did = f"{victim}: {did}"
    action = rng.random()
    if action < 0.55:
        solving = rng.random() < 0.5
        alpha = "alpha: 0.03\ngram_source: task_vectors\n" if solving else "alpha: .inf\n"
        (folder / "recipe.yaml").write_text(f"base: llama/base\nexperts: [llama/expert-0, llama/expert-1]\n{alpha}")
        argv = ["merge", "recipe.yaml", "-o", "out"]
        return Case(did, argv, names, lambda _: _check_merge(folder, victim, tree, material, solving), harmless)
    if action < 0.75:
        judge = lambda ended: _check_inspect(ended, path, tree)  # noqa: E731
        return Case(did, ["inspect", f"llama/{victim}", "--json"], names, judge, harmless)
    material.copy(folder, "texts")
    argv = ["collect", f"llama/{victim}", "texts/rows.txt", "-o", "grams.safetensors"]
    return Case(did, argv, names, lambda _: _check_collect(folder, path, tree), harmless)


def read_config(path: Path) -> Any:
    value = parse_json(regular(path))
    if path.is_symlink():
        raise Invalid("config.json is a link that leads elsewhere")
    if not isinstance(value, dict):
        raise Invalid("config.json holds no object")
    return value


def _changed(path: Path, tree: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The mutated config, and the keys in which it differs from what it was."""
    now = read_config(path)
    missing = object()
    rope = now.get("rope_parameters")
    if isinstance(rope, dict):
        now["rope_parameters"] = {**_ROPE, **rope}  # what is left out
    return now, {key for key in {*now, *tree} if _differ(now.get(key, missing), tree.get(key, missing))}


def _differ(first: Any, second: Any) -> bool:
    return type(first) is not type(second) or first != second


def _check_merge(folder: Path, victim: str, tree: dict[str, Any], material: Material, solving: bool) -> str | None:
    try:
        now, changed = _changed(folder / "llama" / victim / "config.json", tree)
    except Invalid as error:
        # Which modules are linear is the base's config to say; an expert may be bare weights.
        if os.path.lexists(folder / "llama" / victim / "config.json") or (solving and victim == "base"):
            return f"accepted: {error}"
        now, changed = {}, set()  # without a config, tensors are all there is
    # What is left out, or null, means its default, which may be what stood there.
    if told := sorted(key for key in changed & set(FUNCTION) if now.get(key) is not None):
        return f"accepted: {victim} has another {told[0]} than the others: {str(now.get(told[0]))[:60]}"
    if not solving:
        experts = [folder / "llama" / f"expert-{i}" for i in range(2)]
        if wrong := check_average(folder / "out", folder / "llama" / "base", experts):
            return wrong
    if changed & {"architectures", *FUNCTION}:
        raise Unjudged(f"{sorted(changed)} of {victim}")
    written = json.loads((folder / "out" / "config.json").read_text()) if now else {}
    if victim == "base" and (lost := [key for key in changed if key in now and _differ(written.get(key), now[key])]):
        return f"the output's config has {lost[0]}: {written.get(lost[0])!r}, the base's {now[lost[0]]!r}"
    return None


def _check_inspect(ended: Ended, path: Path, tree: dict[str, Any]) -> str | None:
    said = json.loads(ended.out)
    try:
        now, changed = _changed(path, tree)
    except Invalid as error:
        return None if not path.exists() and said["linear_modules_unknown"] else f"accepted: {error}"
    if (
        not changed & {*FUNCTION, "architectures"}
        and len(said["linear_modules"]) != 14
        and not said["linear_modules_unknown"]
    ):
        return f"14 linear modules are there, {len(said['linear_modules'])} said"
    if said["linear_modules_unknown"] or not changed & {*FUNCTION, "architectures"}:
        return None
    # Those that it names have the shapes that the file says.
    from tests.fuzz.reading import model_in

    shapes = {name: list(tensor.shape) for name, tensor in model_in(path.parent).items()}
    wrong = [name for name, size in said["linear_modules"].items() if shapes.get(f"{name}.weight") != size]
    if wrong:
        told, held = said["linear_modules"][wrong[0]], shapes.get(f"{wrong[0]}.weight")
        return f"{wrong[0]} is {told} by the config and {held} in the file, and nothing is said"
    raise Unjudged(f"inspect with other {sorted(changed)}: {now.get(sorted(changed)[0])!r}")


def _check_collect(folder: Path, path: Path, tree: dict[str, Any]) -> str | None:
    """The model that runs is the one of the mutated config, with every tensor of the file in it."""
    import transformers

    from bmm_engine import collect_grams
    from tests.fuzz.material import texts
    from tests.fuzz.oracles import differs
    from tests.fuzz.reading import model_in, tensors_in

    try:
        _, changed = _changed(path, tree)
    except Invalid as error:
        return f"accepted: {error}"
    config = transformers.AutoConfig.from_pretrained(path.parent)
    if "architectures" in changed:
        raise Unjudged("another class")
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = model_in(path.parent)
    live = model.state_dict()
    if bad := sorted((set(tensors) ^ set(live)) - {"lm_head.weight"}) or [
        n for n in tensors if tensors[n].shape != live[n].shape
    ]:
        return f"accepted: {bad[0]} is not in both, or of another shape: {sorted(changed)}"
    model.load_state_dict(tensors, strict=False)
    if not config.tie_word_embeddings:
        raise Unjudged("an untied head that no file holds; Grams do not read it")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent)
    batch = dict(tokenizer(texts(), padding=True, return_tensors="pt"))
    right, got = collect_grams(model, [batch]), tensors_in(folder / "grams.safetensors")
    found = (differs(g, got[f"gram.{g}"], right.get(g).total, 1e-4) for g in dict.fromkeys(right.modules.values()))
    return next(filter(None, found), None)
