"""Weight files: model.safetensors of the base or of an expert, averaged, inspected, or measured on data."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from tests.fuzz.case import Case, Ended, Invalid
from tests.fuzz.material import Material
from tests.fuzz.oracles import check_average, check_inspected, differs, without_prefix
from tests.fuzz.place import displace
from tests.fuzz.reading import model_in, tensors_in
from tests.fuzz.tensors import mutate_tensors

AVERAGE = "base: llama/base\nexperts: [llama/expert-0, llama/expert-1]\nanchor: average\nalpha: .inf\n"


def make_weights_case(rng: random.Random, material: Material, folder: Path) -> Case:
    material.copy(folder, "llama")
    (folder / "recipe.yaml").write_text(AVERAGE)
    victim = rng.choice(("base", "expert-0", "expert-1"))
    path = folder / "llama" / victim / "model.safetensors"
    if rng.random() < 0.12:
        did = displace(rng, path)
    else:
        did, content = mutate_tensors(rng, path.read_bytes())
        path.write_bytes(content)
    names, did = ("model.safetensors", "llama/"), f"{victim}: {did}"
    action = rng.random()
    if action < 0.6:
        experts = [folder / "llama" / f"expert-{i}" for i in range(2)]
        judge = lambda _: check_average(folder / "out", folder / "llama" / "base", experts)  # noqa: E731
        return Case(did, ["merge", "recipe.yaml", "-o", "out"], names, judge)
    if action < 0.8:
        judge = lambda ended: check_inspected(ended, folder / "llama" / victim)  # noqa: E731
        return Case(did, ["inspect", f"llama/{victim}", "--json"], names, judge)
    material.copy(folder, "texts")
    argv = ["collect", f"llama/{victim}", "texts/rows.safetensors", "-o", "grams.safetensors"]
    return Case(did, argv, names, lambda ended: _check_grams(ended, folder, victim))


def _check_grams(ended: Ended, folder: Path, victim: str) -> str | None:
    """Grams are those of the model that the file holds, and of no other."""
    from transformers import AutoConfig, LlamaForCausalLM

    from bmm_engine import collect_grams
    from bmm_engine.errors import NonFiniteGramError

    try:
        tensors = model_in(folder / "llama" / victim)
    except Invalid as error:
        return f"accepted: {error}"
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder / "llama" / victim)).eval()
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors = {without_prefix(name, wanted): tensor for name, tensor in tensors.items()}
    lacking = sorted(set(wanted) - set(tensors))
    if lacking:
        return f"ran a model whose file lacks {lacking[0]}"
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            return f"ran a model whose {name} has shape {tuple(tensors[name].shape)} in the file"
        if not torch.isfinite(tensors[name].double()).all():
            return f"ran a model whose {name} holds NaN or infinity"
    model.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
    inputs = tensors_in(folder / "texts" / "rows.safetensors")
    try:
        right = collect_grams(model, [inputs])
        groups = {group: right.get(group).total for group in right.modules.values()}
    except NonFiniteGramError as error:
        return f"accepted: {error}"
    got = tensors_in(folder / "grams.safetensors")
    return next(filter(None, (differs(g, got[f"gram.{g}"], total, 1e-4) for g, total in groups.items())), None)
