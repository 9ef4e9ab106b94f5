"""Joining a Ray that runs already: what keeps the service from it, said before Ray would wait for ever."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from moe_forward import cluster
from moe_forward.cluster import joined_ray, own_ray
from moe_forward.errors import StartError


def test_an_address_where_nobody_listens_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(StartError, match=f"ray_address 127.0.0.1:{port}: no Ray cluster answers there"):
        joined_ray(f"127.0.0.1:{port}", False).__enter__()


def test_what_ray_says_is_said_with_what_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**given: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(StartError, match=r"auto: cannot join .*: Could not find any running Ray instance\. \(.*TOKEN"):
        joined_ray("auto", False).__enter__()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("print('let in')", "lets everybody in"),
        ("raise SystemExit('another error')", "cannot find out whether Ray .* another error"),
        ("import time; time.sleep(60)", "does not answer"),
    ],
)
def test_a_cluster_that_lets_everybody_in_or_does_not_say_is_refused(
    monkeypatch: pytest.MonkeyPatch, answer: str, message: str
) -> None:
    monkeypatch.setattr(cluster, "_ASK_WITHOUT_TOKEN", answer)
    monkeypatch.setattr(cluster, "REACH_SECONDS", 0.5)
    with pytest.raises(StartError, match=message):
        cluster._see_that_a_token_is_asked_for("127.0.0.1:1")


def test_a_cluster_that_refuses_who_has_no_token_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = "import os; assert os.environ['RAY_AUTH_MODE'] == 'disabled'; assert 'RAY_AUTH_TOKEN' not in os.environ; "
    monkeypatch.setattr(cluster, "_ASK_WITHOUT_TOKEN", ask + "print('refused')")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    cluster._see_that_a_token_is_asked_for("127.0.0.1:1")


def test_a_node_that_is_not_this_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.7")
    with pytest.raises(StartError, match=r"node 192\.0\.2\.7, which is not this host"):
        cluster._see_that_the_node_is_here("auto")


def test_processes_started_with_sigterm_blocked_outlive_it_and_this_one_does_not_block_it() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    with cluster._sigterm_blocked():
        child = subprocess.Popen([sys.executable, "-c", "input(); print('alive')"], stdin=-1, stdout=-1, text=True)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before
    child.send_signal(signal.SIGTERM)
    assert child.communicate("\n", timeout=60)[0] == "alive\n"


def start_another_ray(session: Path, **given: object) -> SimpleNamespace:
    """Do what ray.init does to this process; another thread takes SIGTERM meanwhile, which calls the handler here."""
    session.mkdir(parents=True)
    (session.parent / "session_latest").unlink(missing_ok=True)
    (session.parent / "session_latest").symlink_to(session)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    handler = signal.getsignal(signal.SIGTERM)
    assert callable(handler)
    handler(signal.SIGTERM, None)
    return SimpleNamespace(address_info={"session_dir": str(session)})


@pytest.fixture
def ours() -> Iterator[None]:
    """A handler of SIGTERM as the command line has it."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    yield
    assert signal.signal(signal.SIGTERM, before) is stop


@pytest.mark.usefixtures("ours")
def test_sigterm_while_our_ray_starts_ends_it_and_removes_what_it_wrote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session, other, stopped = tmp_path / "session_1", tmp_path / "session_2", []
    monkeypatch.setattr(ray, "init", partial(start_another_ray, session))
    monkeypatch.setattr(cluster, "_stop_own_ray", lambda: stopped.append(session.exists()))
    other.mkdir()
    with pytest.raises(SystemExit, match="143"), own_ray(2, "cpu"):
        pytest.fail("the block was entered")
    assert stopped == [True], "Ray was stopped, and its folder removed after that"
    assert list(tmp_path.iterdir()) == [other]


def test_the_latest_session_stays_when_it_is_another_services(tmp_path: Path) -> None:
    session, other = tmp_path / "session_1", tmp_path / "session_2"
    session.mkdir()
    other.mkdir()
    (tmp_path / "session_latest").symlink_to(other)
    cluster._remove_session(session)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["session_2", "session_latest"]


@pytest.mark.usefixtures("ours")
def test_sigterm_while_a_cluster_is_joined_ends_the_service_and_nothing_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = tmp_path / "session_1"
    monkeypatch.setattr(ray, "init", partial(start_another_ray, session))
    monkeypatch.setattr(cluster, "_see_that_the_node_is_here", lambda address: None)
    with pytest.raises(SystemExit, match="143"), joined_ray("auto", True):
        pytest.fail("the block was entered")
    assert session.exists()


def test_every_process_below_one_is_found() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "1\n"
    found = cluster._descendants(child.pid)
    assert len(found) == 1
    signal.pidfd_send_signal(found[0], signal.SIGKILL)
    os.close(found[0])
    child.communicate("", timeout=60)
