"""What the roles of modules are called on a page."""

from __future__ import annotations

ROLE_NAMES = {
    "attention_in": "attention in",
    "attention_out": "attention out",
    "mlp_in": "MLP in",
    "mlp_out": "MLP out",
    "other": "other",
}
