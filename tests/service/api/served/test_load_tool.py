"""`moe-forward bench` against the real front end on a real socket, plain and with TLS and keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from moe_forward.api import TlsFiles
from moe_forward.api.tls import load
from moe_forward.bench.run import bench
from moe_forward.errors import ErrorCode

QUICK: dict[str, Any] = {"warmup_seconds": 0.0, "self_check": False, "dtype": "f16"}


def test_every_kind_of_forward_is_answered(front: Any, kit: Any, serve: Callable[..., Any]) -> None:
    served = serve(front)
    for options in (
        {"mix": "1:1,300:1", "layers": "1,3", "layer_order": "random"},  # replies of one chunk and of several
        {"tokens": [3], "routing": "topk", "shared_experts": False},
        {"tokens": [3], "routing": "logits", "rate": [400.0]},
        {"tokens": [3], "dtype": "f32"},
    ):
        (row,) = bench(served.url, **(QUICK | {"requests": 20} | options)).rows
        assert (row.requests, row.errors, row.refusals) == (20, {}, {})
    kit.wait(lambda: front.app.state.availability.inflight == 0)
    front.check_idle()
    assert {request.layer for request in front.link.requests[:20]} == {1, 3}
    assert {request.shared_experts for request in front.link.requests[20:40]} == {False}


def test_refusals_of_the_service_have_their_codes(front: Any, serve: Callable[..., Any]) -> None:
    served = serve(front)
    front.link.refusal = (ErrorCode.QUEUE_FULL, "the queue is full", None)
    (row,) = bench(served.url, tokens=[2], rate=[300.0], requests=10, **QUICK).rows
    assert (row.requests, row.refusals, row.errors) == (0, {"queue_full": 10}, {})
    front.link.refusal = (ErrorCode.NON_FINITE, "hidden_states: not finite", None)
    (row,) = bench(served.url, tokens=[2], rate=[300.0], requests=10, **QUICK).rows
    assert (row.refusals, row.errors) == ({}, {"non_finite": 10})


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")
    return authority


def test_keys_and_certificates_are_used(
    make_front: Any, serve: Callable[..., Any], tmp_path: Path, authority: trustme.CA
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:k-0123456789abcdef\n")
    keys.chmod(0o600)
    served = serve(make_front(api_keys_file=keys), tls=load(TlsFiles(tmp_path / "own.pem", tmp_path / "own.pem")))
    who = {"api_key_file": keys, "ca_file": tmp_path / "ca.pem"}
    (row,) = bench(served.url, tokens=[300], requests=12, **who, **QUICK).rows
    assert (row.requests, row.errors, row.refusals) == (12, {}, {})
