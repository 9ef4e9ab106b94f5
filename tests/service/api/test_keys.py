"""API keys: who is let in, what the file may look like, and that it can be replaced while the service runs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from moe_forward.api.keys import ApiKeys, parse_keys, presented
from moe_forward.errors import ConfigError
from moe_forward.logs import extra_fields

ALICE = "alice-0123456789abcdef"
BOB = "bob-0123456789abcdef!:#"
UNNAMED = "0123456789abcdef0123456789abcdef"
FORWARD = "/v1/moe/forward?layer=1"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# who may call\nalice:{ALICE}\n\n  bob:{BOB}  \r\n{UNNAMED}\n")
    return file


@pytest.fixture
def keyed(make_front: Callable[..., Any], path: Path) -> Any:
    return make_front(api_keys_file=path)


@pytest.fixture
async def asking(keyed: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(keyed.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        yield client


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"authorization": f"Bearer {ALICE}"}, "alice"),
        ({"authorization": f"bearer  {ALICE}"}, "alice"),
        ({"x-api-key": BOB}, "bob"),
        ({"x-api-key": UNNAMED}, "line 5"),
        ({"authorization": "Bearer a-token-of-the-gateway", "x-api-key": ALICE}, "alice"),
    ],
)
async def test_a_valid_key_is_let_in_and_its_name_logged(
    asking: httpx.AsyncClient,
    kit: Any,
    caplog: pytest.LogCaptureFixture,
    headers: dict[str, str],
    name: str,
) -> None:
    caplog.set_level(logging.INFO)
    body = kit.body(hidden_states=kit.states(2))
    reply = await asking.post(FORWARD, content=body, headers={**kit.headers, **headers})
    assert reply.status_code == 200
    (record,) = [record for record in caplog.records if record.message == "request"]
    assert extra_fields(record)["caller"] == name


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong-0123456789abcdef"},
        {"authorization": f"Basic {ALICE}"},
        {"authorization": ALICE},
        {"authorization": "Bearer"},
        {"authorization": "Bearer pässword-0123456789".encode()},
        {"x-api-key": ALICE[:-1]},
        {"x-api-key": ALICE + "0"},
        {"x-api-key": f"alice:{ALICE}"},
        {"x-api-key": ""},
    ],
)
async def test_without_a_valid_key_every_call_is_401_in_the_form_of_all_errors(
    asking: httpx.AsyncClient, keyed: Any, headers: dict[str, Any]
) -> None:
    calls = (FORWARD, "/v2", "/v1/placement", "/v1/ranks", "/v2/models/tiny/ready", "/nowhere", "/v2/health/live/")
    for path in calls:
        reply = await asking.post(path, content=b"x", headers=headers)
        assert reply.status_code == 401, path
        assert reply.headers["www-authenticate"] == "Bearer"
        assert set(reply.json()) == {"error", "code", "request_id"}
        assert reply.json()["code"] == "unauthorized"
        assert reply.json()["request_id"] == reply.headers["x-request-id"]
        assert ALICE not in reply.text
    assert keyed.metric("rejected_total", reason="auth") == len(calls)


async def test_a_refusal_comes_before_the_body_is_read(keyed: Any) -> None:
    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/moe/forward", "query_string": b"layer=1", "headers": []}
    await keyed.app(scope, receive, send)
    assert sent[0]["status"] == 401
    keyed.check_idle()


async def test_health_and_documentation_need_no_key_and_drain_has_its_own(asking: httpx.AsyncClient, kit: Any) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"):
        assert (await asking.get(path)).status_code == 200, path
    assert (await asking.post("/v1/drain", headers={"x-api-key": ALICE})).status_code == 401
    assert (await asking.post("/v1/drain", headers={"authorization": f"Bearer {kit.token}"})).status_code == 200


async def test_the_documentation_can_be_switched_off(make_front: Any, path: Path) -> None:
    for settings, status in (({}, 404), ({"api_keys_file": path}, 401)):
        front = make_front(docs=False, **settings)
        transport = httpx.ASGITransport(front.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            for where in ("/docs", "/openapi.json", "/docs/oauth2-redirect", "/redoc"):
                assert (await client.get(where)).status_code == status, where


async def test_openapi_says_which_calls_need_a_key(asking: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    document = (await asking.get("/openapi.json")).json()
    schemes = document["components"]["securitySchemes"]
    assert schemes["ApiKeyHeader"]["name"] == "X-API-Key"
    assert schemes["ApiKeyBearer"]["scheme"] == "bearer"
    either = [{"ApiKeyBearer": []}, {"ApiKeyHeader": []}]
    asked = {path: [op.get("security") for op in operations.values()] for path, operations in document["paths"].items()}
    assert asked.pop("/v2/health/live") == asked.pop("/v2/health/ready") == [None]
    assert asked.pop("/v1/drain") == [[{"HTTPBearer": []}]]
    assert len(asked) >= 8
    assert all(needs == [either] for needs in asked.values())
    anonymous = (await client.get("/openapi.json")).json()
    assert set(anonymous["components"]["securitySchemes"]) == {"HTTPBearer"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one key"),
        ("# nothing\n\n", "at least one key"),
        ("alice:short", "line 1: expected a key of at least 16 characters, got 5"),
        ("alice:", "line 1: expected a key of at least 16"),
        (f"the name:{ALICE}", "line 1: expected NAME:KEY"),
        (f":{ALICE}", "line 1: expected NAME:KEY"),
        ("\n" + ALICE + " " + UNNAMED, "line 2: expected a key of printable ASCII without spaces"),
        ("schlüssel" * 3, "line 1: expected a key of printable ASCII"),
        (f"alice:{ALICE}\nbob:{ALICE}", "line 2: the same key as that of alice"),
    ],
)
def test_a_bad_key_file_is_refused_by_line_and_shows_no_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_keys(text)
    assert ALICE not in str(caught.value)
    assert ALICE not in repr(caught.value.__cause__)


def test_one_name_may_have_two_keys() -> None:
    assert list(parse_keys(f"alice:{ALICE}\nalice:{UNNAMED}").values()) == ["alice", "alice"]


def test_a_key_file_that_cannot_be_used_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_keys_file .*absent: No such file"):
        ApiKeys(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe" + ALICE.encode())
    with pytest.raises(ConfigError, match=r"api_keys_file .*binary: expected UTF-8"):
        ApiKeys(tmp_path / "binary")


def test_keys_follow_the_file_within_a_second(path: Path) -> None:
    clock = Clock()
    keys = ApiKeys(path, clock)
    path.write_text(f"carol:{ALICE}\n")
    assert keys.holder(BOB.encode()) == "bob", "it was looked at too soon"
    clock.now += 1.0
    assert keys.holder(BOB.encode()) is None
    assert keys.holder(ALICE.encode()) == "carol"


def test_the_file_is_looked_at_once_a_second_at_most(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    keys = ApiKeys(path, clock)
    looked: list[Any] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *given, **options: looked.append(given) or stat(*given, **options))
    for _ in range(50):
        clock.now += 0.1
        keys.holder(b"nobody's")
    assert 4 <= len(looked) <= 5


@pytest.mark.parametrize("broken", [b"", b"alice:short\n", b"\xff\xfe\x00", None])
def test_a_broken_new_file_leaves_the_old_keys_and_is_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture, broken: bytes | None
) -> None:
    clock = Clock()
    keys = ApiKeys(path, clock)
    if broken is None:
        path.unlink()
    else:
        path.write_bytes(broken)
    for _ in range(3):
        clock.now += 1.0
        assert keys.holder(ALICE.encode()) == "alice"
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "api_keys_file" in record.message
    path.write_text(f"{UNNAMED}\n")
    clock.now += 1.0
    assert keys.holder(ALICE.encode()) is None
    assert keys.holder(UNNAMED.encode()) == "line 1"


def test_a_mounted_secret_that_swaps_a_link_is_followed(tmp_path: Path) -> None:
    """Kubernetes: keys -> ..data/keys, ..data -> a folder with a date; the link ..data is replaced."""
    for name, key in (("..1", ALICE), ("..2", BOB)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(f"who:{key}\n")
        os.utime(tmp_path / name / "keys", (1000, 1000))  # the same size and time do not hide that it is another file
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys").symlink_to("..data/keys")
    clock = Clock()
    keys = ApiKeys(tmp_path / "keys", clock)
    assert keys.holder(ALICE.encode()) == "who"
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    clock.now += 1.0
    assert keys.holder(ALICE.encode()) is None
    assert keys.holder(BOB.encode()) == "who"


def test_each_header_counts_once() -> None:
    headers = [(b"x-api-key", b"first"), (b"x-api-key", b"second"), (b"authorization", b"Bearer third")] * 50
    assert presented(headers) == [b"first", b"third"]


async def test_no_key_reaches_the_log(
    asking: httpx.AsyncClient, kit: Any, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "wrong-0123456789abcdef"
    body = json.dumps({"hidden_states": [[0.123456789] * kit.hidden]}).encode()
    for headers in ({"x-api-key": ALICE}, {"x-api-key": wrong}, {"authorization": f"Bearer {wrong}"}):
        await asking.post(
            f"{FORWARD}&key={wrong}", content=body, headers={**headers, "content-type": "application/json"}
        )
    await asking.post("/v1/drain", headers={"authorization": f"Bearer {kit.token}"})
    said = "".join(
        f"{record.__dict__} {extra_fields(record)}"
        for record in caplog.records
        if not record.name.startswith(("httpx", "httpcore"))
    )
    assert "'status': 401" in said
    assert "'caller': 'alice'" in said
    for secret in (ALICE, wrong, kit.token, "0.123456789"):
        assert secret not in said
