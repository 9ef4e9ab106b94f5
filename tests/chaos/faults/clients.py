"""Clients that break off, lie or send rubbish, beside those that do not."""

from __future__ import annotations

import asyncio
import random
import socket
from urllib.parse import urlsplit

import torch

from ...service.whole.forwards import Forward, as_safetensors
from ..connection import Connection, Cut, post_head
from ..scene import Fault, Scene

ATTEMPTS = 60
TOKENS = 64


async def truncated(scene: Scene) -> None:
    """Announce a body and hang up at a random place inside it."""
    sent = as_safetensors(Forward(1, torch.ones(TOKENS, 256)))
    whole = post_head(sent.path, sent.headers, len(sent.body)) + sent.body
    choose = random.Random(0)
    for _ in range(ATTEMPTS):
        _, writer = await _open(scene)
        writer.write(whole[: choose.randrange(1, len(whole))])
        await writer.drain()
        if choose.random() < 0.5:
            await asyncio.sleep(0.01)
        writer.transport.abort()


async def gone_before_the_answer(scene: Scene) -> None:
    """Send a whole request and hang up before, or while, the answer comes."""
    sent = as_safetensors(Forward(1, torch.ones(TOKENS, 256)))
    whole = post_head(sent.path, sent.headers, len(sent.body)) + sent.body
    choose = random.Random(1)
    for _ in range(ATTEMPTS):
        reader, writer = await _open(scene)
        writer.write(whole)
        await writer.drain()
        if choose.random() < 0.5:
            await reader.read(100)
        writer.transport.abort()


async def flipped(scene: Scene) -> None:
    """Flip bits of a body: an answer or a refusal of 4xx must come, and the connection go on."""
    sent = as_safetensors(Forward(1, torch.ones(TOKENS, 256)))
    address = urlsplit(scene.service.url)
    connection = Connection(address.hostname or "", address.port or 0)
    choose = random.Random(2)
    statuses = []
    try:
        for attempt in range(ATTEMPTS):
            body = bytearray(sent.body)
            end = 120 if attempt % 2 else len(body)  # of the header, or anywhere
            body[choose.randrange(end)] ^= 1 << choose.randrange(8)
            try:
                reply = await connection.request(post_head(sent.path, sent.headers, len(body)), bytes(body))
            except Cut as error:
                raise AssertionError(f"the connection ended: {error}") from error
            assert reply.status in (200, 400, 404, 422, 429), reply.body
            statuses.append(reply.status)
    finally:
        connection.close()
    found = ", ".join(f"{statuses.count(status)} x {status}" for status in sorted(set(statuses)))
    scene.notes.append(f"flipped bodies: {found}")


async def _open(scene: Scene) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(scene.service.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return reader, writer


FAULTS = (
    Fault("body-truncated", truncated, "clients hang up inside a body", after="unharmed"),
    Fault("client-gone", gone_before_the_answer, "clients hang up before the answer", after="unharmed"),
    Fault("body-flipped", flipped, "clients send bodies with a flipped bit", after="unharmed"),
)
