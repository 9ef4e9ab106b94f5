from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moe_forward.api.lease import Lease
from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.slab import Slab


class HoldingLink:
    """Says that ranks are done when the test says so."""

    def __init__(self) -> None:
        self.slab = Slab(1 << 20)
        self.waiting: list[tuple[int, Callable[[], None]]] = []

    def release_when_done(self, request: int, callback: Callable[[], None]) -> None:
        self.waiting.append((request, callback))


@pytest.fixture
def link() -> Any:
    return HoldingLink()


def test_release_gives_everything_back_at_once_when_the_engine_never_had_it(link: Any) -> None:
    lease = Lease(link)
    lease.take(1000, "the body")
    lease.take(2000, "the output")
    lease.release()
    lease.release()
    assert link.slab.taken_bytes == 0
    assert link.waiting == []


def test_release_waits_for_the_link_once_the_engine_has_it(link: Any) -> None:
    lease = Lease(link)
    lease.take(1000, "the body")
    lease.handed_over(7)
    lease.release()
    lease.release()
    assert link.slab.taken_bytes > 0
    assert {request for request, _ in link.waiting} == {7}
    for _, callback in link.waiting:
        callback()
    assert link.slab.taken_bytes == 0


def test_full_memory_is_a_queue_full(link: Any) -> None:
    other = link.slab.allocate(1 << 19)
    lease = Lease(link)
    with pytest.raises(ForwardError, match="no room for the body of 600000 bytes") as caught:
        lease.take(600_000, "the body")
    assert caught.value.code is ErrorCode.QUEUE_FULL
    link.slab.free(other)
    lease.take(600_000, "the body")


def test_a_request_that_can_never_fit_is_too_large_rather_than_retried_for_ever(link: Any) -> None:
    lease = Lease(link)
    lease.take(600_000, "the body")
    with pytest.raises(ForwardError, match="the output takes 600000 bytes") as caught:
        lease.take(600_000, "the output")
    assert caught.value.code is ErrorCode.TOO_LARGE
