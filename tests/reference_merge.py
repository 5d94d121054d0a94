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
    base,
    experts,
    batches,
    *,
    alpha,
    prior=1.0,
    gram_source="data",
    share=0.5,
    scale=1.0,
    energy=False,
    frobenius=False,
    fit_bias=False,
    sensitivities=None,
    sensitivity_share=0.75,
    output_hybrid=0.0,
    response=None,
):
    """The merged model in float64, anchor: the average. `batches[t]`: expert t's calibration; `sensitivities[t]`: module -> (out, out).
    `output_hybrid`: the part of U U^T beside these. `response`: a filter, (e descending, lam) -> f(e), in the place of the ridge's."""
    merged = copy.deepcopy(base).double()
    states = [{k: v.double() for k, v in e.state_dict().items()} for e in experts]
    origin = {k: v.double() for k, v in base.state_dict().items()}
    state = {k: sum(s[k] for s in states) / len(states) if origin[k].is_floating_point() else origin[k] for k in origin}
    inputs = [module_inputs(e, b) for e, b in zip(experts, batches)]
    betas_of, metrics = {}, {}
    for name in linear_names(base):
        # Modules that share their input, as the engine groups them: found here by equal rows.
        same = [
            m
            for m in linear_names(base)
            if inputs[0][m].shape == inputs[0][name].shape and torch.equal(inputs[0][m], inputs[0][name])
        ]
        members = [name] if gram_source != "data" else same
        vectors = task_vectors_of(origin, states, members, linear_names(base))
        weighing = metrics_of(sensitivities, members, sensitivity_share, len(experts), output_hybrid, vectors)
        metrics[name] = [m and m[name] for m in weighing]
        if energy:
            betas_of[name] = _energy(members, origin, states, inputs, linear_names(base), fit_bias, weighing)
    for name, transposed in linear_names(base).items():
        anchor, w0 = _matrix(state, name, transposed, fit_bias), _matrix(origin, name, transposed, fit_bias)
        weights = [_matrix(s, name, transposed, fit_bias) for s in states]
        grams = [_gram(inputs[t][name], weights[t] - w0, gram_source, share, fit_bias) for t in range(len(experts))]
        betas = betas_of.get(name, [1.0] * len(experts))
        if frobenius:
            norms = [1 / float(g.norm()) for g in grams]
            betas = [n * len(norms) / sum(norms) for n in norms]
        a0 = sum(b * g for b, g in zip(betas, grams))
        if alpha == math.inf:
            solved = anchor
        else:
            anchor = prior * anchor + (1 - prior) * w0
            lam = alpha * a0.trace() / a0.shape[0]
            ridge = lam * torch.eye(a0.shape[0], dtype=torch.float64)
            aims = [beta * w @ g for beta, w, g in zip(betas, weights, grams)]
            if response is not None:
                solved = filtered(a0, sum(aims), lam, anchor, response)
            elif sensitivities is None:
                solved = torch.linalg.solve(a0 + ridge, sum(aims) + lam * anchor, left=False)
            else:
                parts = [beta * g for beta, g in zip(betas, grams)]
                solved = solve_weighted(parts, aims, ridge, anchor, metrics[name], betas)
        result = w0 + scale * (solved - w0)
        if fit_bias:
            state[f"{name}.bias"] = result[:, -1].clone()
            result = result[:, :-1]
        state[f"{name}.weight"] = result.T.clone() if transposed else result.clone()
    merged.load_state_dict(state)
    return merged


def filtered(a0, aim, lam, anchor, response):
    """`W_a + (aim - W_a A_0) U diag(f(s) / s) U^T` by the singular values s of A_0, largest first; none where s is a rounding error."""
    u, s, _ = torch.linalg.svd(a0)
    factors = torch.where(s > 1e-14 * len(s) * s[0], response(s, lam) / s, 0.0)
    return anchor + (aim - anchor @ a0) @ (u * factors) @ u.T


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


def _energy(members, origin, states, inputs, transposed, fit_bias, metrics):
    energies = []
    for t, state in enumerate(states):
        total = 0.0
        for name in members:
            u = _matrix(state, name, transposed[name], fit_bias) - _matrix(origin, name, transposed[name], fit_bias)
            seen = u if metrics[t] is None else metrics[t][name] @ u
            total += float((u @ _gram(inputs[t][name], u, "data", 0.0, fit_bias) * seen).sum())
        energies.append(total)
    inverse = [1 / e for e in energies]
    return [i * len(inverse) / sum(inverse) for i in inverse]


def task_vectors_of(origin, states, names, transposed):
    """By task and module, (out, in), without biases."""
    own = [{n: _matrix(s, n, transposed[n], False) for n in names} for s in (origin, *states)]
    return [{n: after[n] - own[0][n] for n in names} for after in own[1:]]


def metrics_of(sensitivities, names, share, tasks, hybrid=0.0, vectors=None):
    """By task and module: over the modules that share an input a mean eigenvalue of 1. `hybrid`: the part of U U^T of the `vectors` U."""
    if sensitivities is None:
        return [None] * tasks
    found = []
    for t, own in enumerate(sensitivities):
        raw = {n: own[n].double() for n in names}
        raw = {n: s / sum(s.trace() for s in raw.values()) for n, s in raw.items()}
        if hybrid:
            mass = sum(u.pow(2).sum() for u in vectors[t].values())
            raw = {n: (1 - hybrid) * s + hybrid * vectors[t][n] @ vectors[t][n].T / mass for n, s in raw.items()}
        scale = sum(len(s) for s in raw.values())
        found.append({n: share * scale * s + (1 - share) * torch.eye(len(s)).double() for n, s in raw.items()})
    return found


def solve_weighted(parts, aims, ridge, anchor, metrics, betas):
    """Z -> S Z A, of rows, is kron(S, A)."""
    mean = sum(b * s for b, s in zip(betas, metrics)) / sum(betas)
    left = sum(torch.kron(s, a) for s, a in zip(metrics, parts)) + torch.kron(mean, ridge)
    right = sum(s @ aim for s, aim in zip(metrics, aims)) + mean @ anchor @ ridge
    return torch.linalg.solve(left, right.reshape(-1)).view_as(anchor)
