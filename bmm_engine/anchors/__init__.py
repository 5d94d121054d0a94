"""Published merging rules: each an anchor for BMM, and a merging method in its own right. One file each, chosen by name."""

from bmm_engine.anchors import average, iso_c, task_arithmetic, ties  # noqa: F401  (importing a rule registers it)
from bmm_engine.anchors.contract import Anchor, anchor, get_anchor, registered_anchors

__all__ = ["Anchor", "anchor", "get_anchor", "registered_anchors"]
