"""The formats that are compared: how experts' weights and the activations before each of their GEMMs are stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from measure import predict
from torch import Tensor

from moe_forward import checkpoint
from moe_forward.integrations.transformers import record_calibration
from w4afp8 import Granularity

Weights = Literal["bf16", "fp8", "rtn", "search", "calibrated"]

INT4: dict[Weights, str] = {
    "rtn": "int4, round to nearest",
    "search": "int4, searched scales",
    "calibrated": "int4, calibrated scales",
}
WEIGHTS: dict[Weights, str] = {"bf16": "bf16", "fp8": "fp8 128x128", **INT4}
ACTIVATIONS: dict[Granularity | None, str] = {None: "bf16", "token": "fp8, token", "token_group": "fp8, token and 128"}


@dataclass(frozen=True)
class Format:
    """A format. activations: granularity of their e4m3 scales; None: they stay bf16."""

    weights: Weights
    activations: Granularity | None

    @property
    def name(self) -> str:
        """Its name in results."""
        return f"{self.weights}/{self.activations or 'bf16'}"


def formats() -> list[Format]:
    """Every format that is measured against bf16."""
    found = [Format(weights, scales) for weights in ("bf16", "fp8") for scales in ("token", "token_group")]
    for weights in INT4:
        found += [Format(weights, activations) for activations in ACTIVATIONS]
    return found


def quantize(model: Any, source: Path, destination: Path, scales: Weights, windows: Tensor, together: int) -> None:
    """Quantize a saved model with the product's own `quantize`.

    model: the same in memory. scales: which of `INT4`.
    windows: text that calibrates, none of it held out; only `calibrated` looks at it.
    """
    options: dict[str, Any] = {"progress": False, "scales": "rtn" if scales == "rtn" else "search"}
    if scales == "calibrated":
        options["calibration"] = destination.with_suffix(".calibration.safetensors")
        with torch.no_grad(), record_calibration(model, options["calibration"]):
            predict(model, windows, together)
    checkpoint.quantize(source, destination, **options)
