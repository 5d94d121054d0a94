"""The registered rules as rows and as a markdown table: what `bmm anchors` prints, and what the README holds."""

from __future__ import annotations

from typing import Any

from bmm_engine.anchors.contract import Anchor, registered_anchors


def rows() -> list[dict[str, Any]]:
    """One plain value for each rule: name, scope, what it needs beside the weights, parameters, summary, paper."""
    return [
        {
            "name": rule.name,
            "scope": rule.scope,
            "needs": rule.needs,
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


def summary_cell(rule: Anchor) -> str:
    needs = {
        "grams": " Needs Grams.",
        "sequential_grams": " Needs sequential Grams.",
        "fishers": " Needs Fisher information.",
    }.get(rule.needs, "")
    return (rule.summary.rstrip() + needs).replace("|", "\\|")


def parameters_cell(rule: Anchor) -> str:
    return ", ".join(f"`{parameter_text(p)}`" for p in rule.schema) or "none"
