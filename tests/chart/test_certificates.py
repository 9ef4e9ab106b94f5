"""What probes and test pods make of certificates, run here against a TLS server that asks for one, too."""

from __future__ import annotations

import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme

from .charts import CHART


class Ready(BaseHTTPRequestHandler):
    """Is ready, except below /broken."""

    def do_GET(self) -> None:
        self.send_response(503 if self.path.startswith("/broken") else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def folder(where: Path, authority: trustme.CA) -> Path:
    """A kubernetes.io/tls Secret as it is mounted."""
    where.mkdir()
    issued = authority.issue_cert("moe-forward.example.com")
    (where / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(where / "tls.key")
    authority.cert_pem.write_to_path(where / "ca.crt")
    return where


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    return folder(tmp_path / "tls", trustme.CA())


@pytest.fixture
def url(mounted: Path) -> Iterator[str]:
    """A server with the mounted certificate that lets in only whom ca.crt's authority knows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(mounted / "tls.crt", mounted / "tls.key")
    context.load_verify_locations(mounted / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a refused handshake
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    text = (CHART / "files" / script).read_text()
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_a_probe_shows_the_pods_own_certificate(url: str, mounted: Path) -> None:
    done = run("probe.py", f"{url}/v2/health/ready", str(mounted))
    assert done.returncode == 0, done.stderr
    assert run("probe.py", f"{url}/broken", str(mounted)).returncode != 0


def test_helm_test_shows_it_too(url: str, mounted: Path) -> None:
    done = run("test.py", url, "--tls", str(mounted))
    assert done.returncode == 0, done.stderr
    assert run("test.py", url).returncode != 0


def test_a_server_with_another_certificate_is_not_believed(url: str, tmp_path: Path) -> None:
    other = folder(tmp_path / "other", trustme.CA())
    done = run("probe.py", f"{url}/v2/health/ready", str(other))
    assert done.returncode != 0
    assert "CERTIFICATE_VERIFY_FAILED" in done.stderr
