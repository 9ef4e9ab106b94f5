"""TLS through a real uvicorn: who is trusted, what is refused, and certificates that change while it runs."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from moe_forward.api import LiveContext, TlsFiles
from moe_forward.api.tls import load
from moe_forward.errors import ConfigError

LIVE = "/v2/health/live"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Folder:
    """Files of a server: certificate and key of one authority, and whom it lets sign clients' certificates."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = Clock()
        self.authority = trustme.CA()
        self.clients = trustme.CA()
        self.write_server(self.authority)
        self.write_clients(self.clients)
        self.files = TlsFiles(path / "tls.crt", path / "tls.key")
        self.mutual = TlsFiles(path / "tls.crt", path / "tls.key", path / "clients.crt")

    def write_server(self, authority: trustme.CA, *, key: bool = True, certificate: bool = True) -> None:
        issued = authority.issue_cert("127.0.0.1")
        if certificate:
            (self.path / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        if key:
            (self.path / "tls.key").write_bytes(issued.private_key_pem.bytes())

    def write_clients(self, authority: trustme.CA) -> None:
        (self.path / "clients.crt").write_bytes(authority.cert_pem.bytes())

    def context(self, mutual: bool = False) -> LiveContext:
        return LiveContext(self.mutual if mutual else self.files, self.clock)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def trusting(authority: trustme.CA, own: trustme.LeafCert | None = None) -> ssl.SSLContext:
    """A client's context."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if own is not None:
        own.configure_cert(context)
    return context


def live(url: str, context: ssl.SSLContext) -> int:
    """Status of a call on a new connection."""
    return httpx.get(url + LIVE, verify=context).status_code


def test_forwards_travel_over_tls(front: Any, kit: Any, serve: Callable[..., Any], folder: Folder) -> None:
    served = serve(front, tls=folder.context())
    states = kit.states(300)  # a reply of more than one chunk, and a body of more than one record
    with httpx.Client(base_url=served.url, verify=trusting(folder.authority)) as client:
        for _ in range(2):
            body = kit.body(hidden_states=states)
            reply = client.post("/v1/moe/forward", params={"layer": 1}, content=body, headers=kit.headers)
            assert (kit.output(reply.content) == states * 2).all()


def test_plain_http_and_unknown_authorities_get_nothing(front: Any, serve: Callable[..., Any], folder: Folder) -> None:
    served = serve(front, tls=folder.context())
    with served.connect() as connection:
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: front\r\n\r\n")
        answer = b""
        while received := connection.recv(4096):
            answer += received
    assert b"HTTP" not in answer
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        live(served.url, trusting(trustme.CA()))
    assert live(served.url, trusting(folder.authority)) == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_spoken(
    front: Any, serve: Callable[..., Any], folder: Folder, version: ssl.TLSVersion
) -> None:
    context = trusting(folder.authority)
    context.minimum_version = context.maximum_version = version
    assert live(serve(front, tls=folder.context()).url, context) == 200


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_1_1_is_not(front: Any, serve: Callable[..., Any], folder: Folder) -> None:
    context = trusting(folder.authority)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(httpx.ConnectError):
        live(serve(front, tls=folder.context()).url, context)


def test_with_a_client_authority_only_its_clients_are_served(
    front: Any, serve: Callable[..., Any], folder: Folder
) -> None:
    served = serve(front, tls=folder.context(mutual=True))
    assert live(served.url, trusting(folder.authority, folder.clients.issue_cert("a-client"))) == 200
    for own in (None, trustme.CA().issue_cert("a-stranger")):
        with pytest.raises(httpx.TransportError):
            live(served.url, trusting(folder.authority, own))


def test_a_renewed_certificate_serves_new_connections_and_keeps_old_ones(
    front: Any, serve: Callable[..., Any], folder: Folder
) -> None:
    served = serve(front, tls=folder.context())
    renewed = trustme.CA()
    with httpx.Client(base_url=served.url, verify=trusting(folder.authority)) as client:
        assert client.get(LIVE).status_code == 200
        folder.write_server(renewed)
        folder.clock.now += 1.0
        assert client.get(LIVE).status_code == 200
        assert live(served.url, trusting(renewed)) == 200
        assert client.get(LIVE).status_code == 200
    with pytest.raises(httpx.ConnectError):
        live(served.url, trusting(folder.authority))


def test_trust_in_a_client_authority_can_be_taken_back(front: Any, serve: Callable[..., Any], folder: Folder) -> None:
    served = serve(front, tls=folder.context(mutual=True))
    old, new = folder.clients.issue_cert("old"), trustme.CA()
    assert live(served.url, trusting(folder.authority, old)) == 200
    folder.write_clients(new)
    folder.clock.now += 1.0
    assert live(served.url, trusting(folder.authority, new.issue_cert("new"))) == 200
    with pytest.raises(httpx.TransportError):
        live(served.url, trusting(folder.authority, old))


def test_a_half_written_renewal_keeps_the_certificate_from_before(
    front: Any, serve: Callable[..., Any], folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(front, tls=folder.context())
    folder.write_server(folder.authority, key=False)  # a certificate without its key yet
    for _ in range(2):
        folder.clock.now += 1.0
        assert live(served.url, trusting(folder.authority)) == 200
    assert sum("is not the key of" in record.message for record in caplog.records) == 1
    (folder.path / "tls.crt").unlink()
    folder.clock.now += 1.0
    assert live(served.url, trusting(folder.authority)) == 200
    assert "No such file" in caplog.records[-1].message


def test_a_key_that_belongs_to_another_certificate_is_named(folder: Folder) -> None:
    folder.write_server(folder.authority, key=False)
    with pytest.raises(ConfigError, match=r"tls_key_file .*tls.key is not the key of .*tls.crt"):
        load(folder.files)


@pytest.mark.parametrize(
    ("name", "key"),
    [("tls.crt", "tls_certificate_file"), ("tls.key", "tls_key_file"), ("clients.crt", "tls_client_ca_file")],
)
def test_files_that_are_missing_or_no_pem_are_named(folder: Folder, name: str, key: str) -> None:
    (folder.path / name).write_bytes(os.urandom(100))
    with pytest.raises(ConfigError, match=f"{key} .*{name}: expected PEM with"):
        load(folder.mutual)
    (folder.path / name).unlink()
    with pytest.raises(ConfigError, match=f"{key} .*{name}: No such file"):
        LiveContext(folder.mutual)


def test_an_encrypted_key_is_refused_and_asks_nobody_for_a_password(folder: Folder) -> None:
    pem = (folder.path / "tls.key").read_bytes()
    private = serialization.load_pem_private_key(pem, None)
    encrypted = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"a password"),
    )
    (folder.path / "tls.key").write_bytes(encrypted)
    with pytest.raises(ConfigError, match=r"tls_key_file .* is encrypted"):
        load(folder.files)


def test_a_client_that_never_shakes_hands_blocks_nobody(front: Any, serve: Callable[..., Any], folder: Folder) -> None:
    served = serve(front, tls=folder.context())
    silent = [socket.create_connection(served.address) for _ in range(20)]
    assert live(served.url, trusting(folder.authority)) == 200
    for connection in silent:
        connection.close()
