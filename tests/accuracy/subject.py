"""One model under measurement: in bf16, in every format in this process, and through the service."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from formats import Format, Weights, quantize
from measure import (
    block_inputs,
    difference,
    generate,
    predict,
    quality,
    relative_error,
    replaced_blocks,
    same_texts,
)
from model import moe_blocks
from outliers import channel_spread
from quantized_block import QuantizedBlock, own_weights, served_weights
from recipe import Recipe
from served import attached, forward, service
from torch import Tensor

from moe_forward import checkpoint

Row = dict[str, Any]


class Subject:
    """A model, and what has been measured of it.

    model: in bf16, on the device of the windows. folder: where it is saved; quantized forms are made beside it.
    held_out: [N, S + 1] windows. calibrating: the same, of the text it was trained on.
    document: takes the figures.
    """

    def __init__(self, model: Any, folder: Path, recipe: Recipe, held_out: Tensor, calibrating: Tensor) -> None:
        self.model = model
        self.folder = folder
        self.recipe = recipe
        self.held_out = held_out
        self.calibrating = calibrating
        self.device = held_out.device
        self.spec = checkpoint.read_spec(folder)
        self.document: dict[str, Any] = {"formats": [], "served": []}
        self.bf16 = predict(model, held_out, recipe.evaluated_together)
        self.inputs = block_inputs(model, held_out[: recipe.layer_windows])
        with torch.no_grad():
            self.outputs = {
                layer: block(self.inputs[layer].unsqueeze(0)).squeeze(0) for layer, block in moe_blocks(model).items()
            }
        self.document["channel_spread"] = {layer: channel_spread(rows) for layer, rows in self.inputs.items()}
        self.document["bf16"] = quality(self.bf16)

    def quantize(self, scales: Weights) -> None:
        """Make an int4 form with the product's own `quantize`."""
        folder = self._quantized_folder(scales)
        quantize(self.model, self.folder, folder, scales, self.calibrating, self.recipe.evaluated_together)
        report = folder / "quantization_report.json"
        if report.is_file():
            self.document.setdefault("quantization_reports", {})[scales] = json.loads(report.read_text())

    def blocks(self, chosen: Format) -> dict[int, QuantizedBlock]:
        """Make the MoE blocks of a format: layer id -> block."""
        if chosen.weights in ("bf16", "fp8"):
            fp8 = chosen.weights == "fp8"
            weights = {layer: own_weights(self.spec, block, fp8) for layer, block in moe_blocks(self.model).items()}
        else:
            every = range(self.spec.num_experts)
            held = checkpoint.load_shard(self._quantized_folder(chosen.weights), self.spec, self.spec.layers, every)
            weights = {layer: served_weights(self.spec, found, self.device) for layer, found in held.items()}
        return {layer: QuantizedBlock(found, chosen.activations) for layer, found in weights.items()}

    def measure(self, chosen: Format) -> None:
        """Measure a format in this process, against bf16."""
        blocks = self.blocks(chosen)
        with replaced_blocks(self.model, blocks):
            found = predict(self.model, self.held_out, self.recipe.evaluated_together)
        row: Row = {"format": chosen.name, "weights": chosen.weights, "activations": chosen.activations}
        row |= quality(found) | difference(found, self.bf16)
        row["layers"] = {layer: self._errors(layer, block) for layer, block in blocks.items()}
        self.document["formats"].append(row)

    def measure_served(self, chosen: Format) -> None:
        """Measure a format as the service computes it, against the same in this process, and both against bf16."""
        windows, together = self.held_out[: self.recipe.served_windows], self.recipe.evaluated_together
        bf16 = self.bf16.first(len(windows))
        blocks = self.blocks(chosen)
        own_texts = self._texts()
        with replaced_blocks(self.model, blocks):
            local = predict(self.model, windows, together)
            local_texts = self._texts()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the service plans with the memory that is free
        began = time.monotonic()
        with service(self._quantized_folder(chosen.weights), self.device.type, str(chosen.activations)) as url:
            ready_seconds = time.monotonic() - began
            outputs = forward(url, self.inputs)
            with attached(self.model, url):
                began = time.monotonic()
                found = predict(self.model, windows, together)
                seconds = time.monotonic() - began
                texts = self._texts()
        row: Row = {"format": chosen.name, "weights": chosen.weights, "activations": chosen.activations}
        row |= {"windows": len(windows), "seconds_until_ready": ready_seconds}
        row["tokens_per_second"] = windows[:, 1:].numel() / seconds
        row["served"] = quality(found) | difference(found, bf16)
        row["local"] = quality(local) | difference(local, bf16)
        row["served_from_local"] = difference(found, local)
        row["layers"] = {layer: self._errors(layer, blocks[layer], output) for layer, output in outputs.items()}
        row["texts_from_local"] = same_texts(texts, local_texts)
        row["local_texts_from_bf16"] = same_texts(local_texts, own_texts)
        self.document["served"].append(row)

    def _quantized_folder(self, scales: Weights) -> Path:
        return self.folder.with_name(f"{self.folder.name}-{scales}")

    def _texts(self) -> Tensor:
        prompts = self.held_out[-self.recipe.prompts :, : self.recipe.prompt_tokens]
        return generate(self.model, prompts, self.recipe.new_tokens)

    def _errors(self, layer: int, block: QuantizedBlock, served: Tensor | None = None) -> dict[str, float]:
        """Relative errors of a layer's output on the bf16 model's own tokens: of the block's, or of what was served."""
        rows = self.inputs[layer] if served is None else self.inputs[layer][: len(served)]
        routes = block.route(rows)
        local = block.output(rows, routes)
        output = local if served is None else served
        errors = {"from_bf16": relative_error(output, self.outputs[layer][: len(rows)])}
        if served is not None:
            errors["from_local"] = relative_error(served, local)
        if block.has_specification:
            errors["from_float64"] = relative_error(output, block.exact(rows, routes))
        return errors
