"""What is fuzzed: everything that reads bytes a stranger made. A target returns, or raises what is a finding.

Each takes the fuzzer's bytes and checks what comes out; refusals with a sentence are right answers.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from uvicorn.server import ServerState

from moe_forward.api.body import ClientDisconnected
from moe_forward.api.keys import parse_keys
from moe_forward.api.peer import EXTENSION
from moe_forward.api.server import server_settings
from moe_forward.checkpoint.index import read_header
from moe_forward.config import Config
from moe_forward.errors import CheckpointError, ConfigError, ForwardError
from moe_forward.types import GateSpec, ModelSpec
from moe_forward.wire import Encoding, WireLimits, WireRequest, oip, plain_json, safetensors

SPEC = ModelSpec("tiny", 8, 128, 4, 2, 128, (1, 2, 3), 128, GateSpec("softmax"))
LIMITS = WireLimits(SPEC, 16, 600.0, 1 << 19)


def fuzz_safetensors(data: bytes) -> None:
    """A body of application/vnd.safetensors."""
    _decode(safetensors, data, {})


def fuzz_json(data: bytes) -> None:
    """A body of application/json."""
    _decode(plain_json, data, {})


def fuzz_oip(data: bytes) -> None:
    """A body of the inference protocol; the first two bytes are the length of its JSON part, 65535 leaves it out."""
    length = int.from_bytes(data[:2], "little")
    _decode(oip, data[2:], {} if length == 65535 else {oip.HEADER_LENGTH: str(length)})


def fuzz_checkpoint(data: bytes) -> None:
    """A file of a checkpoint: where its tensors lie."""
    path = _file_in_memory()
    path.write_bytes(data)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    end = 8 + int.from_bytes(data[:8], "little")
    for tensor in header.tensors:
        assert tensor.offset == end
        end += tensor.size_bytes
    assert end == len(data)


def fuzz_keys(data: bytes) -> None:
    """A file of API keys."""
    text = data.decode("utf-8", "replace")
    try:
        holders = parse_keys(text)
    except ConfigError:
        return
    assert holders
    assert all(len(digest) == 32 and name for digest, name in holders.items())


def fuzz_http(data: bytes) -> None:
    """What comes on a connection, cut where the first byte says: whatever is answered is HTTP."""
    transport = _Transport()
    connection: Any = _settings().http_protocol_class(
        config=_settings(), server_state=_server_state(), app_state={}, _loop=_loop()
    )
    connection.connection_made(transport)
    cut = data[0] if data else 0
    for part in (data[1 : 1 + cut], data[1 + cut :]):
        _arrive(connection, transport, part)
    for _ in range(3):
        _loop().run_until_complete(asyncio.sleep(0))
    connection.connection_lost(None)
    _loop().run_until_complete(asyncio.sleep(0))
    assert not transport.written or transport.written.startswith(b"HTTP/1.1 ")


def _arrive(connection: Any, transport: _Transport, data: bytes) -> None:
    """Write `data` where the connection wants it, as far as it wants any."""
    while data and transport.reading and not transport.closing:
        room = memoryview(connection.get_buffer(-1))
        count = min(len(room), len(data))
        room[:count], data = data[:count], data[count:]
        connection.buffer_updated(count)
        for _ in range(3):
            _loop().run_until_complete(asyncio.sleep(0))


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "safetensors": fuzz_safetensors,
    "json": fuzz_json,
    "oip": fuzz_oip,
    "checkpoint": fuzz_checkpoint,
    "keys": fuzz_keys,
    "http": fuzz_http,
}


WORDS = (
    *("__metadata__", "dtype", "shape", "data_offsets", "F32", "BF16", "F8_E4M3", "I64", "NaN", "1e999", "null"),
    *("hidden_states", "hidden_scales", "topk_ids", "topk_weights", "router_logits", "layer", "shared_experts"),
    *("inputs", "outputs", "name", "datatype", "data", "parameters", "binary_data_size", "moe_dtype", "timeout_ms"),
    *("Content-Length: ", "Transfer-Encoding: chunked", "Connection: close", "Upgrade: h2c", "Expect: 100-continue"),
    *("HTTP/1.0", "HTTP/1.1", "\r\n\r\n", "GET ", "POST ", "\\ud800", "[[", "]]", '":{"', '","'),
)
"""What the formats are made of, which the fuzzer would take long to find."""


def seeds(name: str) -> list[bytes]:
    """Inputs of a target that are read to their end, for the fuzzer to start from."""
    values = [[0.5] * SPEC.hidden_size] * 2
    document = {"layer": 1, "hidden_states": values, "topk_ids": [[0, 1]] * 2, "topk_weights": [[0.5, 0.5]] * 2}
    files = [_file(1), _file(2)]
    inputs = [
        {"name": "hidden_states", "shape": [2, 8], "datatype": "FP32", "data": values},
        {"name": "router_logits", "shape": [2, 4], "datatype": "FP32", "parameters": {"binary_data_size": 32}},
    ]
    message = json.dumps({"id": "1", "inputs": inputs, "parameters": {"layer": 1}}).encode()
    get = b"GET /v2 HTTP/1.1\r\nHost: h\r\n\r\n"
    tensors = b"POST /v1/moe/forward HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"
    post = b"POST /v2 HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"
    chunked = b"POST /v2 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    return {
        "safetensors": files,
        "json": [json.dumps(document).encode()],
        "oip": [len(message).to_bytes(2, "little") + message + bytes(32)],
        "checkpoint": files,
        "keys": [b"# keys\nalice:0123456789abcdef\n0123456789abcdefg\n"],
        "http": [
            b"\x4a" + tensors + tensors + get,
            b"\x05" + get,
            b"\x20" + get + post + get,
            b"\x40" + chunked + get,
            b"\x01" + post + b"rubbish\r\n",
        ],
    }[name]


def _decode(encoding: Encoding, body: bytes, headers: Mapping[str, str]) -> None:
    try:
        call = encoding.decode(WireRequest(headers, (("layer", "1"),), memoryview(body)), LIMITS)
    except ForwardError as error:
        error.message.encode()  # no lone surrogates: it must fit into a reply
        return
    assert 1 <= call.tokens <= LIMITS.max_request_tokens
    assert call.layer in SPEC.layers
    assert call.hidden.shape == (call.tokens, SPEC.hidden_size)
    for tensor in (call.hidden, call.hidden_scales, call.chosen, call.weights):
        if tensor is not None:
            rows, columns = (*tensor.shape, 1)[:2]
            assert tensor.data.nbytes == rows * columns * tensor.dtype.itemsize
            if tensor.offset is not None:
                assert bytes(tensor.data) == body[tensor.offset : tensor.offset + tensor.data.nbytes]


def _file(tokens: int) -> bytes:
    size = tokens * SPEC.hidden_size * 4
    header = {
        "__metadata__": {"layer": "1"},
        "hidden_states": {"dtype": "F32", "shape": [tokens, SPEC.hidden_size], "data_offsets": [0, size]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


class _Transport(asyncio.Transport):
    """Takes what is written, and closes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False
        self.reading = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "sslcontext" else default  # as under TLS: all that is written comes by `write`

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written += data

    def close(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    peer = scope.get("extensions", {}).get(EXTENSION)
    length = int(dict(scope["headers"]).get(b"content-length", 0))
    if peer is None:
        await receive()
    elif 0 < length <= 4096:
        with suppress(ForwardError, ClientDisconnected):
            await peer.receive_body(memoryview(bytearray(length)), 60.0)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok", "more_body": False})


@cache
def _settings() -> Any:
    return server_settings(_echo, Config(max_header_bytes=1024), None)


@cache
def _server_state() -> ServerState:
    return ServerState()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


@cache
def _file_in_memory() -> Path:
    return Path(f"/proc/self/fd/{os.memfd_create('checkpoint')}")
