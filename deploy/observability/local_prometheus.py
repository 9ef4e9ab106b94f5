"""A Prometheus of our own on loopback: started with this project's rules, asked over its HTTP interface, stopped."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

RULES = Path(__file__).parents[2] / "helm" / "moe-forward" / "rules"
RATE_INTERVAL = "5s"
"""`$__rate_interval` at a scrape a second."""

START_SECONDS = 30.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.1
HOW_TO_INSTALL = "no `prometheus` on PATH: apt-get install prometheus, or put a release of https://prometheus.io there"


@dataclass(frozen=True, slots=True)
class Series:
    """labels: without the name. points: (Unix seconds, value) of the values that are numbers, by time."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]


def fill_in(expression: str, variables: Mapping[str, str], rate_interval: str) -> str:
    """Replace Grafana's variables as Grafana does.

    variables: name -> regular expression that stands for the choice.
    Raises: ValueError for a variable that is left.
    """
    filled = expression.replace("$__rate_interval", rate_interval)
    for name, value in variables.items():
        filled = filled.replace(f'"${name}"', f'"{value}"')
    if "$" in filled:
        raise ValueError(f"a variable has no value: {filled}")
    return filled


class Prometheus:
    """A Prometheus that scrapes one target every second and evaluates the rules as often.

    binary: the program. folder: where it keeps its data. target: host:port. labels: of the target's series.
    Raises: RuntimeError with its log when it does not come up.
    """

    def __init__(self, binary: str, folder: Path, target: str, labels: Mapping[str, str]) -> None:
        self._log = folder / "prometheus.log"
        job = {"job_name": "moe-forward", "static_configs": [{"targets": [target], "labels": dict(labels)}]}
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path) for path in sorted(RULES.glob("*.yaml"))],
            "scrape_configs": [job],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    binary,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_ready()
        except BaseException:
            self.close()
            raise

    def query(self, expression: str, at: float) -> list[Series]:
        """Return what an expression was at a time in Unix seconds."""
        return self._ask("/api/v1/query", {"query": expression, "time": at})

    def query_range(self, expression: str, start: float, end: float, step_seconds: float) -> list[Series]:
        """Return what an expression was from start to end, in Unix seconds."""
        return self._ask("/api/v1/query_range", {"query": expression, "start": start, "end": end, "step": step_seconds})

    def wait_scraped(self) -> None:
        """Wait until the target was scraped twice, so that rates can be told from here on; it takes some seconds.

        Raises: RuntimeError when it is not scraped in time.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self.query("count_over_time(up[1m]) > 1 and up == 1", time.time()):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"nothing was scraped in {START_SECONDS:g} s:\n{self._log.read_text(errors='replace')}"
                )
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Stop it."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, path: str, parameters: Mapping[str, Any]) -> list[Series]:
        reply = httpx.get(self.url + path, params=dict(parameters), timeout=30.0)
        document = reply.json()
        if document["status"] != "success":
            raise ValueError(f"Prometheus refuses {parameters['query']}: {document['error']}")
        result = document["data"]["result"]
        if document["data"]["resultType"] == "scalar":
            return [Series({}, _numbers([result]))]
        series = [Series(_labels(item["metric"]), _numbers(item.get("values") or [item["value"]])) for item in result]
        return [item for item in series if item.points]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if httpx.get(f"{self.url}/-/ready", timeout=5.0).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet; the deadline and its exit are watched below
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus did not start:\n{self._log.read_text(errors='replace')}")
            time.sleep(POLL_SECONDS)


def find_prometheus() -> str | None:
    """Return the program, None where there is none."""
    return shutil.which("prometheus")


def _labels(metric: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metric.items() if key != "__name__"}


def _numbers(values: Sequence[tuple[float, str]]) -> tuple[tuple[float, float], ...]:
    points = ((float(at), float(value)) for at, value in values)
    return tuple((at, value) for at, value in points if not math.isnan(value))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
