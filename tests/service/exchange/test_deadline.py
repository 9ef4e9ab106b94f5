"""A process that waits too long ends with a sentence, also where nothing of Python can run any more."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe_forward.exchange import deadline

FAR_SECONDS = 60.0  # a guard against tests that never end, not a measurement


def run(program: str) -> subprocess.CompletedProcess[str]:
    code = "import ctypes, time\nimport deadline as module\n" + textwrap.dedent(program)
    # The file alone: with the package around it, every program would import torch.
    environment = {**os.environ, "PYTHONPATH": str(Path(deadline.__file__).parent)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=FAR_SECONDS, env=environment, check=False)


def test_a_block_that_takes_too_long_ends_the_process_with_a_sentence() -> None:
    ended = run(
        """
        with module.deadline(0.3, "joining the group"):
            time.sleep(600)
        """
    )
    assert ended.returncode == deadline.EXIT_CODE != 0
    assert "moe-forward: joining the group took longer than 0.3 s" in ended.stderr
    assert "look for the first error of the other ranks" in ended.stderr
    assert "time.sleep" not in ended.stdout


def test_a_call_that_never_lets_python_run_again_is_ended_too() -> None:
    """DeepEP's calls hold the GIL, as `ctypes.PyDLL`'s do."""
    ended = run(
        """
        module.BACKSTOP_SECONDS = 0.3
        with module.deadline(0.1, "joining the group"):
            ctypes.PyDLL(None).sleep(600)
        """
    )
    assert ended.returncode != 0
    assert "Timeout" in ended.stderr
    assert "most recent call first" in ended.stderr


@pytest.mark.parametrize("ending", ["pass", "raise ValueError('broken')"])
def test_a_block_that_ends_in_time_leaves_nothing_behind(ending: str) -> None:
    ended = run(
        f"""
        module.BACKSTOP_SECONDS = 0.1
        try:
            with module.deadline(0.2, "joining the group"):
                {ending}
        except ValueError as error:
            print("raised", error)
        time.sleep(0.6)
        print("still here")
        """
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("still here\n")
    assert ("raised broken" in ended.stdout) == ("ValueError" in ending)
    assert ended.stderr == ""
