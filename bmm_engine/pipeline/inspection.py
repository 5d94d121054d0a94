"""What `bmm inspect` shows: a checkpoint's contents, or a merge plan, as plain values and as tables."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bmm_engine.checkpoint import Checkpoint
from bmm_engine.checkpoint.quantised import refuse_quantised
from bmm_engine.errors import CheckpointError
from bmm_engine.merging.outcomes import outcomes, told, totals
from bmm_engine.merging.plan import MergePlan
from bmm_engine.models.architecture import LinearModule, checkpoint_linear_modules, weight_patterns
from bmm_engine.models.building import UnknownArchitectureError


def describe_checkpoint(model: str, *, local_files_only: bool = False) -> dict[str, Any]:
    """Files, tensors, dtypes, tied names and linear modules of a checkpoint, from its headers."""
    checkpoint = Checkpoint.open(model, local_files_only=local_files_only)
    specs = [checkpoint.spec(name) for name in checkpoint.names()]
    config = checkpoint.config or {}
    linear, unknown = {}, None if config else "there is no config.json"
    if config:
        try:
            linear = checkpoint_linear_modules(checkpoint.path, {s.name: s.shape for s in specs})
            _check_shapes(checkpoint, linear)
        except UnknownArchitectureError as error:
            patterns = weight_patterns({s.name: s.shape for s in specs})
            linear, unknown = {}, f"{error} Of these files: modules: {patterns[:4]}."
        except CheckpointError as error:  # the rest is still worth showing
            linear, unknown = {}, str(error)
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "architecture": _architecture(config),
        "files": checkpoint.shard_sizes(),
        "tensors": len(specs),
        "parameters": sum(s.nbytes // s.dtype.itemsize for s in specs),
        "dtypes": dict(Counter(str(s.dtype).removeprefix("torch.") for s in specs)),
        "tied": checkpoint.aliases,
        "linear_modules": {m.name: [m.out_features, m.in_features] for m in linear.values()},
        "linear_modules_unknown": unknown,
        "quantised": _quantised(checkpoint),
    }


def _quantised(checkpoint: Checkpoint) -> str | None:
    """Why it cannot be merged, where its weights are quantised."""
    try:
        refuse_quantised(checkpoint)
    except CheckpointError as error:
        return str(error)
    return None


def _check_shapes(checkpoint: Checkpoint, linear: dict[str, LinearModule]) -> None:
    """Raise `CheckpointError` where the config describes another shape than the files hold."""
    for module in linear.values():
        held = checkpoint.spec(module.weight).shape
        if held != module.stored_shape:
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: describes {module.weight!r} with shape {module.stored_shape}, the files hold {held}. Correct the"
                " config, or download the checkpoint again."
            )


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    # timm's own config says `architecture`.
    kind = config.get("model_type", config.get("architecture", "unknown"))
    return str(named[0] if isinstance(named, list) and named else kind)


def describe_plan(plan: MergePlan, gram_source: str, mode: str = "plain") -> dict[str, Any]:
    """What a recipe would do: modules by group, what comes from the anchor, from the base, and what stays out.

    `gram_source`, `mode`: the recipe's; where the plan's Gram source differs in the mode plain, Grams are still to be collected.
    """
    alignment = plan.alignment
    return {
        "kind": "plan",
        "mode": mode,
        "base": alignment.base.label,
        "experts": [e.label for e in alignment.experts],
        "prefixes": {e.label: e.prefix for e in alignment.experts if e.prefix},
        "anchor": plan.settings.anchor,
        "calibrate": plan.settings.calibrate,
        "gram_source": gram_source,
        "grams_to_collect": mode == "plain" and gram_source != plan.settings.gram_source,
        "solved_modules": plan.module_count,
        "groups": [
            {"modules": [m.name for m in g.members], "in": g.width, "out": sum(m.out_features for m in g.members)}
            for g in plan.groups
        ],
        "modules_without_gram": list(plan.unmeasured),
        "from_anchor": list(plan.from_anchor),
        "from_base": list(plan.from_base),
        "tensors": totals(outcomes(alignment, plan.solved)),
        "notes": list(plan.notes),
        "left_out_of_experts": {label: list(names) for label, names in alignment.expert_only.items() if names},
    }


def render(description: dict[str, Any]) -> RenderableType:
    """The same for people."""
    return _checkpoint_table(description) if description["kind"] == "checkpoint" else _plan_tables(description)


def _checkpoint_table(d: dict[str, Any]) -> RenderableType:
    table = Table("", d["path"], show_header=True)
    table.add_row("architecture", d["architecture"])
    table.add_row("files", "\n".join(f"{name}  {size / 2**20:.1f} MiB" for name, size in d["files"].items()))
    table.add_row("tensors", f"{d['tensors']}, {d['parameters'] / 1e6:.1f} M parameters")
    table.add_row("dtypes", ", ".join(f"{name} x {count}" for name, count in d["dtypes"].items()))
    table.add_row("tied", ", ".join(f"{a} = {b}" for a, b in d["tied"].items()) or "none")
    shapes = Counter(f"{out} x {inner}" for out, inner in d["linear_modules"].values())
    table.add_row(
        "linear modules",
        ", ".join(f"{count} of {shape}" for shape, count in shapes.items()) or d["linear_modules_unknown"] or "none",
    )
    if d["quantised"]:
        table.add_row("quantised", d["quantised"])
    return table


def _plan_tables(d: dict[str, Any]) -> RenderableType:
    groups = Table(
        "modules that share a Gram",
        "in",
        "out",
        title=f"{d['solved_modules']} modules, {len(d['groups'])} groups ({d['gram_source']})",
    )
    for group in d["groups"]:
        first, rest = group["modules"][0], len(group["modules"]) - 1
        groups.add_row(first + (f" + {rest} more" if rest else ""), str(group["in"]), str(group["out"]))
    anchor = d["anchor"] + (f", calibrated: {d['calibrate']}" if d["calibrate"] else "")
    lines = [
        f"base: {d['base']}",
        *(
            f"expert: {label}" + (f" (names prefixed {d['prefixes'][label]})" if label in d["prefixes"] else "")
            for label in d["experts"]
        ),
        f"from the anchor ({anchor}): {len(d['from_anchor'])} tensors",
        f"from the base: {len(d['from_base'])} tensors",
    ]
    if d["mode"] == "sequential":
        lines.append(
            f"mode sequential: {len(d['experts'])} experts and the merged network read the calibration data once, block by block; modules are listed"
            " one by one, those that share an input are solved together. A search walks through the network again for every trial."
        )
    if d["grams_to_collect"]:
        lines.append(
            "Grams are not collected yet: modules are listed one by one, those that share an input will share a Gram"
        )
    if d["modules_without_gram"]:
        lines.append(f"linear modules without a Gram, from the anchor: {', '.join(d['modules_without_gram'])}")
    lines += [f"{label}: {told(own)}" for label, own in d["tensors"].items()]
    lines += [f"note: {note}" for note in d["notes"]]
    for label, names in d["left_out_of_experts"].items():
        lines.append(f"left out of {label}: {', '.join(names)}")
    return Group(Text("\n".join(lines)), groups)
