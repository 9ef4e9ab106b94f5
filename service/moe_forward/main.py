"""The command line: `moe-forward serve | quantize | inspect | make-model | bench`."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from moe_forward import __version__, logs
from moe_forward.config import Config, load_config, parse_layers
from moe_forward.errors import MoEForwardError
from moe_forward.runtime_folder import runtime_folder

if TYPE_CHECKING:
    from moe_forward.memory_plan import MemoryPlan
    from moe_forward.types import ModelSpec

# Each command imports what it needs when it runs: Ray and uvicorn take seconds, and only `serve` needs them.


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. A known error is one line on stderr and status 1."""
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    try:
        run(options)
    except (MoEForwardError, ValueError) as error:
        print(f"moe-forward: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(options: dict[str, object]) -> None:
    path = options.pop("config")
    config = load_config(path if isinstance(path, Path) else None, options)
    logs.configure(config.log_level, config.log_format)
    # Until the event loop takes the signal over, the default action would leave the folder behind.
    signal.signal(signal.SIGTERM, _stop)
    with runtime_folder(config.ray_address is not None, config.allow_ray_without_token) as folder:
        from moe_forward.serve import serve

        serve(config, folder)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)  # as after the start: who sends SIGTERM wants an end, and systemd takes 143 for a failure


def _quantize(options: dict[str, object]) -> None:
    from moe_forward import checkpoint

    checkpoint.quantize(**options)  # type: ignore[arg-type]


def _inspect(options: dict[str, object]) -> None:
    from moe_forward import checkpoint

    folder, ranks, layers, device = (options[name] for name in ("folder", "ranks", "layers", "device"))
    assert isinstance(folder, Path)
    assert isinstance(ranks, int)
    spec = checkpoint.read_spec(folder)
    chosen = parse_layers(layers if isinstance(layers, str) else None, spec.layers)
    print(checkpoint.inspect(folder, ranks, chosen))
    if isinstance(device, str):
        print(f"\n{_memory_plan(replace(spec, layers=chosen), ranks, device, options)}")


def _memory_plan(spec: ModelSpec, ranks: int, device: str, options: dict[str, object]) -> MemoryPlan:
    """Plan with what `serve` would choose on a host that has everything, and the configuration's defaults."""
    from moe_forward import memory_plan

    exchange, step_tokens = options["exchange"], options["max_step_tokens"]
    assert isinstance(step_tokens, int)
    if not isinstance(exchange, str):
        exchange = "local" if ranks == 1 else "gloo" if device == "cpu" else "deepep"
    experts = "reference" if device == "cpu" else "cutlass"
    defaults = Config()
    max_tokens = min(-(-step_tokens // ranks), defaults.max_rank_tokens)
    return memory_plan.plan(
        *(spec, ranks, exchange, experts, max_tokens, defaults.activation_scale),
        max_graph_tokens=defaults.max_graph_tokens,
    )


def _make_model(options: dict[str, object]) -> None:
    from moe_forward import checkpoint

    checkpoint.make_model(**options)  # type: ignore[arg-type]


def _bench(options: dict[str, object]) -> None:
    from moe_forward.bench.run import bench

    bench(**options)  # type: ignore[arg-type]


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("moe-forward", description="The MoE part of a transformer layer as a service.")
    parser.add_argument("--version", action="version", version=f"moe-forward {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="serve a checkpoint's MoE layers over HTTP")
    serve.set_defaults(run=_serve)
    serve.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON document; flags override it")
    serve.add_argument("--model", metavar="DIR|synthetic:NAME", help="checkpoint folder (default: synthetic:tiny)")
    serve.add_argument("--served-model-name", metavar="NAME", help="default: the folder's name")
    serve.add_argument("--layers", metavar="3-60", help="default: every MoE layer")
    serve.add_argument("--ranks", type=int, metavar="N", help="default: all GPUs, or 2 on CPU")
    serve.add_argument("--device", choices=("auto", "cpu", "cuda"))
    serve.add_argument("--exchange", choices=("auto", "deepep", "nccl", "gloo", "local"))
    serve.add_argument("--host", help="default: 127.0.0.1")
    serve.add_argument("--api-keys-file", type=Path, metavar="FILE", help="who may call: NAME:KEY or KEY a line")
    serve.add_argument(
        "--allow-anonymous", action="store_true", default=None, help="listen beyond loopback without API keys"
    )
    serve.add_argument("--port", type=int, help="default: 8000; 0 takes a free one")
    serve.add_argument("--frontends", type=int, metavar="N", help="processes that serve the port (default: 1)")
    serve.add_argument("--metrics-port", type=int, help="default: 9400; 0 takes a free one")

    quantize = commands.add_parser("quantize", help="make a w4afp8 checkpoint from a bf16 or fp8 one")
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("source", type=Path, metavar="SRC")
    quantize.add_argument("destination", type=Path, metavar="DST")
    quantize.add_argument("--workers", type=int, metavar="N", help="default: all cores")
    quantize.add_argument(
        "--scales",
        choices=("rtn", "search"),
        default="rtn",
        help="of int4: amax / 7, or searched for the least error, with a report of both (default: rtn)",
    )
    quantize.add_argument(
        "--calibration", type=Path, metavar="FILE", help="mean squares of activations: search by the error of outputs"
    )
    quantize.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")

    inspect = commands.add_parser("inspect", help="print what a checkpoint holds and what each rank would")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("folder", type=Path, metavar="DIR")
    inspect.add_argument("--ranks", type=int, default=1, metavar="N")
    inspect.add_argument("--layers", metavar="3-60", help="default: every MoE layer")
    inspect.add_argument("--device", choices=("cpu", "cuda"), help="also print the memory a rank would take there")
    inspect.add_argument("--exchange", choices=("deepep", "nccl", "gloo", "local"), help="default: deepep on cuda")
    inspect.add_argument("--max-step-tokens", type=int, default=Config().max_step_tokens, metavar="N", help="as served")

    make_model = commands.add_parser("make-model", help="write a checkpoint with random but realistic weights")
    make_model.set_defaults(run=_make_model)
    make_model.add_argument("folder", type=Path, metavar="DIR")
    make_model.add_argument("--preset", choices=("tiny", "deepseek-r1-layer"), default="tiny")
    make_model.add_argument("--layers", type=int, metavar="N", help="number of MoE layers")
    make_model.add_argument("--seed", type=int, default=0)

    bench = commands.add_parser("bench", help="load a running service and report latency")
    bench.set_defaults(run=_bench)
    _add_bench_arguments(bench)
    return parser


def _add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("url", metavar="URL")

    what = bench.add_argument_group("what a request is")
    size = what.add_mutually_exclusive_group()
    size.add_argument("--tokens", type=_sizes, default=(1, 16, 128), metavar="1,16,128", help="rows; a run for each")
    size.add_argument("--mix", metavar="1:70,64:25,2048:5", help="rows by weight, in one run")
    what.add_argument("--layers", "--layer", default="all", metavar="all|3,5,7-9", help="default: all")
    what.add_argument("--layer-order", choices=("round-robin", "random"), default="round-robin")
    what.add_argument("--dtype", choices=("bf16", "f16", "f32", "fp8"), default="bf16")
    what.add_argument(
        "--routing", choices=("server", "topk", "logits"), default="server", help="by the layer's gate, or sent along"
    )
    what.add_argument("--shared-experts", action=argparse.BooleanOptionalAction, default=True)
    what.add_argument("--timeout-seconds", type=float, default=30.0, help="of a request (default: 30)")
    what.add_argument("--seed", type=int, default=0)

    when = bench.add_argument_group("when they are sent")
    loop = when.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency", type=_sizes, default=(8,), metavar="1,8,64", help="closed loop: callers; a run for each"
    )
    loop.add_argument(
        "--rate", type=_rates, default=(), metavar="100,200", help="open loop: requests a second; a run for each"
    )
    when.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson", help="of an open loop")
    when.add_argument("--max-inflight", type=int, default=256, metavar="N", help="of an open loop (default: 256)")
    length = when.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=10.0, help="of measuring a run (default: 10)")
    length.add_argument("--requests", type=int, metavar="N", help="to measure in a run, however long it takes")
    when.add_argument("--warmup-seconds", type=float, default=2.0, help="before it (default: 2)")
    when.add_argument("--processes", type=int, default=1, metavar="P", help="that share the load (default: 1)")

    said = bench.add_argument_group("what is said of it")
    said.add_argument(
        "--slo-ms", dest="slo_milliseconds", type=float, metavar="X", help="also count requests that took X ms at most"
    )
    said.add_argument(
        "--self-check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure what the generator itself can do, a second a run (default: yes)",
    )
    said.add_argument("--json", dest="json_path", type=Path, metavar="FILE", help="write the report there too")
    said.add_argument("--plot", dest="plot_path", type=Path, metavar="FILE.svg|png", help="draw latency over load")
    said.add_argument("--compare", dest="compare_path", type=Path, metavar="OLD.json", help="print ratios to a report")

    who = bench.add_argument_group("who asks, and whom")
    who.add_argument("--api-key-file", type=Path, metavar="FILE", help="send the first key in it")
    who.add_argument("--ca-file", type=Path, metavar="FILE", help="trust the service's certificate by this one")


if __name__ == "__main__":
    sys.exit(main())
