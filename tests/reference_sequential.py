"""A whole sequential merge in float64, straight from the formula: whole models run again for every input, no blocks. Truth for tests."""

from __future__ import annotations

import copy
import re

import torch

from tests.reference_merge import _matrix, filtered, linear_names, metrics_of, solve_weighted, task_vectors_of

# Modules that write to the residual stream, and where it is seen next: what `place` reads (0) or gives (1) holds their output.
WRITERS = [
    (r"(.*)\.attention\.output\.dense", r"\1.attention.output.LayerNorm", 0, "bert"),
    (r"(.*)\.output\.dense", r"\1.output.LayerNorm", 0, "bert"),
    (r"(.*)\.attention\.o_proj", r"\1.layernorm_after", 0, "vit"),
    (r"(.*)\.mlp\.fc2", r"\1", 1, "vit"),
    (r"(.*)\.attn\.c_proj", r"\1.ln_2", 0, "gpt2"),
    (r"(.*)\.mlp\.c_proj", r"\1", 1, "gpt2"),
    (r"(.*)\.self_attn\.o_proj", r"\1.post_attention_layernorm", 0, "llama"),
    (r"(.*)\.mlp\.down_proj", r"\1", 1, "llama"),
]


def place_of_stream(name, model):
    for pattern, place, which, kind in WRITERS:
        if kind in type(model).__name__.lower() and re.fullmatch(pattern, name):
            return re.sub(pattern, place, name), which
    return None


def stream_beside(model, batches, name):
    """What the output of the module `name` is added to: the residual stream after it, less that output. None where it does not write there."""
    found = place_of_stream(name, model)
    if found is None:
        return None
    seen = trace(model, batches, [name, found[0]])
    return seen[found[0]][found[1]] - seen[name][1]


def trace(model, batches, names):
    """name -> (what the module reads, what it gives), rows without padding, in the order of first calls."""
    rows = {}
    handles, mask = [], [None]
    for name in names:

        def keep(_, args, output, name=name):
            for place, x in enumerate((args[0], output)):
                x = x[0] if isinstance(x, tuple) else x
                m = mask[0]
                if m is not None and x.dim() == 3 and x.shape[:2] == m.shape[::-1]:
                    m = m.mT  # positions first
                flat = x.reshape(-1, x.shape[-1])
                # Not those of a decoder, or of relative positions; some flatten samples and positions.
                fits = m is not None and len(flat) == m.numel()
                kept = flat[m.reshape(-1).bool()] if fits else flat
                rows.setdefault(name, ([], []))[place].append(kept)

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: tuple(torch.cat(parts) for parts in both) for name, both in rows.items()}


def reference_sequential(
    base,
    experts,
    batches,
    *,
    alpha=0.03,
    prior=1.0,
    scale=1.0,
    energy=True,
    fit_bias=True,
    target="stream",
    drift=1.0,
    tokens=None,
    mean_weight=0.0,
    task_vector_samples=100.0,
    norms=False,
    anchor=None,
    sweeps=1,
    sensitivities=None,
    share=0.75,
    output_hybrid=0.0,
    heads=(),
    response=None,
    remeasure=None,
):
    """The merged model in float64. `energy`: True, False or "frobenius". `anchor`: a state dict, by default the
    experts' average; `batches[t]`: expert t's calibration. `sensitivities[t]`: module name -> (out, out),
    `output_hybrid` the part of U U^T beside these. `heads`:
    names of modules that are not solved. `response`: of a filter, as of `reference_merge`.
    `remeasure`: the sensitivities of a merged network, for sweeps after the first, of task t."""
    experts = [copy.deepcopy(e).double() for e in experts]
    origin_model = copy.deepcopy(base).double()
    origin, states = origin_model.state_dict(), [e.state_dict() for e in experts]
    if anchor is None:
        anchor = {k: sum(s[k] for s in states) / len(states) if v.is_floating_point() else v for k, v in origin.items()}
    merged = copy.deepcopy(base).double()
    merged.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in anchor.items()})
    counts = [sum(len(next(iter(b.values()))) for b in own) for own in batches]
    transposed = {name: flipped for name, flipped in linear_names(base).items() if name not in heads}
    norm_names = [n for n, m in base.named_modules() if "Norm" in type(m).__name__] if norms else []
    every = [*transposed, *norm_names]
    for sweep in range(sweeps):
        if sweep and remeasure is not None:
            sensitivities = [remeasure(merged.state_dict(), t) for t in range(len(experts))]
        anchor = {k: v.clone() for k, v in merged.state_dict().items()}
        if sweep == 0:  # what was solved is not overshot again
            anchor = {k: prior * v + (1 - prior) * origin[k] if v.is_floating_point() else v for k, v in anchor.items()}
        written = [0.0] * len(experts)  # what fine-tuning changed in the residual stream so far
        groups, seen = [], trace(merged, batches[0], every)
        for name, (x, _) in seen.items():
            alike = [
                g for g in groups if name not in norm_names and g[0] not in norm_names and block(g[0]) == block(name)
            ]
            same = next((g for g in alike if x.shape == seen[g[0]][0].shape and torch.equal(x, seen[g[0]][0])), None)
            groups.append([name]) if same is None else same.append(name)
        if tokens:
            groups = [part for group in groups for part in by_keys(group, tokens["modules"]) if part]
        for names in (part for group in groups for part in by_bias(group, origin)):
            drifted = [trace(merged, b, names[:1])[names[0]][0] for b in batches]
            own = [trace(e, b, names[:1])[names[0]] for e, b in zip(experts, batches)]
            if names[0] in norm_names:
                given = [e.get_submodule(names[0])(y).detach() for e, y in zip(experts, drifted)]
                aims = [drift * y + (1 - drift) * there for (_, y), there in zip(own, given)]
                _fit_norm(names[0], merged, origin_model, anchor, drifted, own, aims, alpha, energy, scale)
                continue
            shifts = [None] * len(experts)  # what the residual stream has drifted before
            if target == "stream" and len(names) == 1:
                after, before = (
                    [stream_beside(m, b, names[0]) for m, b in zip(ms, batches)]
                    for ms in ([merged] * len(experts), experts)
                )
                shifts = [None if s is None else s - r for s, r in zip(after, before)]
            counts_of = [torch.ones(len(y), dtype=y.dtype) for y in drifted]
            if tokens and any(re.search(tokens["modules"], n) for n in names):
                counts_of = [token_weights(b, y, **tokens["rows"]) for b, y in zip(batches, drifted)]
            bias = fit_bias and f"{names[0]}.bias" in origin
            drifted = [_with_one(y, bias) for y in drifted]
            own = [_with_one(x, bias) for x, _ in own]

            def weight(state, n, bias=bias):
                return _matrix(state, n, transposed[n], bias)

            metrics = metrics_of(
                sensitivities,
                names,
                share,
                len(experts),
                output_hybrid,
                task_vectors_of(origin, states, names, transposed) if output_hybrid else None,
            )
            energies = [
                sum(_energy(c.sqrt()[:, None] * x @ (weight(s, n) - weight(origin, n)).T, m and m[n]) for n in names)
                / c.sum()
                for s, x, m, c in zip(states, own, metrics, counts_of)
            ]
            if shifts[0] is not None:
                energies = written = [e + w for e, w in zip(energies, written)]
            weighed = [y.T @ (c[:, None] * y) / c.sum() for y, c in zip(drifted, counts_of)]
            sizes = [float(g.norm()) for g in weighed]
            betas = _betas(sizes if energy == "frobenius" else energies, energy)
            # Of pairs of rows.
            weights = [(torch.diag(c) + mean_weight / c.sum() * torch.outer(c, c)) / c.sum() for c in counts_of]
            pseudo = [
                task_vector_samples / count * g.trace() * _along(s, origin, names, transposed, len(g))
                for count, g, s in zip(counts, weighed, states)
            ]
            seen_as = [drift * x + (1 - drift) * y for x, y in zip(own, drifted)]
            shifts = [None if shift is None else drift * shift for shift in shifts]
            parts = [b * (y.T @ m @ y + along) for b, y, m, along in zip(betas, drifted, weights, pseudo)]
            lam = alpha * sum(parts).trace() / len(parts[0])
            ridge = lam * torch.eye(len(parts[0]), dtype=parts[0].dtype)
            for n in names:
                aims = [
                    b * ((x @ weight(s, n).T - (0 if shift is None else shift)).T @ m @ y + weight(s, n) @ along)
                    for b, s, x, y, shift, m, along in zip(betas, states, seen_as, drifted, shifts, weights, pseudo)
                ]
                if response is not None:
                    solved = filtered(sum(parts), sum(aims), lam, weight(anchor, n), response)
                elif sensitivities is None:
                    right = lam * weight(anchor, n) + sum(aims)
                    solved = torch.linalg.solve(sum(parts) + ridge, right, left=False)
                else:
                    each = [m[n] for m in metrics]
                    solved = solve_weighted(parts, aims, ridge, weight(anchor, n), each, betas)
                result = weight(origin, n) + scale * (solved - weight(origin, n))
                state = merged.state_dict()
                if bias:
                    state[f"{n}.bias"].copy_(result[:, -1])
                    result = result[:, :-1]
                state[f"{n}.weight"].copy_(result.T if transposed[n] else result)
    return merged


def by_keys(names, weighed):
    """Of the modules that read the same, those whose rows are weighed (a pattern), and the others."""
    return [[n for n in names if bool(re.search(weighed, n)) == has] for has in (True, False)]


def token_weights(batches, rows, kind, weight):
    """Of rows without padding, by going through every sample's tokens."""
    found = []
    for batch in batches:
        given = next(iter(batch.values()))
        each = len(rows) // sum(len(next(iter(b.values()))) for b in batches)
        for mask in batch.get("attention_mask", torch.ones(len(given), each)):
            length = int(mask.sum())
            found += [1.0 if i == (0 if kind == "cls" else length - 1) else weight for i in range(length)]
    return torch.tensor(found, dtype=rows.dtype)


def by_bias(names, state):
    """Modules with a bias are solved apart from those without, though they read the same."""
    parts = [[n for n in names if (f"{n}.bias" in state) == has] for has in (True, False)]
    return sorted(filter(None, parts), key=lambda part: names.index(part[0]))


def block(name):
    """The block that a module stands in: what all blocks read (a decoder's, of the encoder) is solved in each by itself."""
    numbers = [i for i, part in enumerate(name.split(".")) if part.isdecimal()]
    return name.split(".")[: numbers[0] + 1] if numbers else []


def _along(state, origin, names, transposed, width):
    """`U^T U / ||U||^2` of all modules that read the same, a bias left out (zero for the constant 1)."""
    change = torch.cat(
        [_matrix(state, n, transposed[n], False) - _matrix(origin, n, transposed[n], False) for n in names]
    )
    gram = torch.zeros(width, width, dtype=change.dtype)
    gram[: change.shape[1], : change.shape[1]] = change.T @ change / change.square().sum()
    return gram


def _energy(change, metric):
    return float((change.pow(2) if metric is None else change * (change @ metric)).sum())


def _fit_norm(name, merged, origin_model, anchor, drifted, own, aims, alpha, energy, scale):
    """Each feature by itself, by a general solve."""
    module, norm0 = merged.get_submodule(name), origin_model.get_submodule(name)
    energies = [float((y - norm0(x).detach()).pow(2).sum()) / len(x) for x, y in own]
    has_bias = getattr(module, "bias", None) is not None
    plain = copy.deepcopy(module)
    with torch.no_grad():
        plain.weight.fill_(1.0)
        if has_bias:
            plain.bias.zero_()
        hats = [plain(x) for x in drifted]
    designs = [torch.stack([h, torch.ones_like(h)] if has_bias else [h], -1) for h in hats]  # (rows, features, 1 or 2)
    grams = [torch.einsum("nfi,nfj->fij", d, d) / len(d) for d in designs]
    betas = _betas([float(g.norm()) for g in grams] if energy == "frobenius" else energies, energy)
    a = sum(b * g for b, g in zip(betas, grams))
    prior = torch.stack([anchor[f"{name}.{k}"] for k in (("weight", "bias") if has_bias else ("weight",))], -1)
    lam = alpha * float(a.diagonal(dim1=1, dim2=2).sum(1).mean()) / a.shape[-1]
    right = sum(b * torch.einsum("nfi,nf->fi", d, y) / len(d) for b, d, y in zip(betas, designs, aims)) + lam * prior
    solved = torch.linalg.solve(a + lam * torch.eye(a.shape[-1], dtype=a.dtype), right)
    state = merged.state_dict()
    for i, key in enumerate(("weight", "bias") if has_bias else ("weight",)):
        w0 = norm0.state_dict()[key]
        state[f"{name}.{key}"].copy_(w0 + scale * (solved[:, i] - w0))


def _betas(energies, energy):
    inverse = [1 / e for e in energies] if energy else [1.0] * len(energies)
    return [i * len(inverse) / sum(inverse) for i in inverse]


def _with_one(x, bias):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if bias else x
