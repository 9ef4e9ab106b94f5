from __future__ import annotations

from typing import Any

import pytest

from moe_forward.api.availability import Availability
from moe_forward.errors import ErrorCode
from moe_forward.types import EngineStatus


class Statement:
    def __init__(self, **fields: Any) -> None:
        self.status = EngineStatus(**fields)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, ErrorCode.NOT_READY),
        ({"reason": "loading weights"}, ErrorCode.NOT_READY),
        ({"reason": "rank 1 died", "lost": True}, ErrorCode.RANK_LOST),
    ],
)
def test_an_engine_that_is_not_ready_is_a_refusal_with_its_reason(fields: dict[str, Any], code: ErrorCode) -> None:
    link = Statement(**fields)
    refusal = Availability(link).refusal()
    assert refusal is not None
    assert refusal.code is code
    assert link.status.reason in refusal.message


def test_a_ready_engine_is_no_refusal_until_draining() -> None:
    availability = Availability(Statement(ready=True))
    assert availability.refusal() is None
    availability.drain()
    refusal = availability.refusal()
    assert refusal is not None
    assert refusal.code is ErrorCode.DRAINING


@pytest.mark.parametrize(("reason", "dead"), [("failed: 4 restarts", True), ("rank 1 failed: again", False)])
def test_only_a_reason_starting_with_failed_is_a_failure(reason: str, dead: bool) -> None:
    assert (Availability(Statement(reason=reason)).failure() is not None) == dead
