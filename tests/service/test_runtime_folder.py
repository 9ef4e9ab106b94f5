"""What Ray will read from its environment, in a process of its own for each case: Ray must not be imported before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, sys
from moe_forward.runtime_folder import runtime_folder
joins, allowed = (word == "True" for word in sys.argv[1:])
with runtime_folder(joins, allowed) as folder:
    shown = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    token = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    print(json.dumps({"ray": shown, "ours": token.startswith(str(folder)), "mode": folder.stat().st_mode & 0o777}))
"""
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def run(tmp_path: Path, joins: bool, allowed: bool, **given: str) -> dict[str, object]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(joins), str(allowed)],
        env={**kept, "HOME": str(tmp_path), "TMPDIR": str(tmp_path), **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(tmp_path.glob("moe-forward-*")) == []
    found: dict[str, object] = json.loads(done.stdout)
    assert found["mode"] == 0o700
    return found


def test_a_ray_of_our_own_has_a_token_of_its_own_and_stays_on_loopback(tmp_path: Path) -> None:
    found = run(tmp_path, joins=False, allowed=False, RAY_AUTH_TOKEN="somebody else's")
    ray = found["ray"]
    assert isinstance(ray, dict)
    assert found["ours"]
    assert (ray["RAY_AUTH_MODE"], ray[LOOPBACK]) == ("token", "0")
    assert "RAY_AUTH_TOKEN" not in ray


@pytest.mark.parametrize(
    ("allowed", "given", "mode"),
    [
        (False, {}, "token"),
        (True, {}, "disabled"),
        (False, {"RAY_AUTH_TOKEN": "t"}, "token"),
        (True, {"RAY_AUTH_TOKEN_PATH": "/t"}, "disabled"),
        (False, {"RAY_AUTH_MODE": "disabled"}, "disabled"),
        (True, {"RAY_AUTH_MODE": "token"}, "token"),
    ],
)
def test_a_ray_that_runs_keeps_its_token_and_its_network(
    tmp_path: Path, allowed: bool, given: dict[str, str], mode: str
) -> None:
    found = run(tmp_path, joins=True, allowed=allowed, **given)
    assert found["ray"] == {**given, "RAY_AUTH_MODE": mode}
    assert not found["ours"]
