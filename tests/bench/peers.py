"""Peers' GEMMs measured beside ours: their harness in processes of its own, one case at a time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer_process import ANSWER

if TYPE_CHECKING:
    from cases import Case  # which needs torch, and the plots need only `best`

PEERS = ("humming", "sgl_w4a8", "dg_fp8")
INT4_ROWS = ("humming", "sgl", "vllm")
FP8_ROWS = ("dg",)
COMPILERS = 8
"""Processes that compile DeepGEMM's kernels; each holds the weights of one case on the GPU."""
MOST_ERROR = 0.03
"""Relative error above which a peer's figure is not counted: it computed something else."""

_PRINT_ENVIRONMENT = f"import json, os; print('{ANSWER}' + json.dumps(dict(os.environ)))\n"


class PeerLost(RuntimeError):
    """A peer's process ended or did not answer in time."""


class Peer:
    """A running peer.

    name: as in the harness. folder: the harness. environment: as `prepare` found it. log: where its output goes.
    """

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._log = log.open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(Path(__file__).with_name("peer_process.py")), str(folder), name],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, request: dict[str, Any]) -> None:
        """Send a request; `answer` waits for what comes of it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerLost(f"{self.name}: its process ended; see {self._log.name}") from None

    def answer(self, seconds: float) -> dict[str, Any]:
        """Wait for the answer to the oldest request. Raises: PeerLost."""
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise PeerLost(f"{self.name}: no answer in {seconds:.0f} s; see {self._log.name}") from None
        if answer is None:
            raise PeerLost(f"{self.name}: its process ended; see {self._log.name}")
        return answer

    def close(self) -> None:
        """End the process and what it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a request may wait in the buffer for a reader that is gone
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines, self._log:
            for line in lines:
                if line.startswith(ANSWER):
                    self._answers.put(json.loads(line.removeprefix(ANSWER)))
                else:
                    self._log.write(line)
        self._answers.put(None)


class Peers:
    """All peers that are running. folder: the harness, with run.sh and bench_peers.py. log: of their output."""

    def __init__(self, folder: Path, names: Sequence[str], log: Path) -> None:
        self._folder, self._log = folder.resolve(), log
        self._environment = prepare(self._folder)
        self._running = {name: self._start(name) for name in names}
        self.lost: dict[str, str] = {}

    def warm(self, cases: Sequence[dict[str, Any]], seconds: float) -> None:
        """Compile what the cases need, several peers and processes at a time; nothing may be timed meanwhile."""
        helpers = [self._start("dg_fp8") for _ in range(min(COMPILERS, len(cases)) if "dg_fp8" in self._running else 0)]
        for index, helper in enumerate(helpers):
            helper.ask({"warm": list(cases[index :: len(helpers)])})
        if "humming" in self._running:
            self._ask("humming", {"warm": list(cases)}, seconds)
        for helper in helpers:
            try:
                helper.answer(seconds)
            except PeerLost as lost:
                print(f"warming: {lost}", flush=True)
            helper.close()

    def measure(self, case: dict[str, Any], seconds: float = 90) -> dict[str, dict[str, Any]]:
        """Time a case by every peer in turn.

        Returns: by variant of a peer, microseconds `gate_up`, `down` and `pair`, and `note`.
        """
        found: dict[str, dict[str, Any]] = {}
        for name in list(self._running):
            answer = self._ask(name, {"case": case}, seconds)
            found |= read_rows(answer)
            for place, error in answer.get("err", {}).items():
                print(f"  {name}: {place}: {error[:160]}", flush=True)
        return found

    def close(self) -> None:
        """End all of them."""
        for peer in self._running.values():
            peer.close()

    def _start(self, name: str) -> Peer:
        return Peer(name, self._folder, self._environment, self._log)

    def _ask(self, name: str, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        peer = self._running[name]
        try:
            peer.ask(request)
            return peer.answer(seconds)
        except PeerLost as lost:
            print(f"  LOST {lost}", flush=True)
            self.lost[name] = str(lost)
            peer.close()
            del self._running[name]
            return {}


def prepare(folder: Path) -> dict[str, str]:
    """Let the harness's run.sh unpack the peers, and return the environment that it would start its benchmark in."""
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        for file in folder.iterdir():
            if file.name != "bench_peers.py":
                (stage / file.name).symlink_to(file)
        (stage / "bench_peers.py").write_text(_PRINT_ENVIRONMENT)
        done = subprocess.run(["bash", str(stage / "run.sh")], capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or not answers:
        raise RuntimeError(f"{folder}/run.sh: exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    environment: dict[str, str] = json.loads(answers[-1].removeprefix(ANSWER))
    return environment


def harness_case(case: Case, counts: Sequence[int], copies: int) -> dict[str, Any]:
    """Describe a case as the harness does. Its names starting with C also try DeepGEMM's contiguous layout."""
    large = case.rows >= 64 * case.experts
    return {
        "name": f"{'C' if large else 'A'} {case.name}",
        "B": case.rows,
        "topk": 1,
        "E": case.experts,
        "rows": list(counts),
        "gu": case.gate_up,
        "dn": case.down,
        "copies": copies,
    }


def read_rows(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Turn a peer process's answer into microseconds by variant; variants that lack a GEMM or are wrong are left out.

    answer: rows, milliseconds by variant and GEMM; check, relative errors by "variant case gemm".
    """
    wrong = {place.split()[0] for place, error in answer.get("check", {}).items() if not _error(error) <= MOST_ERROR}
    for variant in wrong:
        print(f"  {variant}: relative error {answer['check']}; its figures are not counted", flush=True)
    return {
        variant: {
            "gate_up": 1e3 * gemms["gu"]["ms"],
            "down": 1e3 * gemms["dn"]["ms"],
            "pair": 1e3 * (gemms["gu"]["ms"] + gemms["dn"]["ms"]),
            "note": "; ".join(dict.fromkeys(f"{gemms[g]['mode']} {gemms[g].get('note', '')}" for g in ("gu", "dn"))),
        }
        for variant, gemms in answer.get("rows", {}).items()
        if {"gu", "dn"} <= gemms.keys() and variant not in wrong and variant.removesuffix("*best") not in wrong
    }


def _error(text: str) -> float:
    return float(text.split()[0])


def best(found: Mapping[str, Mapping[str, Any]], rows: Sequence[str]) -> float | None:
    """The fewest microseconds of a pair among the variants whose names start with one of `rows`."""
    pairs = [timed["pair"] for variant, timed in found.items() if variant.startswith(tuple(rows))]
    return min(pairs) if pairs else None
