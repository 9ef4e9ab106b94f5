"""Loads a checkpoint of every format and compares what is served with what the format's own library reads.

    pip install compressed-tensors transformers
    python tests/bench/bench_formats.py

Prints a Markdown table. `max difference` is that of the dequantized weights to those of the library; for sources that
are quantized while loading, to those weights quantized to int4, so that 0 says that the source was read exactly; what
int4 itself costs is `relative error`. Each folder is loaded in a process of its own, its files in the page cache:
`seconds` is `load_shard` of all experts, `peak` the most memory beyond what Python and torch took before, with the
mapped pages of the files, which the kernel can drop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from format_cases import (
    Format,
    Matrix,
    Shape,
    read_by_transformers,
    read_compressed_tensors,
    read_fp8_blocks,
    read_w4afp8,
    write_by_transformers,
    write_compressed_tensors,
    write_fp8_blocks,
    write_w4afp8,
)
from timing import about_this_run

from moe_forward.checkpoint import load_shard, read_spec
from w4afp8 import dequantize_int4, quantize_int4

TRANSFORMERS = {
    f"{name}, bf16": Format(False, "transformers", partial(write_by_transformers, family), read_by_transformers)
    for name, family in (("DeepSeek-V3", "DeepseekV3"), ("Qwen3-MoE", "Qwen3Moe"), ("Mixtral", "Mixtral"))
}
PACKED = {
    f"compressed-tensors int4, groups of {size}": Format(
        True, "compressed_tensors", partial(write_compressed_tensors, size), partial(read_compressed_tensors, size)
    )
    for size in (32, 128)
}
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "DeepSeek-R1-W4AFP8": Format(True, "its definition", write_w4afp8, read_w4afp8),
        "DeepSeek-V3, fp8 blocks": Format(False, "transformers", write_fp8_blocks, read_fp8_blocks),
        **TRANSFORMERS,
        **PACKED,
    }
)
COLUMNS = (
    "format",
    "loads",
    "library",
    "max difference",
    "relative error",
    "files MB",
    "held MB",
    "seconds",
    "peak MB",
)


def measure_load(folder: Path) -> dict[str, Any]:
    """Load all experts of a folder, in this process."""
    spec = read_spec(folder)
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    started = time.perf_counter()
    layers = load_shard(folder, spec, spec.layers, range(spec.num_experts))
    seconds = time.perf_counter() - started
    held = sum(layer.nbytes for layer in layers.values())
    return {"seconds": seconds, "peak_bytes": memory_bytes("VmHWM") - before, "held_bytes": held}


def memory_bytes(name: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS is resident, VmHWM was at most."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == f"{name}:")


def compare(folder: Path, kind: Format) -> tuple[float, float]:
    """Largest difference to the library's weights, or to their int4, and relative error to the library's weights."""
    spec, library = read_spec(folder), kind.read(folder)
    largest = wrong = size = 0.0
    for layer, held in load_shard(folder, spec, spec.layers, range(spec.num_experts)).items():
        for number, expert in enumerate(held.experts):
            for name, weight in expert._asdict().items():
                own = library[Matrix(layer, number, f"{name}_proj")].float()
                served = dequantize_int4(weight)
                exact = own if kind.kept else dequantize_int4(quantize_int4(own))
                largest = max(largest, float((served - exact).abs().max()))
                wrong += float((served - own).double().square().sum())
                size += float(own.double().square().sum())
    return largest, (wrong / size) ** 0.5


def row(name: str, folder: Path, shape: Shape) -> dict[str, str]:
    """Write, load and compare one format."""
    kind = FORMATS[name]
    if kind.library not in ("its definition", "transformers") and find_spec(kind.library) is None:
        return {"format": name, "loads": f"not run: {kind.library} is not installed"}
    kind.write(folder, shape)
    command = [sys.executable, __file__, "--load", str(folder)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    largest, relative = compare(folder, kind)
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "format": name,
        "loads": "yes" if kind.kept else "yes, quantized on the way",
        "library": kind.library.replace("_", "-"),
        "max difference": f"{largest:g}",
        "relative error": f"{relative:.4f}" if relative else "0",
        "files MB": f"{files / 1e6:.0f}",
        "held MB": f"{told['held_bytes'] / 1e6:.0f}",
        "seconds": f"{told['seconds']:.2f}",
        "peak MB": f"{told['peak_bytes'] / 1e6:.0f}",
    }


def main() -> None:
    """Print the table, a line a format as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--load", type=Path, metavar="DIR", help="only load this folder, and print what it took")
    parser.add_argument("--experts", type=int, default=Shape.experts)
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--intermediate", type=int, default=Shape.intermediate)
    parser.add_argument("--only", default="", help="formats whose name contains this")
    options = parser.parse_args()
    if options.load is not None:
        print(json.dumps(measure_load(options.load)))
        return
    print(json.dumps(about_this_run(None) | {"threads": torch.get_num_threads()}))
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in (name for name in FORMATS if options.only in name):
        with tempfile.TemporaryDirectory() as scratch:
            cells = row(name, Path(scratch) / "model", Shape(options.hidden, options.intermediate, options.experts))
        print(f"| {' | '.join(cells.get(column, '') for column in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
