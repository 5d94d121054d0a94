"""Which names are of buffers that the architecture makes itself: masks, positions, rotary frequencies, counters. They are no weights."""

from __future__ import annotations

import re
from collections.abc import Sequence

# By the last part of the name, for files of architectures (or versions) that nobody can be asked about.
_CONSTANT = re.compile(
    r"(^|\.)((original_)?inv_freq|(cos|sin)_cached|freqs_cis|rotary_pos_emb|position_ids|token_type_ids|masked_bias|causal_mask|tril|(\w+_)?mask"
    r"|relative_position_index|relative_coords_table|num_batches_tracked|n_averaged)$"
)
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.bias$")
_RUNNING = re.compile(r"(^|\.)running_(mean|var)$")


def looks_constant(name: str, shape: Sequence[int]) -> bool:
    """Is it, by its name and shape, a buffer that every model of the architecture has alike?"""
    square = len(shape) >= 3 and shape[-1] == shape[-2] and set(shape[:-2]) == {1}
    return bool(_CONSTANT.search(name)) or (square and bool(_MASK.search(name)))


def is_running(name: str) -> bool:
    """Is it a statistic that training keeps in a buffer? Those are merged like weights."""
    return bool(_RUNNING.search(name))
