"""Names, shapes and settings of checkpoints, above all of the DeepSeek-R1-W4AFP8 layout, which `quantize` writes.

Source: Barrrrry/DeepSeek-R1-W4AFP8, written by TensorRT-LLM's examples/quantization/quantize_mixed_precision_moe.py
and read by SGLang's layers/quantization/w4afp8.py. Matrices are [N, K]: N output, K input channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_forward.checkpoint import compressed_tensors
from moe_forward.checkpoint.documents import Keys, read_document
from moe_forward.checkpoint.families import FAMILIES, NESTED
from moe_forward.errors import CheckpointError
from moe_forward.types import ModelSpec

GROUP_SIZE = 128
"""Input channels that share one int4 scale in this layout, and in whatever is quantized here."""

BLOCK = 128
"""Edge of the square that shares one scale in an fp8 matrix."""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SCALE_SUFFIX = "_scale_inv"
CONFIG_FILE = "config.json"
TENSORRT_FILE = "hf_quant_config.json"
MIXTRAL_PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


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


def mixtral_spelling(name: str) -> str:
    """Spell the name of a router or a routed expert's matrix as Mixtral's checkpoints do."""
    name = name.replace(".mlp.", ".block_sparse_moe.")
    for projection, number in MIXTRAL_PROJECTIONS.items():
        name = name.replace(f".{projection}.", f".{number}.")
    return name


def matrix_shape(projection: str, hidden_size: int, intermediate_size: int) -> tuple[int, int]:
    """[N, K] of an expert's matrix before packing."""
    return (hidden_size, intermediate_size) if projection == "down_proj" else (intermediate_size, hidden_size)


def int4_shapes(shape: tuple[int, int], group_size: int = GROUP_SIZE) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the packed codes and of the group scales of an [N, K] matrix."""
    rows, columns = shape
    return (rows, columns // 2), (rows, columns // group_size)


def block_scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of an fp8 [N, K] matrix, one for each 128 x 128 block."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def read_spec(folder: Path, name: str | None = None) -> ModelSpec:
    """Read what the MoE layers of a checkpoint look like from its config.json.

    folder: HF folder. name: the name to serve it under; default the folder's own.
    Returns: the spec; `layers` holds every MoE layer, without multi-token-prediction layers behind the last.
    Raises: CheckpointError naming the file and key for a missing or malformed config, an unknown model_type, or a
        quantization that is not served.
    """
    path = folder / CONFIG_FILE
    config = Keys(read_document(path), str(path))
    language_model = text_config(config) or config
    family = language_model.text("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{language_model.where}: model_type {family!r} is not a model this version serves; it serves "
            f"{', '.join(sorted([*FAMILIES, *NESTED]))}"
        )
    group_size = _group_size(quantization_settings(config))
    return FAMILIES[family](language_model, name or folder.resolve().name, group_size)


def text_config(config: Keys) -> Keys | None:
    """Find the language model inside the config.json of a model that also sees.

    Returns: its own config; None where all of config.json is the language model's.
    Raises: CheckpointError where it is missing, or of another family than that model's.
    """
    outer = config.text("model_type")
    if outer not in NESTED:
        return None
    nested = config.section("text_config")
    if nested is None:
        raise CheckpointError(f"{config.where}: text_config must be an object where model_type is {outer!r}")
    if (family := nested.text("model_type")) not in NESTED[outer]:
        served = ", ".join(NESTED[outer])
        raise CheckpointError(f"{nested.where}: model_type {family!r} inside {outer} is not served; served is {served}")
    return nested


def quantization_settings(config: Keys) -> Keys | None:
    """Find how a checkpoint is quantized, by its config.json, or the language model inside it.

    Returns: `quantization_config` or, as older writers call it, `compression_config`; None for no quantization.
    Raises: CheckpointError where both the model and the language model inside it have one.
    """
    nested = text_config(config)
    places = [place for place in (config, nested) if place is not None]
    found = [place.section("quantization_config") or place.section("compression_config") for place in places]
    settings = [section for section in found if section is not None]
    if len(settings) > 1:
        raise CheckpointError(f"{config.where}: expected one quantization_config, got another in text_config")
    return settings[0] if settings else None


def _group_size(settings: Keys | None) -> int:
    """Inputs that share an int4 scale once the checkpoint is loaded; CheckpointError for what is not served."""
    if settings is None:
        return GROUP_SIZE  # bf16, or TensorRT-LLM's writer, which leaves none; the tensors decide
    method = settings.text("quant_method")
    if method == compressed_tensors.METHOD:
        return compressed_tensors.group_size(settings)
    # copies of this layout say fp8 where their config.json was left as it was; the tensors decide
    if method not in ("w4afp8", "fp8"):
        found = {key: settings.document[key] for key in ("bits", "num_bits", "group_size") if key in settings.document}
        raise CheckpointError(
            f"{settings.where}: quant_method {method!r} cannot be served exactly{f' ({found})' if found else ''}; "
            f"served are w4afp8, {compressed_tensors.METHOD} ({compressed_tensors.SERVED}), fp8 in blocks of "
            f"{BLOCK} x {BLOCK}, and weights that are not quantized"
        )
    block = settings.document.get("weight_block_size")
    if method == "fp8" and block != [BLOCK, BLOCK]:
        raise CheckpointError(
            f"{settings.where}: fp8 with weight_block_size {block} cannot be served; served is [{BLOCK}, {BLOCK}]"
        )
    group_size = settings.integer("group_size", default=GROUP_SIZE)
    if group_size != GROUP_SIZE:
        raise CheckpointError(
            f"{settings.where}: group_size {group_size} cannot be served with {method}; served is {GROUP_SIZE}"
        )
    return GROUP_SIZE
