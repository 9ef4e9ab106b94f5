"""What a client is told of a result that lacks what some experts would have added."""

from __future__ import annotations

import warnings
from typing import Any

import httpx
import numpy as np
import pytest

from moe_forward.client import MissingExperts


def lacking(reply: httpx.Response, **headers: str) -> httpx.Response:
    return httpx.Response(200, headers={**reply.headers, **headers}, content=reply.content)


DEGRADED = {"X-MoE-Degraded": "missing-experts=8 of 32"}


def test_a_result_without_some_experts_comes_with_a_warning(
    run: Any, script: Any, hidden: Any, output_reply: Any
) -> None:
    reply = lacking(output_reply, **DEGRADED, **{"X-MoE-Missing-Routes": "3"})
    with pytest.warns(MissingExperts, match="missing-experts=8 of 32") as found:
        output = run(script(reply), lambda client: client.forward(hidden, layer=1))
    assert len(found) == 1
    assert np.array_equal(output, hidden * 2)


def test_the_warning_is_shown_once(run: Any, script: Any, hidden: Any, output_reply: Any) -> None:
    replies = [lacking(output_reply, **DEGRADED, **{"X-MoE-Missing-Routes": str(n)}) for n in (3, 1, 7)]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for reply in replies:
            run(script(reply), lambda client: client.forward(hidden, layer=1))
    assert len(shown) == 1


def test_whoever_wants_whole_results_or_none_makes_it_an_error(
    run: Any, script: Any, hidden: Any, output_reply: Any
) -> None:
    reply = lacking(output_reply, **DEGRADED, **{"X-MoE-Missing-Routes": "3"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissingExperts)
        with pytest.raises(MissingExperts):
            run(script(reply), lambda client: client.forward(hidden, layer=1))


def test_a_result_that_lost_nothing_comes_without_a_warning(
    run: Any, script: Any, hidden: Any, output_reply: Any
) -> None:
    run(script(lacking(output_reply, **DEGRADED)), lambda client: client.forward(hidden, layer=1))
