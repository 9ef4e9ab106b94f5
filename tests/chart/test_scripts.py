"""The scripts that the chart runs in its pods, run here, with a Ray and a service that say how they were called."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from .charts import CHART

FILES = CHART / "files"
# As KubeRay makes it: an option a parameter, two spaces, a quoted word.
START = "ray start --head  --block  --dashboard-host=127.0.0.1  --resources='{\"a b\": 1}'  --num-cpus=3 "


@pytest.fixture
def pod(tmp_path: Path) -> Callable[[str, str | None], subprocess.CompletedProcess[str]]:
    """Runs a start script with tmp_path as its /tmp, and programs that print their arguments, one a line."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ray", "moe-forward"):
        (programs / name).write_text(f'#!/bin/sh\necho {name}\nprintf "<%s>\\n" "$@"\nexit "${{FAIL_{name[:3]}:-0}}"\n')
        (programs / name).chmod(0o755)
    (tmp_path / "ray" / "session").mkdir(parents=True)

    def run(script: str, command: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {"PATH": f"{programs}:{os.environ['PATH']}", "RAY_TMPDIR": str(tmp_path), **environment}
        if command is not None:
            given["KUBERAY_GEN_RAY_START_CMD"] = command
        text = (FILES / script).read_text()
        return subprocess.run(
            ["/bin/bash", "-c", text], env=given, capture_output=True, text=True, timeout=30, check=False
        )

    return run


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_the_head_starts_ray_in_the_background_and_becomes_the_service(pod: Run, tmp_path: Path) -> None:
    done = pod("start-head.sh", START)
    assert done.returncode == 0, done.stderr
    words = ["<start>", "<--head>", "<--dashboard-host=127.0.0.1>", '<--resources={"a b": 1}>', "<--num-cpus=3>"]
    served = ["<serve>", "<--config>", "</etc/moe-forward/config/config.json>"]
    assert done.stdout.splitlines() == ["ray", *words, "moe-forward", *served]
    assert not (tmp_path / "ray").exists()


def test_a_worker_stays_as_long_as_ray(pod: Run, tmp_path: Path) -> None:
    done = pod("start-worker.sh", START.replace("--head", "--address=head:6379"), FAIL_ray="7")
    assert done.returncode == 7
    assert "<--block>" in done.stdout
    assert not (tmp_path / "ray").exists()


@pytest.mark.parametrize("script", ["start-head.sh", "start-worker.sh"])
def test_without_kuberays_command_a_container_says_so(pod: Run, script: str) -> None:
    done = pod(script, None)
    assert done.returncode != 0
    assert "KUBERAY_GEN_RAY_START_CMD: KubeRay sets it" in done.stderr
    assert done.stdout == ""


def test_a_ray_that_does_not_start_ends_the_head(pod: Run) -> None:
    done = pod("start-head.sh", START, FAIL_ray="3")
    assert done.returncode == 3
    assert "moe-forward" not in done.stdout


def test_sigterm_reaches_the_service_itself(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ray").write_text("#!/bin/sh\n")
    (programs / "moe-forward").write_text(
        "#!/bin/sh\ntrap 'echo drained; exit 0' TERM\necho up\nwhile :; do sleep 0.05; done\n"
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RAY_TMPDIR": str(tmp_path),
        "KUBERAY_GEN_RAY_START_CMD": "ray",
    }
    command = ["/bin/bash", "-c", (FILES / "start-head.sh").read_text()]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as head:
        assert head.stdout is not None
        assert head.stdout.readline() == "up\n"
        head.send_signal(signal.SIGTERM)
        assert head.communicate(timeout=10)[0] == "drained\n"
        assert head.returncode == 0


@pytest.mark.parametrize(("joined", "status"), [([8, 8, 16], 0), ([8], 1)])
def test_the_head_waits_for_the_gpus_of_workers(tmp_path: Path, joined: list[int], status: int) -> None:
    (tmp_path / "ray.py").write_text(
        f"counts = iter({joined})\nlast = 0\ndef init(**given): assert given['address'] == 'auto'\n"
        "def cluster_resources():\n    global last\n    last = next(counts, last)\n    return {'GPU': float(last)}\n"
    )
    (tmp_path / "config.json").write_text(json.dumps({"ranks": 16, "start_timeout_seconds": 0.2 if status else 30}))
    script = (FILES / "wait_for_gpus.py").read_text().replace("POLL_SECONDS = 2", "POLL_SECONDS = 0.01")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "config.json")],
        env=environment, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "8 of 16 GPUs" in done.stdout
    assert ("expected 16 GPUs in the Ray cluster, 8 came" in done.stderr) is bool(status)


class Service(BaseHTTPRequestHandler):
    """Answers as the service does, with what the server's `answers` say."""

    server: Server

    def do_GET(self) -> None:
        content = {"model": "tiny", "hidden_size": 8, "layers": [3, 4]} if self.path == "/v1/placement" else {}
        self._reply(200 if self.server.ready or self.path != "/v2/health/ready" else 503, content)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.posted.append((self.path, body))
        self._reply(
            200, {"output": [[self.server.scale * channel for channel in row] for row in body["hidden_states"]]}
        )

    def _reply(self, status: int, content: object) -> None:
        if (
            self.server.key
            and self.path.startswith("/v1")
            and self.headers["Authorization"] != f"Bearer {self.server.key}"
        ):
            status, content = 401, {"error": "no key"}
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    ready = True
    key = ""
    scale = 2.0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Service)
        self.posted: list[tuple[str, object]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def helm_test(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = (FILES / "test.py").read_text()
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=30, check=False
    )


def test_a_forward_goes_through_the_first_layer_with_a_clients_key(server: Server, tmp_path: Path) -> None:
    server.key = "s3cret"
    keys = tmp_path / "keys"
    keys.write_text("# clients\n\nours:s3cret\ntheirs:other\n")
    done = helm_test(server.url, "--forward", "--api-keys", str(keys))
    assert done.returncode == 0, done.stderr
    ((path, body),) = server.posted
    assert path == "/v1/moe/forward?layer=3"
    assert isinstance(body, dict)
    assert [len(row) for row in body["hidden_states"]] == [8]
    assert "layer 3 of tiny answered" in done.stdout
    assert helm_test(server.url, "--forward").returncode != 0


@pytest.mark.parametrize(("ready", "scale"), [(False, 2.0), (True, 0.0), (True, float("nan"))])
def test_a_service_that_is_not_right_fails_the_test(server: Server, ready: bool, scale: float) -> None:
    server.ready, server.scale = ready, scale
    assert helm_test(server.url, "--forward").returncode != 0


def test_a_service_that_is_ready_passes_the_first_test(server: Server) -> None:
    assert helm_test(server.url).returncode == 0
    assert server.posted == []
