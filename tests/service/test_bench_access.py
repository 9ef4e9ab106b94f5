"""`moe-forward bench` against a service that asks for a key."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from moe_forward.bench import bench
from moe_forward.client import RequestRefused
from moe_forward.main import main


def test_the_first_key_of_the_file_is_sent(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# mine\nalice:k-0123456789abcdef\n")
    sent: list[str | None] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers.get("authorization"))
        return httpx.Response(401, json={"error": "no", "code": "unauthorized", "request_id": "r"})

    for options in ({"api_key_file": tmp_path / "keys"}, {}):
        with pytest.raises(RequestRefused):
            bench("http://moe.test", transport=httpx.MockTransport(refuse), **options)
    assert sent == ["Bearer k-0123456789abcdef", None]


def test_files_that_cannot_be_used_are_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("")
    empty = str(tmp_path / "empty")
    for flag, message in (("--api-key-file", "has no API key"), ("--ca-file", "has no PEM certificates")):
        assert main(["bench", "https://127.0.0.1:1", flag, empty]) == 1
        assert message in capsys.readouterr().err
