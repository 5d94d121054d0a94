"""The registered rules as rows, as a markdown table, and as the document beside the rules: what `bmm anchors` prints."""

from __future__ import annotations

from typing import Any

from bmm_engine.anchors.contract import Anchor, registered_anchors

INTRODUCTION = """\
<!-- Printed by `bmm anchors --markdown`; a test holds this file to it. -->

# Anchors: published merging rules

An anchor is a merged model: the prior of the Bayesian solve. It also gives every tensor that is not
a linear module. Each rule is a merging method in its own right too: with `alpha: .inf` the result
is the rule's own merge.

* All rules compute in float32 or better, and round once.
* The bits of a result depend on nothing but the inputs: not on threads, shards, hash seeds or
  scheduling, nor, where a rule is symmetric, on the order of the experts. Of the rules that solve
  on Grams (`regmean`, `regmean_plusplus`, `mats`) this holds for a given number of threads: from
  widths of a few hundred on LAPACK shares a factorisation among them, and the last bits may differ
  ([what is promised](../merging/README.md#bits)).
* Where well-known implementations differ, the form of the paper's authors is the default, and the
  other is a named option.
* `bmm anchors` lists the rules; `bmm anchors NAME` explains one.

How good each is by itself, and below a solve, is in [bench/README.md](../../bench/README.md).

## Choosing one

In a recipe, by name, or with parameters:

```yaml
anchor: {name: ties, density: 0.3}
alpha: .inf                          # the rule by itself; left out: the prior of a solve
```

On tensors or models:

```python
merged = bmm.get_anchor("ties")(base, [w1, w2], density=0.3)  # tensors of any float dtype
bmm.merge(base, experts, anchor="ties", anchor_parameters={"density": 0.3}, alpha=math.inf)
```

Some rules read more than weights. `regmean`, `mats` and `esm` need Grams, `regmean_plusplus` Grams
that are measured while merging, `fisher` Fisher information, and `epimer` what its `metric` says. A
recipe measures them where experts have `calibration`; from Python they are given:

```python
fishers = [bmm.collect_fisher(expert, batches) for expert, batches in zip(experts, calibration)]
bmm.merge(base, experts, anchor="fisher", fishers=fishers, alpha=math.inf)
```

`ip_merging` has a host, the first expert unless `host` names another: the output is its checkpoint,
with [all that only it has](../merging/README.md#a-host). `core_space` merges by any other rule, in
small bases that adapters share:

```yaml
anchor: {name: core_space, rule: ties, rule_parameters: {density: 0.5}}
```

## Parameters that vary

Any parameter may vary over the model, and so may `alpha` and `scale`. A star in the table marks
what may also differ between experts.

```yaml
anchor:
  name: ties
  density: [0.2, 0.3]                  # one for each expert (starred parameters)
  weight: {gradient: [0.2, 1.0]}       # over depth; a bare list where it is not per expert
  scaling: [{filter: mlp, value: 1.0}, {value: 0.8}]  # the first filter in the tensor's name
experts:
  - ./a
  - {model: ./b, parameters: {weight: 0.7}}           # or an expert's own
```

A filter is a part of the tensor's name, or a shell pattern of it. Where none matches, the parameter
keeps its default. Tensors outside the layers (embeddings, final norm, head) count as depth 0.

## Adding one

A rule is one function. Its keyword arguments, their annotations and defaults are its schema.

```python
@bmm.anchor(scope="tensor", paper="Doe 2026, arXiv ...")
def halfway(base, experts, *, share: float = 0.5):
    \"\"\"`W = W_0 + share (mean_t W_t - W_0)`.\"\"\"
    return base + share * (sum(experts) / len(experts) - base)
```

* `scope` is `tensor`, `module` (the (out, in) weight of a linear module) or `model` (a first pass
  sees the whole model). [contract.py](contract.py) says what each gets and must keep.
* `needs` names what it reads beside the weights: `grams`, `sequential_grams`, `fishers` or
  `sensitivities`, several of them, or a function of its parameters that says which.
* A package registers its own by an entry point in the group `bmm_engine.anchors`.
* A rule of this folder is one file and one float64 oracle in `tests/anchors/`;
  [CONTRIBUTING.md](../../CONTRIBUTING.md#a-new-rule) has the steps.

## The rules

`W_0` is the base, `W_t` an expert, `tau_t = W_t - W_0`. Parameters have their defaults:

"""


_NEEDS = {
    "grams": "Grams",
    "sequential_grams": "sequential Grams",
    "fishers": "Fisher information",
    "sensitivities": "sensitivities",
}


def rows() -> list[dict[str, Any]]:
    """One plain value for each rule: name, scope, what it needs beside the weights at its defaults, parameters, summary, paper."""
    return [
        {
            "name": rule.name,
            "scope": rule.scope,
            "needs": " ".join(sorted(rule.needs_of())),
            "experts": list(rule.experts),
            "parameters": rule.schema,
            "summary": rule.summary,
            "paper": rule.paper,
        }
        for rule in registered_anchors().values()
    ]


def parameter_text(parameter: dict[str, Any]) -> str:
    """`density=0.2*`: a star where it may differ between experts."""
    return f"{parameter['name']}={plain(parameter['default'])}{'*' if parameter['per_expert'] else ''}"


def plain(value: Any) -> str:
    """A default as one writes it in a recipe."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def markdown() -> str:
    """The table of all rules."""
    lines = ["| name | what | parameters | paper |", "|---|---|---|---|"]
    for rule in registered_anchors().values():
        lines.append(f"| `{rule.name}` | {summary_cell(rule)} | {parameters_cell(rule)} | {rule.paper} |")
    return "\n".join(lines)


def document() -> str:
    """The README.md of this folder: what an anchor is, how to choose, vary and add one, and the table."""
    return f"{INTRODUCTION}{markdown()}\n"


def summary_cell(rule: Anchor) -> str:
    needs = " and ".join(_NEEDS[need] for need in sorted(rule.needs_of()))
    default = " at its defaults" if callable(rule.needs) else ""
    return (rule.summary.rstrip() + (f" Needs {needs}{default}." if needs else "")).replace("|", "\\|")


def parameters_cell(rule: Anchor) -> str:
    return ", ".join(f"`{parameter_text(p)}`" for p in rule.schema) or "none"
