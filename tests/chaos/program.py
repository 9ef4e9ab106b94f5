"""`python tests/chaos/run.py`: faults under load, a ledger of every request, a table."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_forward import checkpoint

from .faults import FAULTS
from .questions import Question, make_questions
from .report import table
from .scene import Fault, Scene
from .trial import DEADLINE_SECONDS, Result, run_trial

QUESTIONS = 36


def main(arguments: list[str]) -> int:
    """Run the faults that were asked for; returns 1 where a request was lost, wrong, or anything else must not be."""
    options = _options(arguments)
    if options.markdown:
        print(table([json.loads(path.read_text()) for path in options.json]))
        return 0
    # Gloo listens on the address of the host's name unless told otherwise.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    results: list[Result] = []
    document: dict[str, Any] = {"cores": os.cpu_count(), "trials": []}
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        model = Path(folder) / "tiny"
        checkpoint.make_model("tiny", model, progress=False)
        questions = make_questions(model, QUESTIONS, DEADLINE_SECONDS)
        for group in shared([FAULTS[name] for name in options.faults]):
            for result in run_group(group, model, questions, options.trials):
                results.append(result)
                document["trials"].append(result.document())
                for path in options.json:
                    path.write_text(json.dumps(document, indent=1))
    print(table([document]))
    return 1 if any(result.problems for result in results) else 0


def shared(faults: Sequence[Fault]) -> list[list[Fault]]:
    """Put together the faults that can happen to one service, one after the other."""
    groups: list[list[Fault]] = []
    for fault in faults:
        alike = [group for group in groups if group[0].start == fault.start and group[0].config == fault.config]
        if alike:
            alike[0].append(fault)
        else:
            groups.append([fault])
    return groups


def run_group(faults: Sequence[Fault], model: Path, questions: list[Question], trials: int) -> Iterator[Result]:
    """Let each fault happen `trials` times, to one service for as long as that survives it."""
    missing = faults[0].unavailable()
    if missing is not None:
        print(f"{', '.join(fault.name for fault in faults)}: skipped: {missing}", flush=True)
        return
    todo = [fault for fault in faults for _ in range(trials)]
    while todo:
        with todo[0].start(model, todo[0].config) as service:
            intact = True
            while todo and intact:
                fault = todo.pop(0)
                result = asyncio.run(run_trial(fault, Scene(service, model), questions))
                _say(result)
                if result.problems:
                    print(service.log[-4000:], file=sys.stderr)
                yield result
                intact = fault.after != "ended" and not result.problems


def _say(result: Result) -> None:
    detected, recovered = (
        "-" if seconds is None else f"{seconds:.3f} s" for seconds in (result.detected, result.recovered)
    )
    counts = ", ".join(f"{count} {name}" for name, count in result.counts.items() if count)
    clock = time.strftime("%H:%M:%S")
    print(f"{clock} {result.fault}: detected {detected}, recovered {recovered}; {counts} {result.codes}", flush=True)
    for line in [*result.notes, *(f"PROBLEM: {problem}" for problem in result.problems)]:
        print(f"    {line}", flush=True)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tests/chaos/run.py", description=__doc__)
    parser.add_argument("--faults", type=_names, default=list(FAULTS), metavar="A,B", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--trials", type=int, default=3, metavar="N", help="of each fault (default: 3)")
    parser.add_argument("--json", type=Path, action="append", default=[], metavar="FILE", help="write results there")
    parser.add_argument("--markdown", action="store_true", help="print the table of FILE, and run nothing")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(FAULTS)}, got {', '.join(unknown)}")
    return names
