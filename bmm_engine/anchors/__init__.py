"""Published merging rules: each an anchor for BMM, and a merging method in its own right. One file each, chosen by name."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from bmm_engine.anchors.contract import Anchor, Model, Parameters, Site, anchor, get_anchor, registered_anchors
from bmm_engine.anchors.settings import DepthMap, PerExpert, Setting, each

__all__ = [
    "Anchor",
    "DepthMap",
    "Model",
    "Parameters",
    "PerExpert",
    "Setting",
    "Site",
    "anchor",
    "each",
    "get_anchor",
    "registered_anchors",
]

for _module in iter_modules(__path__):  # importing a rule registers it
    import_module(f"{__name__}.{_module.name}")
