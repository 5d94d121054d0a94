"""Where a linear module stands in a transformer: its role, by its name, and its layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Role = Literal["attention_in", "attention_out", "mlp_in", "mlp_out", "other"]
ROLES: tuple[Role, ...] = ("attention_in", "attention_out", "mlp_in", "mlp_out", "other")

_ATTENTION_IN = re.compile(
    r"^(q|k|v|query|key|value|qkv|wqkv|wq|wk|wv|c_attn|in_proj|query_key_value|[qkv]_(proj|lin|a_proj|b_proj)|(qkv|query|key|value)_proj"
    r"|to_(q|k|v|qkv)|kv_a_proj_with_mqa|kv_b_proj)$"
)
_QUERY = re.compile(r"^(q|query|wq|q_(proj|lin|a_proj|b_proj)|query_proj|to_q)$")
_ATTENTION_OUT = re.compile(r"^(o|o_proj|out_proj|out_lin|to_out)$")
_MLP_IN = re.compile(
    r"^(fc1|c_fc|gate|up|gate_proj|up_proj|gate_up_proj|w1|w3|wi|wi_0|wi_1|lin1|linear1|dense_h_to_4h)$"
)
_MLP_OUT = re.compile(r"^(fc2|down|down_proj|w2|lin2|linear2|dense_4h_to_h)$")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def module_role(name: str) -> Role:
    """The role of a linear module by the names that transformers and timm give; "other" for what they do not tell (poolers, heads)."""
    *path, leaf = name.lower().split(".")
    attention = any("attn" in part or "attention" in part for part in path)
    if _ATTENTION_IN.match(leaf):
        return "attention_in"
    if _ATTENTION_OUT.match(leaf):
        return "attention_out"
    if _MLP_IN.match(leaf):
        return "mlp_in"
    if _MLP_OUT.match(leaf):
        return "mlp_out"
    if leaf == "dense" and path and path[-1] == "intermediate":
        return "mlp_in"
    if leaf in ("dense", "c_proj", "proj", "wo", "output"):
        if attention:
            return "attention_out"
        if path and (path[-1] == "output" or leaf in ("c_proj", "wo")):
            return "mlp_out"
    return "other"


def gives_keys(name: str) -> bool:
    """Are keys or values (or what mixes rows in their place) among what it gives, by its name: of an input of attention, all but queries?"""
    return module_role(name) == "attention_in" and not _QUERY.match(name.lower().split(".")[-1])


class Layers:
    """Module name -> its 0-based layer, by the first number among the parts of its name; None outside the layers."""

    def __init__(self, names: Iterable[str]):
        self._of = {name: int(found[1]) for name in names if (found := _LAYER.search(name))}
        self.count = max(self._of.values(), default=-1) + 1

    def __call__(self, name: str) -> int | None:
        return self._of.get(name)

    def bin(self, name: str, bins: int) -> int:
        """Which of `bins` contiguous bins of the layers; a module outside the layers counts with the last."""
        layer = self(name)
        return bins - 1 if layer is None or self.count == 0 else min(bins - 1, layer * bins // self.count)
