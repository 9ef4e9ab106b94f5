"""Faults under load with a ledger: `python tests/chaos/run.py [--faults A,B] [--trials N] [--json FILE]`.

A first argument of overload, soak, connections or starts runs that program instead; `--help` behind it says how.
"""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path
from types import FrameType

PROGRAMS = ("overload", "soak", "connections", "starts")


def main() -> int:
    """Run the program that the command line names."""
    sys.path[0] = str(Path(__file__).parents[2])  # these programs share the helpers of tests/service/whole
    signal.signal(signal.SIGTERM, _stop)
    name = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in PROGRAMS else "program"
    arguments = sys.argv[1:] if name == "program" else sys.argv[2:]
    return int(importlib.import_module(f"tests.chaos.{name}").main(arguments))


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # and so end what was started, and remove the networks that were made


if __name__ == "__main__":
    sys.exit(main())
