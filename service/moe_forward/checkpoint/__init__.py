"""Checkpoints: read, load, quantize, make and describe model folders."""

from __future__ import annotations

from moe_forward.checkpoint.index import CheckpointIndex, Header, TensorInfo, open_index, read_header
from moe_forward.checkpoint.inspect import inspect
from moe_forward.checkpoint.layout import read_spec
from moe_forward.checkpoint.load import LayerWeights, load_shard
from moe_forward.checkpoint.presets import PRESETS
from moe_forward.checkpoint.quantize import quantize
from moe_forward.checkpoint.resolve import resolve_model
from moe_forward.checkpoint.synthetic import make_model

__all__ = [
    "PRESETS",
    "CheckpointIndex",
    "Header",
    "LayerWeights",
    "TensorInfo",
    "inspect",
    "load_shard",
    "make_model",
    "open_index",
    "quantize",
    "read_header",
    "read_spec",
    "resolve_model",
]
