"""Names, shapes and settings of the DeepSeek-R1-W4AFP8 layout, the one layout that is served.

Source: Barrrrry/DeepSeek-R1-W4AFP8, written by TensorRT-LLM's examples/quantization/quantize_mixed_precision_moe.py
and read by SGLang's layers/quantization/w4afp8.py. Matrices are [N, K]: N output, K input channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_forward.checkpoint.documents import Keys, read_document
from moe_forward.checkpoint.families import FAMILIES
from moe_forward.errors import CheckpointError
from moe_forward.types import ModelSpec

GROUP_SIZE = 128
"""Input channels that share one int4 scale; the only group size the kernels compute with."""

BLOCK = 128
"""Edge of the square that shares one scale in an fp8 matrix."""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SCALE_SUFFIX = "_scale_inv"
CONFIG_FILE = "config.json"
TENSORRT_FILE = "hf_quant_config.json"


def quantization_config() -> dict[str, Any]:
    """Build the `quantization_config` that marks this layout, with the keys SGLang's W4AFp8Config knows."""
    return {
        "quant_method": "w4afp8",
        "activation_scheme": "dynamic",
        "linear_activation_scheme": "dynamic",
        "moe_activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "group_size": GROUP_SIZE,
    }


def expert_matrix(layer: int, expert: int, projection: str) -> str:
    """Name of a routed expert's matrix; its scales are this name with `_scale_inv` behind it."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


def shared_matrix(layer: int, projection: str) -> str:
    """Name of a matrix of the shared expert; its scales are this name with `_scale_inv` behind it."""
    return f"model.layers.{layer}.mlp.shared_experts.{projection}.weight"


def gate_weight(layer: int) -> str:
    """Name of the router's weight [E, H]."""
    return f"model.layers.{layer}.mlp.gate.weight"


def gate_bias(layer: int) -> str:
    """Name of the bias [E] that DeepSeek-V3's router adds to the scores it chooses by."""
    return f"model.layers.{layer}.mlp.gate.e_score_correction_bias"


def matrix_shape(projection: str, hidden_size: int, intermediate_size: int) -> tuple[int, int]:
    """[N, K] of an expert's matrix before packing."""
    return (hidden_size, intermediate_size) if projection == "down_proj" else (intermediate_size, hidden_size)


def int4_shapes(shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the packed codes and of the group scales of an [N, K] matrix."""
    rows, columns = shape
    return (rows, columns // 2), (rows, columns // GROUP_SIZE)


def block_scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of an fp8 [N, K] matrix, one for each 128 x 128 block."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def read_spec(folder: Path, name: str | None = None) -> ModelSpec:
    """Read what the MoE layers of a checkpoint look like from its config.json.

    folder: HF folder. name: the name to serve it under; default the folder's own.
    Returns: the spec; `layers` holds every MoE layer, without multi-token-prediction layers behind the last.
    Raises: CheckpointError naming the file and key for a missing or malformed config, an unknown model_type, or a
        quantization that is not this layout.
    """
    path = folder / CONFIG_FILE
    config = Keys(read_document(path), str(path))
    family = config.text("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type {family!r} is not a model this version serves; it serves {', '.join(sorted(FAMILIES))}"
        )
    _check_quantization(config)
    return FAMILIES[family](config, name or folder.resolve().name, GROUP_SIZE)


def _check_quantization(config: Keys) -> None:
    settings = config.section("quantization_config")
    if settings is None:
        return  # TensorRT-LLM's writer leaves none; the tensors decide
    method = settings.text("quant_method")
    # fp8 is a source for `quantize`, and what copies of this layout say whose config.json was left as it was
    if method not in ("w4afp8", "fp8"):
        raise CheckpointError(f"{settings.where}: quant_method {method!r} cannot be served exactly; expected 'w4afp8'")
    group_size = settings.integer("group_size", default=GROUP_SIZE)
    if group_size != GROUP_SIZE:
        raise CheckpointError(
            f"{settings.where}: group_size {group_size} cannot be served; the kernels compute with {GROUP_SIZE}"
        )
