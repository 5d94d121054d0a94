"""Checkpoints in and out: lazy sources, the streaming writer, and the record of a merge. Imports no other stage."""

from __future__ import annotations

from bmm_engine.checkpoint.adapter import AdapterSource, is_adapter, open_adapter
from bmm_engine.checkpoint.provenance import (
    RECORD_FILENAME,
    InputRecords,
    input_record,
    is_merge_directory,
    merge_record,
    model_card,
)
from bmm_engine.checkpoint.reader import Checkpoint, open_source
from bmm_engine.checkpoint.shards import parse_size
from bmm_engine.checkpoint.source import StateDictSource, TensorSource, TensorSpec
from bmm_engine.checkpoint.writer import CheckpointWriter

__all__ = [
    "RECORD_FILENAME",
    "AdapterSource",
    "Checkpoint",
    "CheckpointWriter",
    "InputRecords",
    "StateDictSource",
    "TensorSource",
    "TensorSpec",
    "input_record",
    "is_adapter",
    "is_merge_directory",
    "merge_record",
    "model_card",
    "open_adapter",
    "open_source",
    "parse_size",
]
