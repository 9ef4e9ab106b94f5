"""One peer of another project's harness, kept running: reads requests as JSON lines, answers each with one line.

`python peer_process.py FOLDER NAME`, where FOLDER has bench_peers.py with functions `peer_NAME(record, cases, warm)`.
They are called as they are, for one case at a time, so that peers and ours can take turns case by case.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ANSWER = "@@"
"""Starts the lines that are answers; peers print whatever they like."""


def load_harness(folder: Path) -> ModuleType:
    """Import bench_peers.py of a folder and take out what only its own driver needs."""
    spec = importlib.util.spec_from_file_location("bench_peers", folder / "bench_peers.py")
    assert spec is not None
    assert spec.loader is not None
    harness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(harness)
    harness.tile_of = lambda run: ""  # the profiler, to name tiles
    # DeepGEMM's peer compiles in child processes of its own; here "warm" did that.
    idle = SimpleNamespace(wait=lambda timeout: 0)
    harness.subprocess = SimpleNamespace(Popen=lambda *_, **__: idle, DEVNULL=None, TimeoutExpired=TimeoutError)
    return harness


def warm(harness: ModuleType, name: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Compile what the cases need, for peers that compile at run time. Returns: errors by place."""
    record = harness.Rec("")
    record.save = lambda: None
    if name == "humming":
        harness.peer_humming(record, cases, "jit")
    if name == "dg_fp8":
        for case in cases:
            for gemm in ("gu", "dn"):
                harness.peer_dg_fp8(record, [case], f"{case['name']}:{gemm}")
    return {"err": record.d["err"]}


def measure(harness: ModuleType, name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Time one case. Returns: rows, milliseconds and note by variant and GEMM; check, relative errors; err."""
    record = harness.Rec("")
    record.save = lambda: None
    harness.CHECKED = (case["name"],)
    harness.Cache = cold_cache(harness.Cache, case["copies"])
    getattr(harness, f"peer_{name}")(record, [case], None)
    rows = {row: by_case[case["name"]] for row, by_case in record.d["rows"].items() if case["name"] in by_case}
    return {"rows": rows, "check": record.d["check"], "err": record.d["err"]}


def cold_cache(cache: type, copies: int) -> type:
    """Return the harness's class for weights with at least `copies` of them, where it keeps more than one."""
    base = getattr(cache, "plain", cache)

    def __init__(self: Any, make: Any, count: int) -> None:
        base.__init__(self, make, count if count == 1 else max(count, copies))

    return type("ColdCache", (base,), {"__init__": __init__, "plain": base})


def main() -> None:
    """Answer requests {"warm": [cases]} and {"case": case} until there are no more."""
    harness, name = load_harness(Path(sys.argv[1])), sys.argv[2]
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "warm" in request:
                answer = warm(harness, name, request["warm"])
            else:
                answer = measure(harness, name, request["case"])
        except Exception as error:
            traceback.print_exc()
            answer = {"rows": {}, "check": {}, "err": {name: f"{type(error).__name__}: {error}"[:300]}}
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()  # the next process in turn may need it
        print(f"\n{ANSWER}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
