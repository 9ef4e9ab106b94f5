"""Times the quantization kernels on one GPU; prints a table and writes JSON.

The floor is reading the rows and writing fp8 and scales at 4389 GB/s; a launch takes what it takes. Copies of the rows
are taken in turn so that none is in L2, except in cases named "in L2", which is where a GEMM leaves few rows.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from cases import COLD_BYTES, READ_BYTES_PER_SECOND
from ours import figures
from timing import about_this_run, median_seconds

from w4afp8 import Granularity, Quantized
from w4afp8.quantize import quantize_tokens_cuda, silu_mul_quantize

Out = tuple[Quantized, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """rows of `channels` each, of room for `capacity`; gate_up: twice the channels, through SwiGLU."""

    rows: int
    channels: int
    dtype: torch.dtype
    granularity: Granularity
    gate_up: bool = False
    capacity: int = 0
    cold: bool = True

    @property
    def name(self) -> str:
        """What the table calls it."""
        kind = "silu_mul_quantize" if self.gate_up else "quantize"
        room = f" of {self.capacity}" if self.capacity else ""
        type_name = str(self.dtype).removeprefix("torch.")
        return (
            f"{kind} {self.rows}{room} x {self.channels} {type_name} {self.granularity}{'' if self.cold else ' in L2'}"
        )

    @property
    def row_bytes(self) -> int:
        """Bytes that one row brings in."""
        return self.channels * self.dtype.itemsize * (2 if self.gate_up else 1)

    @property
    def floor_seconds(self) -> float:
        """Time of the row's traffic."""
        scales = 4 * (1 if self.granularity == "token" else self.channels // 128)
        return self.rows * (self.row_bytes + self.channels + scales) / READ_BYTES_PER_SECOND


def works() -> list[Work]:
    """Tokens on their way in, activated rows between the GEMMs, and gate and up themselves."""
    found = []
    for granularity in ("token", "token_group"):
        for rows in (32, 256, 4096, 16384):
            found += [
                Work(rows, 7168, torch.bfloat16, granularity),
                Work(rows, 2048, torch.float32, granularity, cold=rows > 256),
                Work(rows, 2048, torch.float32, granularity, gate_up=True, cold=rows > 256),
                Work(rows, 2048, torch.bfloat16, granularity, gate_up=True, cold=rows > 256),
            ]
    return [
        *found,
        Work(300, 2048, torch.float32, "token", capacity=65536, cold=False),
        Work(300, 2048, torch.float32, "token", gate_up=True, capacity=65536, cold=False),
        Work(0, 2048, torch.float32, "token", capacity=65536, cold=False),
    ]


def bench(work: Work) -> dict[str, object]:
    """Time one kernel."""
    room = work.capacity or work.rows
    copies = max(2, int(COLD_BYTES / max(1, room * work.row_bytes)) + 1) if work.cold else 2
    width = work.channels * (2 if work.gate_up else 1)
    x = [torch.randn(room, width, device="cuda").to(work.dtype) for _ in range(copies)]
    live = torch.tensor(work.rows, device="cuda") if work.capacity else None
    run: Callable[[torch.Tensor, Out | None], Out] = (
        partial(_activate, granularity=work.granularity, live=live)
        if work.gate_up
        else lambda each, out: quantize_tokens_cuda(each, work.granularity, live, out, "nan")
    )
    outs = [run(each, None) for each in x]
    seconds = median_seconds([partial(run, each, out) for each, out in zip(x, outs, strict=True)])
    return {"case": work.name, **figures(seconds, work.floor_seconds)}


def _activate(x: torch.Tensor, out: Out | None, granularity: Granularity, live: torch.Tensor | None) -> Out:
    return silu_mul_quantize(x, granularity, "interleaved", live, out)


def main() -> None:
    """Time every kernel and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "quantize.json")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--commit", help="what is measured; default: what git says")
    options = parser.parse_args()
    head, results = about_this_run(options.commit), []
    for work in works():
        if options.only in work.name:
            results.append(bench(work))
            timed = results[-1]
            print(f"{work.name:66s} {timed['us']:7.1f} us, floor {timed['floor_us']:6.1f}, {timed['percent']:4.0f} %")
    options.out.write_text(json.dumps({**head, "results": results}, indent=1))


if __name__ == "__main__":
    main()
