"""What a load test shows while it runs: time, rate, median latency and failures, on a terminal only."""

from __future__ import annotations

import time

from tqdm import tqdm

from moe_forward.bench.report import NS_PER_MS
from moe_forward.bench.tally import Progress

SHOWN_SECONDS = 0.5


class Bar:
    """A line on stderr. seconds: that the whole test takes if nothing is late."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._name = ""
        self._bar = tqdm(total=seconds, unit="s", disable=None, bar_format="{percentage:3.0f}%|{bar:20}| {desc}")
        self._recent = Progress()
        self._shown_seconds = self._seen_seconds = time.monotonic()

    def run(self, name: str) -> None:
        """Begin to show a run."""
        self._name = name
        self._bar.set_description_str(name)

    def tell(self, progress: Progress) -> None:
        """Take in what one process did."""
        now = time.monotonic()
        self._bar.update(min(now - self._seen_seconds, self._seconds - self._bar.n))
        self._seen_seconds = now
        self._recent.merge(progress)
        since = now - self._shown_seconds
        if since < SHOWN_SECONDS:
            return
        latency = self._recent.latency
        median = f"{latency.quantile(0.5) / NS_PER_MS:.2f} ms" if latency.count else "-"
        rate = f"{latency.count / since:.0f} req/s"
        self._bar.set_description_str(f"{self._name}: {rate}, p50 {median}, {self._recent.failed} failed")
        self._recent, self._shown_seconds = Progress(), now

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.close()
