"""What became of every tensor of every input of a merge, and whether much of what could be solved was not."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from bmm_engine.errors import listed
from bmm_engine.merging.align import AlignedExpert, Alignment, original
from bmm_engine.merging.buffers import all_buffers

# In this order. "base": taken from the base as it is; "host": from the host. "tied": another name of a tensor that is merged.
REASONS = ("solved", "rule", "base", "host", "tied", "buffer", "left out")
FIRST = 3
MOST_UNSOLVED = 0.05
_IN_LAYER = re.compile(r"\.\d+\.")

Outcomes = dict[str, dict[str, list[str]]]


def outcomes(alignment: Alignment, solved: Collection[str]) -> Outcomes:
    """Label of an input -> reason -> the names of its tensors, as its own files have them, each under one. `solved`: the base's names of what is
    solved."""
    reasons = {name: "solved" if name in solved else "rule" for name in alignment.merged}
    reasons |= {name: "buffer" if name in alignment.buffers else "base" for name in alignment.kept}
    if alignment.hosted is not None:
        reasons = _of_host(alignment, reasons)
        base = _of_hosted_base(alignment, reasons)
    else:
        base = {**reasons, **dict.fromkeys(alignment.base.aliases, "tied")}
    found = {alignment.base.label: _by_reason(base)}
    for expert in alignment.experts:
        label = expert.label
        while label in found:  # one checkpoint may be given twice
            label += " (again)"
        found[label] = _by_reason(_of_expert(alignment, expert, reasons))
    return found


def _of_host(alignment: Alignment, reasons: Mapping[str, str]) -> dict[str, str]:
    """The reasons by the output's names, where what is kept may be the host's."""
    assert alignment.hosted is not None
    base = {name: original(alignment.base, name) in alignment.hosted.names_of_base for name in reasons}
    return {name: "host" if reason == "base" and not base[name] else reason for name, reason in reasons.items()}


def _of_hosted_base(alignment: Alignment, reasons: Mapping[str, str]) -> dict[str, str]:
    """The base's own names -> what became of it under the host's."""
    view = alignment.hosted
    assert view is not None
    taken = {view.names_of_base.get(original(alignment.base, name)): reason for name, reason in reasons.items()}
    buffers = all_buffers(view.base, view.base.names(), alignment.naming)
    found = {n: taken.get(n, "buffer" if n in buffers else "left out") for n in view.base.names()}
    return found | dict.fromkeys(view.base.aliases, "tied")


def _of_expert(alignment: Alignment, expert: AlignedExpert, reasons: Mapping[str, str]) -> dict[str, str]:
    source = expert.source
    taken = {own: reasons[name] for name in reasons if (own := expert.own_name(name)) is not None}
    found = {}
    for name in source.names():
        if name in alignment.expert_only[expert.label]:
            found[name] = "left out"
        elif name in alignment.expert_buffers[expert.label]:
            found[name] = "buffer"
        else:
            found[name] = taken.get(name, "tied")
    return found | dict.fromkeys(source.aliases, "tied")


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {reason: [] for reason in REASONS}
    for name, reason in reasons.items():
        found[reason].append(name)
    return {reason: names for reason, names in found.items() if names}


def totals(found: Outcomes) -> dict[str, dict[str, dict[str, Any]]]:
    """The same as counts with the first names, for records."""
    return {
        label: {reason: {"tensors": len(names), "first": names[:FIRST]} for reason, names in own.items()}
        for label, own in found.items()
    }


def told(own: Mapping[str, Mapping[str, Any]]) -> str:
    """The totals of one input in a line."""
    parts = []
    for reason, total in own.items():
        names = (
            ""
            if reason in ("solved", "rule")
            else f" ({listed(total['first'], 80)}{', ...' if total['tensors'] > len(total['first']) else ''})"
        )
        parts.append(f"{total['tensors']} {reason}{names}")
    return ", ".join(parts)


def left_in_layers(alignment: Alignment) -> list[str]:
    """A warning for each expert that has trained tensors inside its layers, where no head is, which the base lacks."""
    found = []
    for label, names in alignment.expert_only.items():
        inside = [name for name in names if _IN_LAYER.search(f".{name}")]
        if inside:
            found.append(
                f"{label}: {len(inside)} tensors inside its layers are left out, since the base {alignment.base.label} has none such:"
                f" {listed(inside, 200)}. The output lacks what they do; a base that has them too would keep it."
            )
    return found


def unsolved(alignment: Alignment, solved: Collection[str], spared: Iterable[str]) -> str | None:
    """A warning where more than a twentieth of the linear weights, by their elements, come from the rule although a solve was asked for. `spared`:
    weights that were meant to."""
    naming = alignment.naming
    live = {} if naming is None else naming.known(alignment.merged)
    sizes = {}
    for name in alignment.merged:
        shape = alignment.base.spec(name).shape
        known = live.get(name)
        linear = known in naming.linear if naming is not None and known is not None else name.endswith("weight")
        if linear and len(shape) in (2, 3) and _IN_LAYER.search(f".{name}"):
            sizes[name] = math.prod(shape)
    meant = set(spared)
    left = [name for name in sizes if name not in solved and name not in meant]
    share = sum(sizes[name] for name in left) / sum(sizes.values()) if left else 0.0
    if share <= MOST_UNSOLVED:
        return None
    return (
        f"{len(left)} of {len(sizes)} linear weights, {share:.0%} of their elements, are not solved but come from the rule: {listed(left[:FIRST])}"
        f"{', ...' if len(left) > FIRST else ''}. No Gram covers them (collect those too), or they are no linear modules of the live model (stacked"
        " experts)."
    )
