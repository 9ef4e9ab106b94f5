"""Keys from files, and whom the clients trust over https."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from moe_forward.client import TransportFailed, read_api_key


@pytest.mark.parametrize(
    "text",
    ["k-0123456789abcdef", "alice:k-0123456789abcdef\nbob:other", "\ufeff# mine\n\n  k-0123456789abcdef \r\n"],
)
def test_the_first_key_of_a_file_is_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    assert read_api_key(tmp_path / "key") == "k-0123456789abcdef"


def test_a_file_without_a_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("# nothing\n")
    with pytest.raises(ValueError, match="key has no API key: expected a line"):
        read_api_key(tmp_path / "key")


def test_a_file_that_cannot_be_read_is_named_without_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the API key of .*absent: No such file"):
        read_api_key(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xffsecret")
    with pytest.raises(ValueError, match=r"cannot read the API key of .*binary: it is not UTF-8") as caught:
        read_api_key(tmp_path / "binary")
    assert "secret" not in str(caught.value)


def test_the_key_is_sent_with_every_call_and_the_admin_token_in_its_place(run: Any, script: Any) -> None:
    answers = script(httpx.Response(200, content=b"{}"))
    run(answers, lambda client: client.ranks(), api_key="k-1")
    run(answers, lambda client: client.drain("t-1"), api_key="k-1")
    assert [request.headers["authorization"] for request in answers.requests] == ["Bearer k-1", "Bearer t-1"]


class Ranks(BaseHTTPRequestHandler):
    """Answers every GET with an empty list of ranks."""

    def do_GET(self) -> None:
        body = json.dumps({"ranks": []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def url(authority: trustme.CA) -> Iterator[str]:
    """An https server that wants a certificate of the same authority from its clients."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranks)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # refused handshakes are what is tested
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> tuple[Path, Path]:
    """Whom to trust, and a client's own certificate with its key."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("a-client").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "own.pem"))
    return tmp_path / "ca.pem", tmp_path / "own.pem"


def ranks(client: Any) -> Any:
    return client.ranks()


def test_a_client_trusts_a_file_and_shows_its_own(run: Any, url: str, files: tuple[Path, Path]) -> None:
    trusted, own = files
    assert run(url, ranks, verify=str(trusted), cert=own) == {"ranks": []}
    assert run(url, ranks, verify=trusted, cert=(own, own)) == {"ranks": []}
    assert run(url, ranks, verify=ssl.create_default_context(cafile=trusted), cert=own) == {"ranks": []}
    assert run(url, ranks, verify=False, cert=own) == {"ranks": []}


def test_a_client_without_a_certificate_or_trust_gets_nothing(run: Any, url: str, files: tuple[Path, Path]) -> None:
    trusted, own = files
    for options in ({"verify": trusted}, {"cert": own}, {}):
        with pytest.raises(TransportFailed):
            run(url, ranks, retries=0, **options)


@pytest.mark.parametrize("name", ["absent.pem", "empty.pem"])
def test_files_that_hold_nothing_of_use_are_named(run: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.pem").write_text("nothing\n")
    with pytest.raises(ValueError, match=f"verify: .*{name}"):
        run("https://127.0.0.1:1", ranks, verify=tmp_path / name)
    with pytest.raises(ValueError, match=f"cert: .*{name}"):
        run("https://127.0.0.1:1", ranks, cert=tmp_path / name)
