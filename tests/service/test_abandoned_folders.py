"""Runtime folders of services that were killed are removed by the next one; those of living services are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = """
import sys
from moe_forward.runtime_folder import runtime_folder
with runtime_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


class Holder:
    """A process with a runtime folder in `parent`, until it is killed or told to end."""

    def __init__(self, parent: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "TMPDIR": str(parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[list[Holder]]:
    made = [Holder(tmp_path), Holder(tmp_path)]
    yield made
    for holder in made:
        holder.kill()


def test_a_killed_services_folder_goes_with_the_next_start_and_a_living_ones_stays(
    tmp_path: Path, holders: list[Holder]
) -> None:
    killed, living = holders
    killed.kill()
    assert (killed.folder / "ray_token").exists()
    stranger = tmp_path / "moe-forward-stranger"  # without a lock: being made, or nothing of ours
    stranger.mkdir()
    last = Holder(tmp_path)
    assert not killed.folder.exists()
    assert living.folder.exists()
    assert last.folder.exists()
    last.end()
    assert not last.folder.exists()
    assert {path.name for path in tmp_path.iterdir()} == {living.folder.name, stranger.name}
