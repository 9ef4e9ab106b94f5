"""A service with keys, TLS and client certificates, as an operator runs it: who gets in, and what its log keeps."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import trustme

from moe_forward import Client
from moe_forward.client import RequestRefused, TransportFailed

from .processes import listening
from .running import Service, run_serve

pytestmark = pytest.mark.service

KEY = "0123456789abcdef-alice"
WRONG = "fedcba9876543210-nobody"
ADMIN = "an-admin-token-of-these-tests"
VALUE = 0.8414709848078965


class Secrets:
    """The files of a service that asks for keys and certificates, and of its clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        authority = trustme.CA()
        own = authority.issue_cert("127.0.0.1")
        own.private_key_pem.write_to_path(str(folder / "tls.key"))
        (folder / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in own.cert_chain_pems))
        authority.cert_pem.write_to_path(str(folder / "ca.crt"))
        authority.issue_cert("a-client").private_key_and_cert_chain_pem.write_to_path(str(folder / "client.pem"))
        (folder / "keys").write_text(f"alice:{KEY}\n")
        (folder / "admin").write_text(ADMIN)

    def config(self) -> dict[str, Any]:
        names = {
            "api_keys_file": "keys",
            "admin_token_file": "admin",
            "tls_certificate_file": "tls.crt",
            "tls_key_file": "tls.key",
            "tls_client_ca_file": "ca.crt",
        }
        return {key: str(self.folder / name) for key, name in names.items()}

    def client(self, url: str, **options: Any) -> Client:
        options = {"api_key": KEY, "cert": self.folder / "client.pem", "retries": 0, **options}
        return Client(url, verify=self.folder / "ca.crt", **options)

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.folder / "ca.crt")
        context.load_cert_chain(self.folder / "client.pem")
        return context


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    return Secrets(tmp_path_factory.mktemp("secrets"))


@pytest.fixture(scope="module")
def running(tiny: Path, secrets: Secrets) -> Iterator[Service]:
    document = {"slab_bytes": 16 << 20, "log_level": "debug", "log_format": "json", **secrets.config()}
    service = Service(tiny, 1, document)
    try:
        service.wait_for(lambda: "(metrics at " in service.greeting or service.process.poll() is not None)
        found = re.search(r"at (https://\S+) \(metrics at (http://\S+)\)", service.greeting)
        assert found is not None, service.log
        service.url, service.metrics_url = found.groups()
        with secrets.client(service.url) as client:
            service.wait_for(client.ready)
        yield service
    finally:
        service.close()


def test_a_client_with_certificate_and_key_is_served_and_nobody_else(running: Service, secrets: Secrets) -> None:
    hidden = torch.full((3, 256), VALUE)
    with secrets.client(running.url) as client:
        assert client.forward(hidden, layer=1).shape == (3, 256)
        assert client.ready()
    with secrets.client(running.url, api_key=WRONG) as client, pytest.raises(RequestRefused) as refused:
        client.forward(hidden, layer=1)
    assert (refused.value.status, refused.value.code) == (401, "unauthorized")
    with secrets.client(running.url, api_key=None) as client:
        assert client.ready(), "health needs no key"
        with pytest.raises(RequestRefused):
            client.placement()
        with pytest.raises(RequestRefused):
            client.drain(WRONG)
    with secrets.client(running.url, cert=None) as client, pytest.raises(TransportFailed):
        client.placement()


def test_the_log_keeps_no_key_no_token_and_no_tensor_value(running: Service, secrets: Secrets) -> None:
    body = {"hidden_states": [[VALUE] * 256], "layer": 1}
    wrong = {"hidden_states": [[f"{VALUE}"] * 256], "layer": 1}
    with httpx.Client(base_url=running.url, verify=secrets.context()) as http:
        for message, status in ((body, 200), (wrong, 400)):
            reply = http.post("/v1/moe/forward", json=message, headers={"X-API-Key": KEY})
            assert reply.status_code == status
        for headers in ({"X-API-Key": WRONG}, {"Authorization": f"Bearer {WRONG}"}, {"Authorization": WRONG}):
            assert http.post("/v1/moe/forward", json=body, headers=headers).status_code == 401
        assert http.post("/v1/drain", headers={"Authorization": f"Bearer {WRONG}"}).status_code == 401
        assert http.get(f"/v1/{WRONG}?key={WRONG}", headers={"X-API-Key": KEY}).status_code == 404
    log = running.log + running.greeting
    assert '"caller": "alice"' in log
    assert '"code": "unauthorized"' in log
    for secret in (KEY, WRONG, ADMIN, str(VALUE), "0.84147"):
        assert secret not in log
    for key_file in ("tls.key", "client.pem"):
        inside = (secrets.folder / key_file).read_text().splitlines()[1]
        assert inside not in log


def test_keys_and_metrics_are_where_they_should_be(running: Service) -> None:
    assert 'moe_forward_rejected_total{reason="auth"}' in running.metrics()
    assert all(address.is_loopback for pid in running.pids() for address, _ in listening(pid))


def test_a_port_for_everybody_without_keys_is_not_opened(tiny: Path, tmp_path: Path) -> None:
    done = run_serve(tmp_path, ["--model", str(tiny), "--ranks", "1", "--host", "0.0.0.0"])
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "is not loopback" in line
    assert "set api_keys_file" in line
