"""Front ends in processes of their own, over an engine and ranks of this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import trustme
from prometheus_client import CollectorRegistry

from moe_forward.config import Config
from moe_forward.errors import StartError
from moe_forward.front_samples import MergedSamples
from moe_forward.front_task import FrontTask
from moe_forward.fronts import PROGRAM, Fronts
from moe_forward.heartbeat import keep_beating
from moe_forward.messages import Announce
from moe_forward.metrics import Metrics
from moe_forward.types import GateSpec, ModelSpec

from .tracing.collector import collecting

if TYPE_CHECKING:
    from tests.service.conftest import Gate, OnStep, Pool

COLUMNS = 8
SPEC = ModelSpec("tiny", COLUMNS, 128, 16, 4, 0, (3, 4), 128, GateSpec("softmax"))
PATH = "/v1/moe/forward"
TOKEN = "the operator's own"
KEY = "a-key-of-these-tests"
WAIT_SECONDS = 60.0  # a guard against tests that never end
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds."""

    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), WAIT_SECONDS)


class Served:
    """Some front ends, the service's side of them, and clients. log: what the front ends wrote so far."""

    def __init__(self, pool: Pool, count: int, program: tuple[str, ...] = PROGRAM, **config: Any) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        scheme = "https" if "tls_certificate_file" in config else "http"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        registry = CollectorRegistry()
        settings = Config(**{"slab_bytes": 1 << 20, "log_format": "json", "silence_seconds": 600, **config})
        metrics = Metrics(registry, tracing=settings.trace_endpoint is not None)
        self.merged = MergedSamples(registry)
        task = FrontTask(0, settings, SPEC, pool.path, TOKEN, draining=False)
        self.fronts = Fronts(task, count, self._listener, metrics, self.merged, program)
        self.serving = asyncio.create_task(self.fronts.serve())
        self._pool = pool

    async def up(self, *on_step: OnStep | None) -> None:
        """Wait until all front ends serve and a group of ranks is ready."""
        self.fronts.link.announce(Announce(1, len(on_step), 0))
        await until(lambda: self.fronts.link.status.generation == 1)
        for rank, behaviour in enumerate(on_step):
            self._pool.add_rank(rank, len(on_step), 1, behaviour)
        up = asyncio.create_task(self.fronts.up())
        await asyncio.wait([up, self.serving], timeout=WAIT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        assert up.done()
        await until(lambda: self.fronts.link.status.ready)

    def client(self, **settings: Any) -> httpx.AsyncClient:
        """A client that keeps its connection; two made one after the other are served by two front ends."""
        return httpx.AsyncClient(base_url=self.url, timeout=WAIT_SECONDS, **settings)

    def value(self, name: str, **labels: str) -> float:
        return self.merged.registry.get_sample_value(f"moe_forward_{name}", labels) or 0.0

    def answered(self) -> float:
        return self.value("requests_total", model="tiny", route=PATH, code="200")

    async def close(self) -> None:
        self.fronts.end()
        await asyncio.gather(self.serving, return_exceptions=True)
        await self.fronts.close()
        self._listener.close()


async def forward(client: httpx.AsyncClient, number: int = 1, **headers: str) -> httpx.Response:
    body = {"hidden_states": [[float(number)] * COLUMNS]}
    return await client.post(f"{PATH}?layer=3", json=body, headers=headers)


def pids(log: pytest.LogCaptureFixture) -> dict[int, int]:
    """Number of a front end -> its process, as the service told it last."""
    found = re.findall(r"front end (\d+) serves \(process (\d+)\)", log.text)
    return {int(number): int(pid) for number, pid in found}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "moe_forward.fronts")
    return caplog


@pytest.fixture
async def serve(pool: Pool) -> AsyncIterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(count: int = 2, program: tuple[str, ...] = PROGRAM, **config: Any) -> Served:
        if not made:
            pool.silence_seconds = config.get("silence_seconds")
            pool.start_engine()
        made.append(Served(pool, count, program, **config))
        return made[-1]

    yield start
    for served in made:
        await served.close()


async def test_two_front_ends_answer_alike_are_counted_together_and_end_when_all_is_answered(
    pool: Pool,
    serve: Callable[..., Served],
    gate: Gate,
    capfd: pytest.CaptureFixture[str],
    log: pytest.LogCaptureFixture,
) -> None:
    with collecting() as collector:
        served = serve(trace_endpoint=collector.url)
        await served.up(gate)
        gate.open()
        async with served.client() as one, served.client() as other:
            parents = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
            replies = [await forward(client, 3, **parents) for client in (one, other)]
            assert [reply.json()["output"] for reply in replies] == [[[6.0] * COLUMNS]] * 2
            await until(lambda: served.answered() == 2)
            assert served.value("batch_tokens_count", model="tiny") == 2
            assert served.value("rank_tokens_total", rank="0") == 14
            for client in (one, other):
                assert (await client.get("/v2/health/ready")).status_code == 200
                while (await client.get("/v1/ranks")).json()["ranks"][0]["tokens"] != 14:
                    await asyncio.sleep(0.02)
            gate.shut()
            running = asyncio.create_task(forward(one))
            await until(lambda: gate.entered == 3)
            for pid in pids(log).values():
                os.kill(pid, signal.SIGTERM)  # as systemd does it, to every process
            draining = asyncio.create_task(served.fronts.drain(WAIT_SECONDS))
            await asyncio.sleep(0.2)
            assert not draining.done()
            gate.open()
            assert (await running).status_code == 200
            await asyncio.wait_for(draining, WAIT_SECONDS)
        await asyncio.wait_for(served.serving, WAIT_SECONDS)
        roots = [span for span in collector.spans if span.parent == SPAN]
        steps = [part for root in roots for part in collector.children(root) if part.name == "step"]
        assert [[part.name for part in collector.children(step)] for step in steps] == [["rank"]] * 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids(log).values())
    assert "is gone" not in log.text
    assert served.answered() == 3
    assert served.value("inflight_requests", model="tiny") == 0
    requests = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"message": "request"' in line]
    assert sorted(record["front"] for record in requests) == [0, 0, 1]
    assert len({record["request_id"] for record in requests}) == 3


async def test_a_killed_front_end_comes_back_and_draining_one_drains_all(
    pool: Pool, serve: Callable[..., Served], gate: Gate, log: pytest.LogCaptureFixture
) -> None:
    served = serve()
    await served.up(gate)
    gate.open()
    before = pids(log)
    async with served.client() as one, served.client() as other:
        for client in (one, other):
            assert (await forward(client)).status_code == 200
        await until(lambda: served.answered() == 2)
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: "front end 0 is gone: its process ended by signal 9" in log.text)
        assert (await forward(other)).status_code == 200
        await until(lambda: len(pool.ranks[0].detached) == 1)
        async with served.client() as late:
            assert (await forward(late)).status_code == 200
        await until(lambda: pids(log)[0] != before[0])
        assert pids(log)[1] == before[1]
        gate.shut()
        async with served.client() as new:
            running = asyncio.create_task(forward(new))
            await until(lambda: gate.entered == 5)
            operator = {"authorization": f"Bearer {TOKEN}"}
            reply = await other.post("/v1/drain", headers=operator)
            assert reply.json() == {"draining": True, "inflight_requests": 1}
            gate.open()
            assert (await running).status_code == 200
            for client in (new, other):
                refused = await forward(client)
                assert (refused.status_code, refused.json()["code"]) == (503, "draining")
                assert (await client.get("/v2/health/ready")).status_code == 503
            reply = await other.post("/v1/drain", headers=operator)
            assert reply.json() == {"draining": True, "inflight_requests": 0}
        await until(lambda: served.answered() == 5)
        os.kill(before[1], signal.SIGKILL)
        await until(lambda: pids(log)[1] != before[1])
    for _ in range(2):  # one of them is new
        async with served.client() as client:
            assert (await forward(client)).json()["code"] == "draining"


async def test_a_stopped_front_end_is_replaced_and_who_waited_for_it_is_told(
    pool: Pool, serve: Callable[..., Served], log: pytest.LogCaptureFixture
) -> None:
    served = serve(silence_seconds=1)
    beating = asyncio.create_task(keep_beating(lambda: [rank.beat() for rank in pool.ranks], 1.0))
    await served.up(None)
    before = pids(log)
    async with served.client() as one, served.client() as other:
        for client in (one, other):
            assert (await forward(client)).status_code == 200
        os.kill(before[0], signal.SIGSTOP)
        waiting = [asyncio.create_task(forward(client)) for client in (one, other)]
        await until(lambda: "front end 0 is gone: no sign of life for 1 s" in log.text)
        replies = await asyncio.gather(*waiting, return_exceptions=True)
        assert sorted(getattr(reply, "status_code", 0) for reply in replies) == [0, 200]
        assert any(isinstance(reply, httpx.RemoteProtocolError | httpx.ReadError) for reply in replies)
        await until(lambda: pids(log)[0] != before[0])
        assert pids(log)[1] == before[1]
        for client in (one, other):
            assert (await forward(client)).status_code == 200
    beating.cancel()


async def test_each_front_end_speaks_tls_asks_for_keys_and_takes_its_share_of_connections(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    files = {"tls_certificate_file": tmp_path / "chain", "tls_key_file": tmp_path / "key"}
    issued.cert_chain_pems[0].write_to_path(files["tls_certificate_file"])
    issued.private_key_pem.write_to_path(files["tls_key_file"])
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    served = serve(api_keys_file=keys, max_connections=4, **files)
    await served.up(None)
    for _ in range(6):  # what is no TLS holds no place
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(served.url).port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await reader.read()
        writer.close()
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    async with contextlib.AsyncExitStack() as open_clients:
        clients = [await open_clients.enter_async_context(served.client(verify=context)) for _ in range(5)]
        replies = [await forward(client, **{"x-api-key": KEY}) for client in clients]
        assert [reply.status_code for reply in replies] == [200] * 4 + [503]
        assert replies[4].json()["code"] == "too_many_connections"
        assert (await forward(clients[0])).status_code == 401


async def test_a_front_end_that_cannot_start_ends_the_service_with_its_reason(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve(count=1, api_keys_file=tmp_path / "no such file")
    with pytest.raises(StartError, match=r"front end 0 did not start: api_keys_file .*No such file"):
        await asyncio.wait_for(served.serving, WAIT_SECONDS)


async def test_a_front_end_that_hangs_while_it_starts_ends_the_service(serve: Callable[..., Served]) -> None:
    program = (sys.executable, "-c", "import time; time.sleep(600)")
    served = serve(count=1, program=program, start_timeout_seconds=0.5)
    with pytest.raises(StartError, match=r"front end 0 did not start: it does not serve after 0\.5 s"):
        await asyncio.wait_for(served.serving, WAIT_SECONDS)


async def test_a_front_end_whose_program_ends_at_once_ends_the_service(serve: Callable[..., Served]) -> None:
    served = serve(count=1, program=(sys.executable, "-c", "import sys; sys.exit(7)"))
    with pytest.raises(StartError, match="front end 0 did not start: its process ended with status 7"):
        await asyncio.wait_for(served.serving, WAIT_SECONDS)


def test_a_front_end_ends_when_the_service_is_gone(socket_folder: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    task = FrontTask(0, Config(slab_bytes=1 << 20), SPEC, socket_folder / "engine.sock", None, draining=False)
    process = subprocess.Popen([*PROGRAM, str(theirs.fileno())], stdin=subprocess.PIPE, pass_fds=[theirs.fileno()])
    with ours, theirs:
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(task.to_json())
        theirs.close()
        ours.settimeout(WAIT_SECONDS)
        assert ours.recv(1 << 16)  # it serves
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtorch" not in maps
        assert "_raylet" not in maps
    assert process.wait(WAIT_SECONDS) == 1


def test_a_task_comes_back_as_it_went(tmp_path: Path) -> None:
    config = Config(model="m", api_keys_file=tmp_path / "keys", layers="3-4", host="127.0.0.1")
    for token in (None, "secret"):
        task = FrontTask(3, config, SPEC, tmp_path / "engine.sock", token, draining=True)
        assert FrontTask.from_json(task.to_json()) == task
