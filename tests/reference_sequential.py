"""A whole sequential merge in float64, straight from the formula: whole models run again for every input, no blocks, no drift form. Truth for tests."""

from __future__ import annotations

import copy

import torch

from tests.reference_merge import _matrix, linear_names, module_inputs


def reference_sequential(
    base, experts, batches, *, alpha=0.03, scale=1.0, energy=True, fit_bias=True, anchor=None, sweeps=1
):
    """The merged model in float64. `anchor`: a state dict, by default the experts' average; `batches[t]`: expert t's calibration."""
    experts = [copy.deepcopy(e).double() for e in experts]
    origin = {k: v.double() for k, v in base.state_dict().items()}
    states = [e.state_dict() for e in experts]
    if anchor is None:
        anchor = {k: sum(s[k] for s in states) / len(states) if v.is_floating_point() else v for k, v in origin.items()}
    anchor = {k: v.double() for k, v in anchor.items()}
    merged = copy.deepcopy(base).double()
    merged.load_state_dict(anchor)
    transposed = linear_names(base)
    for _ in range(sweeps):
        anchor = {k: v.clone() for k, v in merged.state_dict().items()}
        groups, seen = [], module_inputs(merged, batches[0])
        for name, rows in seen.items():  # in the order of their calls
            same = next((g for g in groups if rows.shape == seen[g[0]].shape and torch.equal(rows, seen[g[0]])), None)
            groups.append([name]) if same is None else same.append(name)
        for names in groups:
            drifted = [_rows(merged, b, names[0], fit_bias, base) for b in batches]
            own = [_rows(e, b, names[0], fit_bias, base) for e, b in zip(experts, batches)]
            weights = {n: [_weight(s, n, transposed, fit_bias) for s in states] for n in names}
            betas = [1.0] * len(experts)
            if energy:
                energies = [
                    sum(
                        float((x @ (weights[n][t] - _weight(origin, n, transposed, fit_bias)).T).pow(2).sum()) / len(x)
                        for n in names
                    )
                    for t, x in enumerate(own)
                ]
                inverse = [1 / e for e in energies]
                betas = [i * len(inverse) / sum(inverse) for i in inverse]
            a = sum(b * y.T @ y / len(y) for b, y in zip(betas, drifted))
            lam = alpha * a.trace() / len(a)
            a = a + lam * torch.eye(len(a), dtype=a.dtype)
            for n in names:
                w_a = _weight(anchor, n, transposed, fit_bias)
                right = lam * w_a + sum(
                    b * w @ x.T @ y / len(y) for b, w, x, y in zip(betas, weights[n], own, drifted)
                )
                solved = torch.linalg.solve(a, right, left=False)
                w0 = _weight(origin, n, transposed, fit_bias)
                result = w0 + scale * (solved - w0)
                state = merged.state_dict()
                if fit_bias and f"{n}.bias" in state:
                    state[f"{n}.bias"].copy_(result[:, -1])
                    result = result[:, :-1]
                state[f"{n}.weight"].copy_(result.T if transposed[n] else result)
    return merged


def _rows(model, batches, name, fit_bias, base):
    x = module_inputs(model, batches)[name]
    if fit_bias and f"{name}.bias" in base.state_dict():
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return x


def _weight(state, name, transposed, fit_bias):
    return _matrix(state, name, transposed[name], fit_bias and f"{name}.bias" in state)


