"""A whole merge in float64, written straight from the formula: no streaming, no sharing, no Cholesky, general solves. Truth for tests."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

HEADS = ("classifier", "lm_head")


def linear_names(model: nn.Module) -> dict[str, bool]:
    """Module name -> stored as (in, out)?"""
    found = {}
    for name, module in model.named_modules():
        if name.split(".")[-1] not in HEADS and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            found[name] = not isinstance(module, nn.Linear)
    return found


def module_inputs(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Every module's rows in float64, padding dropped, each module hooked by itself."""
    rows: dict[str, list[torch.Tensor]] = {}
    handles = []
    mask: list[torch.Tensor | None] = [None]
    for name in linear_names(model):

        def keep(_, args, name=name):
            x, m = args[0].detach(), mask[0]
            rows.setdefault(name, []).append(
                (x[m.bool()] if m is not None and x.dim() == 3 else x.reshape(-1, x.shape[-1])).double()
            )

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def reference_merge(
    base, experts, batches, *, alpha, gram_source="data", share=0.5, scale=1.0, energy=False, fit_bias=False
):
    """The merged model in float64, anchor: the average. `batches[t]`: expert t's calibration."""
    merged = copy.deepcopy(base).double()
    states = [{k: v.double() for k, v in e.state_dict().items()} for e in experts]
    origin = {k: v.double() for k, v in base.state_dict().items()}
    state = {k: sum(s[k] for s in states) / len(states) if origin[k].is_floating_point() else origin[k] for k in origin}
    inputs = [module_inputs(e, b) for e, b in zip(experts, batches)]
    betas_of = {}
    if energy:  # per group of modules that share their input, as the engine groups them: found here by equal rows
        for name in linear_names(base):
            same = [
                m
                for m in linear_names(base)
                if inputs[0][m].shape == inputs[0][name].shape and torch.equal(inputs[0][m], inputs[0][name])
            ]
            members = [name] if gram_source != "data" else same
            betas_of[name] = _energy(members, origin, states, inputs, linear_names(base), fit_bias)
    for name, transposed in linear_names(base).items():
        anchor, w0 = _matrix(state, name, transposed, fit_bias), _matrix(origin, name, transposed, fit_bias)
        weights = [_matrix(s, name, transposed, fit_bias) for s in states]
        grams = [_gram(inputs[t][name], weights[t] - w0, gram_source, share, fit_bias) for t in range(len(experts))]
        betas = betas_of.get(name, [1.0] * len(experts))
        a0 = sum(b * g for b, g in zip(betas, grams))
        if alpha == math.inf:
            solved = anchor
        else:
            lam = alpha * a0.trace() / a0.shape[0]
            b = sum(beta * w @ g for beta, w, g in zip(betas, weights, grams)) + lam * anchor
            solved = torch.linalg.solve(a0 + lam * torch.eye(a0.shape[0], dtype=torch.float64), b, left=False)
        result = w0 + scale * (solved - w0)
        if fit_bias:
            state[f"{name}.bias"] = result[:, -1].clone()
            result = result[:, :-1]
        state[f"{name}.weight"] = result.T.clone() if transposed else result.clone()
    merged.load_state_dict(state)
    return merged


def _matrix(state, name, transposed, fit_bias):
    weight = state[f"{name}.weight"]
    weight = weight.T if transposed else weight
    return torch.cat([weight, state[f"{name}.bias"][:, None]], 1) if fit_bias else weight


def _gram(x, u, source, share, fit_bias):
    if fit_bias:
        x = torch.cat([x, torch.ones(x.shape[0], 1, dtype=x.dtype)], 1)
    data = x.T @ x / x.shape[0]
    factor = u.T @ u / u.pow(2).sum()
    return {"data": data, "task_vectors": factor, "hybrid": (1 - share) * data / data.trace() + share * factor}[source]


def _energy(members, origin, states, inputs, transposed, fit_bias):
    energies = []
    for t, state in enumerate(states):
        total = 0.0
        for name in members:
            u = _matrix(state, name, transposed[name], fit_bias) - _matrix(origin, name, transposed[name], fit_bias)
            total += float((u @ _gram(inputs[t][name], u, "data", 0.0, fit_bias) * u).sum())
        energies.append(total)
    inverse = [1 / e for e in energies]
    return [i * len(inverse) / sum(inverse) for i in inverse]
