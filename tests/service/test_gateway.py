"""Ranks behind the gateway: to the engine they are like any other, and no byte travels that is not theirs."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from moe_forward import gateway as gateway_module
from moe_forward.channel import BlockingChannel
from moe_forward.datagrams import pack
from moe_forward.errors import ChannelClosed, ErrorCode
from moe_forward.frames import FramedSocket
from moe_forward.gateway import Gateway
from moe_forward.handshake import Address, call, listen, new_secret
from moe_forward.messages import Announce, AttachSlab, Cancel, DetachSlab, RankHello
from moe_forward.remote_channel import RemoteChannel
from moe_forward.slab import Slab, map_slab
from moe_forward.types import DType, ForwardRequest, RankInfo, Routing, Step, StepResult, TensorRef

from .conftest import HANG_SECONDS, ROW_BYTES, FakeRank, Front, Gate, OnStep, Pool

RANKS = 2


class RemoteRank(FakeRank):
    """A fake rank that reaches the engine through a gateway."""

    def __init__(self, address: Address, rank: int, generation: int = 1, on_step: OnStep | None = None) -> None:
        self._address = address
        super().__init__(Path(), rank, RANKS, generation, on_step)

    def _call_engine(self, path: Path) -> RemoteChannel:
        return RemoteChannel(self._address, self.rank, self.ranks)


class Door:
    """A gateway in threads of this process."""

    def __init__(self, path: Path) -> None:
        self._listener = listen("127.0.0.1", 0)
        self.address = Address("127.0.0.1", self._listener.getsockname()[1], new_secret())
        self._thread = threading.Thread(target=Gateway(self.address, path, RANKS).serve, args=(self._listener,))
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(HANG_SECONDS)
        assert not self._thread.is_alive()
        self._listener.close()


@pytest.fixture
def door(pool: Pool) -> Iterator[Door]:
    made = Door(pool.path)
    yield made
    made.close()


async def start(pool: Pool, door: Door, on_step: OnStep | None = None) -> tuple[Front, RemoteRank]:
    """Start an engine with rank 0 on its host and rank 1 behind the gateway."""
    pool.start_engine()
    front = await pool.add_front()
    await pool.announce(front, Announce(1, RANKS, 0))
    pool.add_rank(0, RANKS)
    remote = RemoteRank(door.address, 1, on_step=on_step)
    pool.ranks.append(remote)
    await front.until_ready(1)
    return front, remote


async def test_a_step_over_both_hosts_answers_every_row(pool: Pool, door: Door) -> None:
    front, remote = await start(pool, door)
    for tokens in (1, 2, 5, 64):
        request = front.request(tokens)
        assert (await front.forward(request)).code is None
        assert front.is_doubled(request)
        front.free_when_done(request)
    assert [len(report.results) for report in front.reports] == [2] * 4
    assert len(remote.steps) == 4


async def test_only_the_rows_of_the_remote_rank_travel(pool: Pool, door: Door) -> None:
    front, remote = await start(pool, door)
    request = front.request(10)
    assert (await front.forward(request)).code is None
    mirror = np.frombuffer(remote.slabs[0], np.uint8)
    start_of = request.hidden.offset
    mine = slice(start_of + 5 * ROW_BYTES, start_of + 10 * ROW_BYTES)
    slab = np.frombuffer(front.slab.view(0, front.slab.nbytes), np.uint8)
    assert np.array_equal(mirror[mine], slab[mine])
    assert slab[start_of : start_of + 5 * ROW_BYTES].any()
    assert not mirror[: mine.start].any()
    output = slice(request.output.offset + 5 * ROW_BYTES, request.output.offset + 10 * ROW_BYTES)
    assert not mirror[mine.stop : output.start].any()
    assert not mirror[output.stop :].any()


async def test_what_a_remote_rank_says_beside_rows_reaches_the_engine(pool: Pool, door: Door) -> None:
    front, _ = await start(pool, door, lambda rank, step: rank.result(step, non_finite=(0,)))
    result = await front.forward(front.request(4))
    assert result.code == ErrorCode.NON_FINITE


async def test_a_remote_rank_that_fails_says_why(pool: Pool, door: Door) -> None:
    front, _ = await start(pool, door, lambda rank, step: rank.result(step, error="out of luck"))
    result = await front.forward(front.request(4))
    assert result.code == ErrorCode.RANK_LOST
    assert "rank 1 failed: out of luck" in result.message


async def test_a_dead_remote_rank_loses_the_group_and_bytes_are_released(pool: Pool, door: Door, gate: Gate) -> None:
    front, remote = await start(pool, door, gate)
    request = front.request(8)
    sent = front.send(request)
    await front.until(lambda: gate.entered == 1)
    front.free_when_done(request)
    remote.kill()
    result = await sent
    assert result.code == ErrorCode.RANK_LOST
    assert "rank 1 is gone" in result.message
    assert front.slab.taken_bytes > 0, "rank 0 is alive and may still write"
    pool.ranks[0].kill()
    await front.until(lambda: front.slab.taken_bytes == 0)


async def test_remote_ranks_end_when_the_engine_does(pool: Pool, door: Door) -> None:
    front, remote = await start(pool, door)
    await pool.stop_engine()
    await front.until(remote.hung_up.is_set)


async def test_the_next_group_comes_through_the_same_door(pool: Pool, door: Door) -> None:
    front, remote = await start(pool, door)
    remote.kill()
    pool.ranks[0].kill()
    await front.until(lambda: front.link.status.lost)
    await pool.announce(front, Announce(2, RANKS, 1))
    pool.add_rank(0, RANKS, 2)
    pool.ranks.append(RemoteRank(door.address, 1, 2))
    await front.until_ready(2)
    request = front.request(6)
    assert (await front.forward(request)).code is None
    assert front.is_doubled(request)


async def test_a_front_end_that_goes_away_during_a_step_takes_nobody_along(pool: Pool, door: Door, gate: Gate) -> None:
    front, remote = await start(pool, door, gate)
    other = await pool.add_front()
    task = other.send(other.request(8))
    await front.until(lambda: gate.entered == 1)
    await other.link.close()
    assert (await task).code == ErrorCode.RANK_LOST
    gate.open()
    await front.until(lambda: remote.detached == [1])
    request = front.request(6)
    assert (await front.forward(request)).code is None
    assert front.is_doubled(request)


async def test_a_rank_that_is_not_expected_is_hung_up_on(pool: Pool, door: Door) -> None:
    front, _ = await start(pool, door)
    stranger = RemoteRank(door.address, 1, generation=7)
    pool.ranks.append(stranger)
    await front.until(stranger.hung_up.is_set)
    assert front.link.status.ready


def hello(rank: int) -> RankHello:
    return RankHello(1, RankInfo(rank, "ready", 0.0), "", "")


@pytest.mark.parametrize("says", [hello(RANKS), hello(-1), Cancel(1), StepResult(1, 1, 1, (), 0)])
async def test_who_is_no_rank_of_the_group_never_reaches_the_engine(
    pool: Pool, door: Door, says: RankHello | Cancel | StepResult
) -> None:
    front, _ = await start(pool, door)
    peer = FramedSocket(call(door.address))
    peer.send(says)
    with pytest.raises(ChannelClosed):
        await asyncio.to_thread(peer.receive)
    peer.close()
    assert front.link.status.ready


async def in_a_group_of(pool: Pool, door: Door) -> tuple[Front, FramedSocket]:
    """Start a group whose rank 1 is this test; it has been shown the slab."""
    pool.start_engine()
    front = await pool.add_front()
    await pool.announce(front, Announce(1, RANKS, 0))
    pool.add_rank(0, RANKS)
    peer = FramedSocket(call(door.address))
    peer.send(hello(1))
    assert isinstance(await asyncio.to_thread(peer.receive), AttachSlab)
    await front.until_ready(1)
    return front, peer


@pytest.mark.parametrize("says", ["a result of no step", "of another step", "of another rank", "a message", "garbage"])
async def test_what_no_rank_would_say_loses_the_rank_and_touches_no_slab(pool: Pool, door: Door, says: str) -> None:
    front, peer = await in_a_group_of(pool, door)
    task = front.send(request := front.request(4))
    if says == "a result of no step":
        peer.send(StepResult(0, 1, 0, (), 0))
    else:
        step = await asyncio.to_thread(peer.receive)
        assert isinstance(step, Step)
        peer.receive_rows([memoryview(bytearray(2 * ROW_BYTES))])
        result = StepResult(step.step, step.generation, 1, (), 0)
        if says == "garbage":
            data = b"\x04" + bytes(7)
            with socket.socket(fileno=peer.fileno()) as raw:
                raw.sendall(struct.pack("<IQ", len(data), sum(data)) + data)
                raw.detach()
        else:
            wrong = {
                "of another step": result._replace(step=step.step + 1),
                "of another rank": result._replace(rank=0),
                "a message": DetachSlab(0),
            }
            peer.send(wrong[says])
    answer = await task
    assert answer.code == ErrorCode.RANK_LOST
    assert "rank 1 is gone" in answer.message
    assert np.isnan(front.rows(request, request.output)[2:]).all()
    peer.close()


async def test_more_strangers_than_bearable_are_hung_up_on_at_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "MAX_STRANGERS", 3)
    door = Door(pool.path)
    where = (door.address.host, door.address.port)
    with ExitStack() as stack:
        stack.callback(door.close)
        waiting = [stack.enter_context(socket.create_connection(where, HANG_SECONDS)) for _ in range(3)]
        assert all(sock.recv(1) for sock in waiting), "each is greeted"
        one_more = stack.enter_context(socket.create_connection(where, HANG_SECONDS))
        assert one_more.recv(1) == b""


def called() -> tuple[socket.socket, RemoteChannel]:
    """Return both ends of a trusted connection: the gateway's, and that of the only rank of a group."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1], new_secret())
        result: list[RemoteChannel] = []
        caller = threading.Thread(target=lambda: result.append(RemoteChannel(address, 0, 1)))
        caller.start()
        sock, _ = listener.accept()
        gateway_module.welcome(sock, address)
        caller.join(HANG_SECONDS)
    return sock, result[0]


def test_a_gateway_that_names_memory_that_is_not_there_is_hung_up_on() -> None:
    sock, channel = called()
    peer = FramedSocket(sock)
    peer.send(AttachSlab(0, 4096))
    front = Front(Path())
    request = front.request(4)._replace(front=0)
    far = request._replace(hidden=request.hidden._replace(offset=4090))
    peer.send(Step(0, 1, 3, (far,)))
    message, (fd,) = channel.receive()
    socket.close(fd)
    assert message == AttachSlab(0, 4096)
    with pytest.raises(ChannelClosed, match="which has 4096 bytes here"):
        channel.receive()
    assert len(pack(Step(0, 1, 3, (far,)))) > 0
    peer.close()
    channel.close()
    front.slab.close()


async def test_heartbeats_of_a_remote_rank_come_from_the_rank_itself(pool: Pool, door: Door) -> None:
    pool.silence_seconds = 1.0
    pool.start_engine()
    front = await pool.add_front()
    await pool.announce(front, Announce(1, RANKS, 0))
    pool.add_rank(0, RANKS)
    remote = RemoteRank(door.address, 1)
    pool.ranks.append(remote)
    await front.until_ready(1)
    for _ in range(6):
        pool.ranks[0].beat()
        remote.beat()
        await asyncio.sleep(0.2)
    assert front.link.status.ready
    while front.link.status.ready:
        pool.ranks[0].beat()
        await asyncio.sleep(0.05)
    assert front.link.status.reason == "no sign of life from rank 1 for 1 s"


def test_rows_of_the_next_step_and_of_the_last_result_pass_each_other() -> None:
    """With one thread in the gateway, it and the rank would each wait for the other to read."""
    row_bytes, rows = 4 << 20, 6  # more than the sockets hold
    columns = row_bytes // 4
    listener = socket.create_server(("127.0.0.1", 0))
    theirs = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    engine_end, gateway_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    rank, engine = FramedSocket(theirs), BlockingChannel(engine_end)
    bridge = gateway_module._Bridge(FramedSocket(ours), BlockingChannel(gateway_end), 0, 1)
    ended: list[BaseException] = []

    def run() -> None:
        try:
            bridge.run()
        except ChannelClosed as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    slab = Slab(4 * rows * row_bytes)
    socket.send_fds(engine_end, [pack(AttachSlab(0, slab.nbytes))], [slab.fd])
    for number in (0, 1):
        start = 2 * number * rows * row_bytes
        hidden, output = (TensorRef(start + part * rows * row_bytes, DType.F32, columns) for part in (0, 1))
        request = ForwardRequest(0, number, 3, rows, 1e9, True, hidden, None, Routing.SERVER, None, None, output)
        engine.send(Step(number, 1, 3, (request,)))
    assert isinstance(rank.receive(), AttachSlab)
    here = memoryview(bytearray(rows * row_bytes))
    assert isinstance(rank.receive(), Step)
    rank.receive_rows([here])
    theirs.settimeout(HANG_SECONDS)
    rank.send(StepResult(0, 1, 0, (), 0), [memoryview(b"\x05" * len(here))])  # step 1 and its rows are not read yet
    result, _ = engine.receive()
    assert result == StepResult(0, 1, 0, (), 0)
    assert bytes(slab.view(rows * row_bytes, 3)) == b"\x05\x05\x05"
    assert isinstance(rank.receive(), Step)
    rank.receive_rows([here])
    engine.close()
    thread.join(HANG_SECONDS)
    assert str(ended[0]) == "the other end is gone"
    for end in (rank, ours, gateway_end, listener):
        end.close()
    slab.close()


def until_ready(channel: RemoteChannel) -> None:
    give_up = time.monotonic() + HANG_SECONDS
    while not channel.ready():
        assert time.monotonic() < give_up, "nothing comes"
        time.sleep(0.01)


def request_of(slab: Slab, number: int, rows: int, columns: int) -> ForwardRequest:
    """Describe float32 rows that lie behind each other: the input, then the output, number by number."""
    start, nbytes = 8 * number * rows * columns, 4 * rows * columns
    assert start + 2 * nbytes <= slab.nbytes
    hidden, output = (TensorRef(offset, DType.F32, columns) for offset in (start, start + nbytes))
    return ForwardRequest(0, number, 3, rows, 1e9, True, hidden, None, Routing.SERVER, None, None, output)


def test_a_rank_that_computes_for_longer_than_a_silence_is_sent_the_next_steps_and_answers_all() -> None:
    silence_seconds, rows, columns = 1.0, 2, 4 << 20  # 32 MiB a step, which no socket holds
    sock, channel = called()
    engine_end, gateway_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    engine = BlockingChannel(engine_end)
    bridge = gateway_module._Bridge(FramedSocket(sock, silence_seconds), BlockingChannel(gateway_end), 0, 1)
    why: list[ChannelClosed] = []

    def run() -> None:
        try:
            bridge.run()
        except ChannelClosed as error:
            why.append(error)

    bridging = threading.Thread(target=run)
    bridging.start()
    slab = Slab(16 * rows * columns)
    socket.send_fds(engine_end, [pack(AttachSlab(0, slab.nbytes))], [slab.fd])
    requests = [request_of(slab, number, rows, columns) for number in (0, 1)]
    for request in requests:
        slab.view(request.hidden.offset, 8)[:] = bytes([request.request + 1]) * 8
        engine.send(Step(request.request, 1, 3, (request,)))
    message, (fd,) = channel.receive()
    assert isinstance(message, AttachSlab)
    mirror = map_slab(fd, message.slab_bytes)
    socket.close(fd)
    for number, request in enumerate(requests):
        step, _ = channel.receive()
        assert isinstance(step, Step)
        assert step.step == number
        if number == 0:
            time.sleep(3 * silence_seconds)  # computes; step 1 and its rows are on their way
        mirror[request.output.offset : request.output.offset + 8] = mirror[
            request.hidden.offset : request.hidden.offset + 8
        ]
        channel.send(StepResult(number, 1, 0, (), 0))
        assert engine.receive()[0] == StepResult(number, 1, 0, (), 0)
        assert bytes(slab.view(request.output.offset, 8)) == bytes([number + 1]) * 8
    engine.close()
    with pytest.raises(ChannelClosed):
        channel.receive()
    channel.close()
    bridging.join(HANG_SECONDS)
    assert str(why[0]) == "the other end is gone"
    for end in (sock, gateway_end):
        end.close()
    slab.close()


def test_a_rank_that_computes_hears_that_the_engine_is_gone_after_what_came_before() -> None:
    sock, channel = called()
    peer = FramedSocket(sock)
    assert not channel.ready()
    peer.send(DetachSlab(4))
    until_ready(channel)
    peer.close()  # while the rank computes
    assert channel.receive() == (DetachSlab(4), [])
    until_ready(channel)
    for _ in range(2):
        with pytest.raises(ChannelClosed, match="gone"):
            channel.receive()
        assert channel.ready(), "the end stays the end"
    channel.close()


def test_a_closed_channel_leaves_no_thread_and_no_descriptor() -> None:
    threads, fds = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    sock, channel = called()
    assert len(set(threading.enumerate()) - threads) == 1
    peer = FramedSocket(sock)
    peer.send(AttachSlab(0, 4096))
    until_ready(channel)
    channel.close()
    peer.close()
    del channel
    assert set(threading.enumerate()) == threads
    assert set(os.listdir("/proc/self/fd")) == fds
