"""Channels over real sockets: order, descriptors, full buffers, the end, and what is too long."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from moe_forward.channel import MAX_MESSAGE_BYTES, AsyncChannel, BlockingChannel, connect, listen, same_user
from moe_forward.datagrams import pack
from moe_forward.errors import ChannelClosed
from moe_forward.messages import AttachSlab, Cancel, DetachSlab, Message
from moe_forward.slab import Slab
from moe_forward.types import ForwardResult

HANG_SECONDS = 20.0  # a guard against tests that never end, not a measurement


class Recorder:
    """Collects what a channel reports; `until` waits for a condition on it."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.fds: list[int] = []
        self.closes = 0
        self._changed = asyncio.Event()

    def on_message(self, channel: AsyncChannel, message: Message, fds: list[int]) -> None:
        self.messages.append(message)
        self.fds += fds
        self._changed.set()

    def on_close(self, channel: AsyncChannel) -> None:
        self.closes += 1
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        await asyncio.wait_for(self._until(condition), HANG_SECONDS)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="moe-") as name:  # a socket's path may have 107 bytes only
        yield Path(name)


def watch(sock: socket.socket) -> tuple[AsyncChannel, Recorder]:
    recorder = Recorder()
    return AsyncChannel(sock, recorder.on_message, recorder.on_close), recorder


def long_result(number: int, length: int) -> ForwardResult:
    return ForwardResult(0, number, 20, "x" * length)


async def test_messages_arrive_in_order_both_ways(pair: tuple[socket.socket, socket.socket]) -> None:
    left, left_record = watch(pair[0])
    right, right_record = watch(pair[1])
    for number in range(300):
        left.send(Cancel(number))
        right.send(DetachSlab(number))
    await right_record.until(lambda: len(right_record.messages) == 300)
    await left_record.until(lambda: len(left_record.messages) == 300)
    assert right_record.messages == [Cancel(number) for number in range(300)]
    assert left_record.messages == [DetachSlab(number) for number in range(300)]
    left.close()
    right.close()


async def test_messages_sent_together_or_in_one_turn_of_the_loop_come_in_order_in_one_datagram(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    left, _ = watch(pair[0])
    record, rests = Recorder(), []

    def rest() -> bool:
        rests.append(len(record.messages))
        return True

    right = AsyncChannel(pair[1], record.on_message, record.on_close, rest)
    left.send_all([Cancel(1), Cancel(2), Cancel(3)])
    left.post(Cancel(4))
    left.post(Cancel(5))
    await record.until(lambda: len(record.messages) == 5)
    left.post(Cancel(6))
    left.send(Cancel(7))  # does not overtake
    await record.until(lambda: len(record.messages) == 7)
    assert record.messages == [Cancel(number) for number in range(1, 8)]
    assert rests == [3, 5, 6, 7]
    left.post(Cancel(8))
    left.close()
    await record.until(lambda: record.closes == 1)
    assert len(record.messages) == 7
    right.close()


@pytest.mark.parametrize(("looks_on", "first_turn"), [(True, 3), (False, 1)])
async def test_whoever_does_not_look_on_gets_a_datagram_in_each_turn_of_the_loop_and_loses_none(
    pair: tuple[socket.socket, socket.socket], looks_on: bool, first_turn: int
) -> None:
    sender = BlockingChannel(pair[1])
    for number in range(3):
        sender.send(Cancel(number))
    record = Recorder()
    receiver = AsyncChannel(pair[0], record.on_message, record.on_close, lambda: looks_on)
    while not record.messages:
        await asyncio.sleep(0)
    assert len(record.messages) == first_turn
    await record.until(lambda: len(record.messages) == 3)
    assert record.messages == [Cancel(number) for number in range(3)]
    sender.close()
    await record.until(lambda: record.closes == 1)
    receiver.close()


async def test_what_is_too_long_for_one_datagram_goes_in_more(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, _ = watch(pair[0])
    receiver, record = watch(pair[1])
    sent = [long_result(number, 50_000) for number in range(10)]
    sender.send_all(sent)
    await record.until(lambda: len(record.messages) == 10)
    assert record.messages == sent
    sender.close()
    receiver.close()


async def test_a_descriptor_travels_with_its_message_and_maps_the_same_memory(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    left, _ = watch(pair[0])
    right, record = watch(pair[1])
    slab = Slab(4096)
    slab.view(0, 4)[:] = b"same"
    left.send(DetachSlab(1))
    left.send(AttachSlab(1, slab.nbytes), slab.fd)
    left.send(DetachSlab(2))
    await record.until(lambda: len(record.messages) == 3)
    (fd,) = record.fds
    assert fd != slab.fd
    assert os.pread(fd, 4, 0) == b"same"
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC, "a child process would inherit the slab"
    os.close(fd)
    slab.close()
    left.close()
    right.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_slow_reader_loses_nothing(run: Callable[..., None]) -> None:
    count = 400

    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sender, _ = watch(ours)
        sent = [long_result(number, 10_000 + number) for number in range(count)]
        read_end, write_end = os.pipe()
        for number, message in enumerate(sent):  # nobody reads yet: most of it has to queue
            sender.send(message, write_end if number == count - 1 else None)
        os.close(write_end)  # the channel keeps its own copy
        reader = BlockingChannel(theirs)
        received = []
        fds: list[int] = []
        for _ in range(count):
            got, more = await asyncio.wait_for(asyncio.to_thread(reader.receive), HANG_SECONDS)
            received.append(got)
            fds += more
        assert received == sent
        (fd,) = fds
        os.write(fd, b"!")
        assert os.read(read_end, 1) == b"!"
        for end in (fd, read_end):
            os.close(end)
        sender.send(Cancel(1))  # the queue is empty again: straight through
        last, _ = await asyncio.to_thread(reader.receive)
        assert last == Cancel(1)
        sender.close()
        reader.close()

    run(main())


async def test_a_full_buffer_never_lets_a_later_message_overtake(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, _ = watch(pair[0])
    for number in range(100):
        sender.send(long_result(number, 50_000))
    blocking = BlockingChannel(pair[1])
    first = [blocking.receive()[0] for _ in range(3)]  # there is room in the socket now, but the others were first
    for number in range(100, 200):
        sender.send(Cancel(number))
    receiver, record = watch(pair[1])
    await record.until(lambda: len(record.messages) == 197)
    assert [message.request for message in first + record.messages] == list(range(200))  # type: ignore[union-attr]
    sender.close()
    receiver.close()


async def test_closing_forgets_what_is_queued_and_its_descriptors(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, _ = watch(pair[0])
    read_end, write_end = os.pipe()
    for number in range(100):
        sender.send(long_result(number, 50_000), write_end if number == 99 else None)
    os.close(write_end)
    sender.close()
    assert os.read(read_end, 1) == b"", "the queued copy of the descriptor is still open"
    os.close(read_end)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_the_end_is_told_once_after_the_last_message(run: Callable[..., None]) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sender = BlockingChannel(theirs)
        for number in range(200):
            sender.send(Cancel(number))
        sender.close()
        receiver, record = watch(ours)
        await record.until(lambda: record.closes > 0)
        assert record.messages == [Cancel(number) for number in range(200)]
        await asyncio.sleep(0.02)
        receiver.send(Cancel(1))  # dropped, not raised
        receiver.close()
        await asyncio.sleep(0.02)
        assert record.closes == 1

    run(main())


async def test_our_own_close_is_not_reported(pair: tuple[socket.socket, socket.socket]) -> None:
    left, left_record = watch(pair[0])
    _, right_record = watch(pair[1])
    left.close()
    left.close()
    await right_record.until(lambda: right_record.closes == 1)
    assert left_record.closes == 0


async def test_sending_to_a_dead_end_is_dropped_and_the_end_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    channel, record = watch(pair[0])
    pair[1].close()
    channel.send(Cancel(1))
    channel.send(Cancel(2))
    await record.until(lambda: record.closes == 1)
    channel.send(Cancel(3))


async def test_an_end_that_dies_with_our_messages_queued_is_told_once(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    channel, record = watch(pair[0])
    for number in range(100):
        channel.send(long_result(number, 50_000))
    pair[1].close()  # unread data: we get ECONNRESET, not an end of file
    await record.until(lambda: record.closes == 1)
    await asyncio.sleep(0.02)
    assert record.closes == 1


async def test_closing_inside_the_callback_stops_the_messages(pair: tuple[socket.socket, socket.socket]) -> None:
    seen: list[Message] = []

    def once(channel: AsyncChannel, message: Message, fds: list[int]) -> None:
        seen.append(message)
        channel.close()

    closes: list[AsyncChannel] = []
    AsyncChannel(pair[0], once, closes.append)
    other, record = watch(pair[1])
    other.send(Cancel(1))
    other.send(Cancel(2))
    await record.until(lambda: record.closes == 1)
    assert seen == [Cancel(1)]
    assert closes == []


async def test_a_busy_sender_does_not_starve_the_loop(pair: tuple[socket.socket, socket.socket]) -> None:
    sender = BlockingChannel(pair[1])
    for number in range(150):
        sender.send(Cancel(number))
    counts: list[int] = []
    receiver, record = watch(pair[0])
    while len(record.messages) < 150:
        await asyncio.sleep(0)
        counts.append(len(record.messages))
    assert any(0 < count < 150 for count in counts), "all messages were handled in one turn of the loop"
    receiver.close()
    sender.close()


def longest(data_bytes: int) -> ForwardResult:
    overhead = len(pack(ForwardResult(0, 0)))
    return ForwardResult(0, 0, message="m" * (data_bytes - overhead))


async def test_the_longest_message_passes_and_a_longer_one_is_refused(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    channel, record = watch(pair[0])
    blocking = BlockingChannel(pair[1])
    with pytest.raises(ValueError, match=f"a message of {MAX_MESSAGE_BYTES + 1} bytes exceeds {MAX_MESSAGE_BYTES}"):
        channel.send(longest(MAX_MESSAGE_BYTES + 1))
    with pytest.raises(ValueError, match="exceeds"):
        blocking.send(longest(MAX_MESSAGE_BYTES + 1))
    channel.send(longest(MAX_MESSAGE_BYTES))
    assert await asyncio.to_thread(blocking.receive) == (longest(MAX_MESSAGE_BYTES), [])
    await asyncio.to_thread(blocking.send, longest(MAX_MESSAGE_BYTES))
    await record.until(lambda: record.messages == [longest(MAX_MESSAGE_BYTES)])
    channel.close()
    blocking.close()


@pytest.mark.parametrize(
    "data",
    [bytes(MAX_MESSAGE_BYTES + 1), b"\xff\1\2", pack(Cancel(1))[:-1], b"\x08[1]", b"\1\0", b"\x08{}"],
    ids=["too long", "unknown kind", "cut JSON", "no mapping", "cut struct", "missing field"],
)
async def test_what_cannot_be_read_ends_the_channel_and_leaks_no_descriptor(
    pair: tuple[socket.socket, socket.socket], data: bytes
) -> None:
    channel, record = watch(pair[0])
    read_end, write_end = os.pipe()
    pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE_BYTES)
    socket.send_fds(pair[1], [data], [write_end])
    os.close(write_end)
    await record.until(lambda: record.closes == 1)
    assert record.messages == []
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    channel.close()


def test_blocking_channel_tells_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    channel = BlockingChannel(pair[0])
    pair[1].close()
    with pytest.raises(ChannelClosed, match="the other end is gone"):
        channel.receive()
    with pytest.raises(ChannelClosed):
        channel.send(Cancel(1))


def test_a_blocking_channel_is_ready_for_a_message_and_for_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = (BlockingChannel(sock) for sock in pair)
    assert not ours.ready()
    theirs.send(Cancel(1))
    assert ours.ready()
    assert ours.receive()[0] == Cancel(1)
    assert not ours.ready()
    theirs.hang_up()
    assert ours.ready()
    with pytest.raises(ChannelClosed):
        ours.receive()


def test_two_threads_may_send(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = (BlockingChannel(sock) for sock in pair)
    threads = [
        threading.Thread(target=lambda first=first: [ours.send(Cancel(first + n)) for n in range(200)])
        for first in (0, 1000)
    ]
    for thread in threads:
        thread.start()
    received = [theirs.receive()[0] for _ in range(400)]
    for thread in threads:
        thread.join(HANG_SECONDS)
    for first in (0, 1000):
        mine = [message.request for message in received if message.request // 1000 == first // 1000]
        assert mine == list(range(first, first + 200))


def test_blocking_sends_wait_for_a_slow_reader(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = BlockingChannel(pair[0]), BlockingChannel(pair[1])
    messages = [long_result(number, 40_000) for number in range(60)]

    def send_all() -> None:
        for message in messages:
            sender.send(message)

    thread = threading.Thread(target=send_all)
    thread.start()
    assert [receiver.receive()[0] for _ in messages] == messages
    thread.join(HANG_SECONDS)
    assert not thread.is_alive()


def test_listening_replaces_what_a_dead_process_left_and_keeps_others_out(folder: Path) -> None:
    path = folder / "engine.sock"
    listen(path).close()
    assert path.exists()
    with listen(path), connect(path):
        assert path.stat().st_mode & 0o777 == 0o600


def test_connecting_where_nobody_listens_raises(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect(folder / "engine.sock")
    listen(folder / "engine.sock").close()
    with pytest.raises(ConnectionRefusedError):
        connect(folder / "engine.sock")


def test_a_peer_of_our_own_user_is_known(pair: tuple[socket.socket, socket.socket]) -> None:
    assert same_user(pair[0])


@pytest.mark.parametrize(("peer", "expected"), [(1000, True), (1001, False), (0, False)])
def test_only_our_own_user_is_let_in(monkeypatch: pytest.MonkeyPatch, peer: int, expected: bool) -> None:
    class Peer:
        def getsockopt(self, level: int, option: int, size: int) -> bytes:
            assert (level, option, size) == (socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return struct.pack("3i", 4711, peer, 77)

    monkeypatch.setattr("moe_forward.channel.os.getuid", lambda: 1000)
    assert same_user(Peer()) is expected  # type: ignore[arg-type]
