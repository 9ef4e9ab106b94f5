"""What is asked: distinct inputs of several sizes, layers and types, with the bytes that must come back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..service.whole.forwards import Forward, as_safetensors
from ..service.whole.local import Local
from .connection import Connection, post_head
from .ledger import Outcome, judge

SIZES = (1, 2, 7, 16, 33, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Question:
    """A forward as bytes. head: of the HTTP request. expected: bytes of the output tensor. tokens: its rows."""

    head: bytes
    body: bytes
    expected: bytes
    tokens: int

    def by(self, key: str) -> Question:
        """Return the same question of a client with an API key."""
        line = f"X-API-Key: {key}\r\n\r\n".encode()
        return replace(self, head=self.head[:-2] + line)


def make_questions(
    model: Path, count: int, deadline_seconds: float, sizes: tuple[int, ...] = SIZES, seed: int = 0
) -> list[Question]:
    """Make `count` distinct questions of a checkpoint, and work their answers out in this process.

    deadline_seconds: that each request names. sizes: rows, in turn.
    """
    local = Local(model)
    generator = torch.Generator().manual_seed(seed)
    layers = local.spec.layers
    forwards = [
        Forward(
            layers[number % len(layers)],
            torch.randn(sizes[number % len(sizes)], local.spec.hidden_size, generator=generator).to(
                DTYPES[number // len(sizes) % len(DTYPES)]
            ),
        )
        for number in range(count)
    ]
    questions = []
    for forward, output in zip(forwards, local.outputs(forwards), strict=True):
        sent = as_safetensors(forward)
        path = f"{sent.path}&timeout_ms={round(deadline_seconds * 1000)}"
        expected = output.contiguous().view(torch.uint8).numpy().tobytes()
        questions.append(
            Question(post_head(path, sent.headers, len(sent.body)), sent.body, expected, len(forward.hidden))
        )
    assert len({question.body for question in questions}) == count
    return questions


async def ask_all(host: str, port: int, questions: list[Question]) -> None:
    """Ask each question alone, before the fault. Raises: AssertionError where the service answers other bits."""
    connection = Connection(host, port)
    try:
        for number, question in enumerate(questions):
            reply = await connection.request(question.head, question.body)
            outcome, note = judge(reply, question.expected)
            assert outcome is Outcome.RIGHT, f"question {number} before the fault: {reply.status} {note}"
    finally:
        connection.close()
