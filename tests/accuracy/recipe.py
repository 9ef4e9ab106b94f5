"""Every constant of the accuracy figures: the model, its training, and what is evaluated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SEPARATOR = 256
"""Token between two texts; 0 to 255 are bytes."""

PADDING = 257


@dataclass(frozen=True)
class Recipe:
    """A byte model of DeepSeek-V3's shape, how it is trained, and what is measured of it.

    Sizes that meet the experts' kernels (hidden_size, moe_intermediate_size) are multiples of 128.
    """

    seed: int = 1

    hidden_size: int = 512
    intermediate_size: int = 1536
    moe_intermediate_size: int = 256
    layers: int = 6
    experts: int = 32
    top_k: int = 4
    groups: int = 4
    top_groups: int = 2
    heads: int = 8
    q_lora_rank: int = 256
    kv_lora_rank: int = 128
    head_dim: int = 32
    """Of a head's part without and of its part with rotation; a value has both together."""
    routed_scaling_factor: float = 2.5
    vocabulary: int = 264

    window_tokens: int = 1024
    batch_windows: int = 64
    peak_learning_rate: float = 1e-3
    last_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    largest_gradient_norm: float = 1.0
    bias_speed: float = 1e-3
    """Of the correction bias that balances the experts' load, a step (DeepSeek-V3 report, section 4.2)."""
    timed_steps: tuple[int, int] = (10, 40)
    """Between these a step's time is taken, which decides how many steps fit the minutes that were asked for."""

    corpus_bytes: int = 256 << 20
    largest_text_bytes: int = 256 << 10
    held_out_share: int = 20
    """One text in this many is held out."""

    evaluated_windows: int = 512
    served_windows: int = 128
    evaluated_together: int = 16
    calibration_windows: int = 128
    layer_windows: int = 2
    """Whose tokens' inputs to each MoE layer the layer errors are taken on."""
    prompts: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 64

    outlier_channels: int = 8
    outlier_factor: float = 128.0
    """About the 100 that is seen in large models; a power of two, so that the bf16 model keeps its bits."""

    def document(self) -> dict[str, Any]:
        """Return the constants by name."""
        return asdict(self)


PRESETS = {
    "full": Recipe(),
    # tries the scripts on a CPU; its figures mean nothing
    "micro": Recipe(
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=256,
        layers=2,
        experts=8,
        top_k=2,
        heads=2,
        q_lora_rank=64,
        kv_lora_rank=64,
        head_dim=16,
        window_tokens=128,
        batch_windows=4,
        warmup_steps=5,
        timed_steps=(1, 3),
        corpus_bytes=4 << 20,
        evaluated_windows=8,
        served_windows=4,
        evaluated_together=4,
        calibration_windows=4,
        layer_windows=1,
        prompts=2,
        prompt_tokens=16,
        new_tokens=4,
        outlier_channels=4,
    ),
}
