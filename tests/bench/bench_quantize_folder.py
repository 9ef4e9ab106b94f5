"""Times `moe-forward quantize` of a folder against a plain copy of it, for each way to find scales.

Makes experts of DeepSeek-R1's shape with normal weights in bf16, 88 MB each. `MB/s` is source bytes by the clock;
`MB per CPU second` counts the time that all threads computed, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timing import about_this_run

from moe_forward.checkpoint import quantize
from moe_forward.checkpoint.presets import Preset

HIDDEN, INTERMEDIATE = 7168, 2048
SHAPES = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}


def write_source(folder: Path, experts: int) -> Path:
    """Write a bf16 folder of one MoE layer, an expert a file, and a calibration file beside it; returns the latter."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    places = {}
    for expert in range(experts):
        tensors = {
            f"model.layers.0.mlp.experts.{expert}.{name}.weight": torch.randn(shape, generator=generator).bfloat16()
            for name, shape in SHAPES.items()
        }
        save_file(tensors, folder / f"expert-{expert}.safetensors")
        places |= dict.fromkeys(tensors, f"expert-{expert}.safetensors")
    config = Preset(HIDDEN, INTERMEDIATE, experts, 1, 1, 1, dense_layers=0, moe_layers=1).config(1)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    calibration = folder.with_name("calibration.safetensors")
    channels = {"layers.0.gate_up": (HIDDEN,), "layers.0.down": (experts, INTERMEDIATE)}
    save_file(
        {name: (2 * torch.randn(size, generator=generator)).exp() for name, size in channels.items()}, calibration
    )
    return calibration


def timed(name: str, source_bytes: int, run: Callable[[], object]) -> str:
    """One line of the table."""
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    megabytes = source_bytes / 1e6
    return f"| {name} | {seconds:.2f} | {megabytes / seconds:.0f} | {megabytes / cpu_seconds:.0f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    print(json.dumps(about_this_run(None)))
    print("| | seconds | MB/s | MB per CPU second |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source, made = Path(scratch) / "source", Path(scratch) / "made"
        calibration = write_source(source, options.experts)
        source_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        ways: dict[str, dict[str, Any]] = {
            "rtn": {},
            "search": {"scales": "search"},
            "search, calibrated": {"scales": "search", "calibration": calibration},
        }
        for _ in range(options.runs):
            print(timed("copy", source_bytes, lambda: shutil.copytree(source, made)), flush=True)
            shutil.rmtree(made)
            for name, way in ways.items():
                chosen = {"workers": options.workers, "device": options.device, "progress": False, **way}

                def run(chosen: dict[str, Any] = chosen) -> None:
                    quantize(source, made, **chosen)

                print(timed(name, source_bytes, run), flush=True)
                shutil.rmtree(made)


if __name__ == "__main__":
    main()
