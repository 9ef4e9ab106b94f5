from __future__ import annotations

import asyncio

import pytest

from moe_forward.api.interruption import Interruption


class Late(Exception):
    """A reason."""


async def test_a_wait_that_is_not_interrupted_returns_its_value() -> None:
    interruption = Interruption()
    assert await interruption.wait(asyncio.sleep(0, "value")) == "value"
    interruption.because(Late())
    await asyncio.sleep(0)  # the task goes on: its wait is over


async def test_a_wait_ends_by_the_first_reason_and_cancels_what_it_waited_for() -> None:
    interruption = Interruption()
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(interruption.because, Late("first"))
    asyncio.get_running_loop().call_soon(interruption.because, Late("second"))
    with pytest.raises(Late, match="first"):
        await interruption.wait(future)
    assert future.cancelled()
    await asyncio.sleep(0)  # and the task is not cancelled any more
    await asyncio.wait_for(asyncio.sleep(0), 5.0)


async def test_a_task_that_somebody_else_cancels_is_cancelled() -> None:
    async def wait() -> None:
        await Interruption().wait(asyncio.Event().wait())

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_reason_counts_even_where_nothing_was_waited_for() -> None:
    async def at_once() -> str:
        return "value"

    interruption = Interruption()
    interruption.because(Late())
    with pytest.raises(Late):
        await interruption.wait(at_once())
    await asyncio.sleep(0)
