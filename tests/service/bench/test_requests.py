"""What is drawn and when it is meant to be sent, without sending it."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from moe_forward.bench.arrivals import arrivals
from moe_forward.bench.load import Load, points
from moe_forward.bench.mixes import draws, parse_layers, parse_mix


def take(iterator: Any, number: int) -> list[Any]:
    return list(itertools.islice(iterator, number))


def test_a_mix_is_drawn_in_its_proportions() -> None:
    mix = parse_mix("1:70,64:25,2048:5")
    sizes = Counter(draw.tokens for draw in take(draws(mix, (3,), "round-robin", 7), 20_000))
    assert sizes[1] / 20_000 == pytest.approx(0.70, abs=0.02)
    assert sizes[64] / 20_000 == pytest.approx(0.25, abs=0.02)
    assert sizes[2048] / 20_000 == pytest.approx(0.05, abs=0.01)


def test_draws_are_fixed_by_the_seed() -> None:
    mix = parse_mix("1:1,2:1")
    one = take(draws(mix, (3, 4), "random", 7), 100)
    assert one == take(draws(mix, (3, 4), "random", 7), 100)
    assert one != take(draws(mix, (3, 4), "random", 8), 100)


def test_layers_come_in_turn_or_at_random() -> None:
    mix = parse_mix("1:1")
    turn = [draw.layer for draw in take(draws(mix, (3, 5, 7), "round-robin", 0, first=1), 6)]
    assert turn == [5, 7, 3, 5, 7, 3]
    chance = Counter(draw.layer for draw in take(draws(mix, (3, 5, 7), "random", 0), 3000))
    assert all(times == pytest.approx(1000, abs=120) for times in chance.values())


@pytest.mark.parametrize("text", ["", "1", "1:0", "0:1", "1:x", "1:1,1:2", "1:nan", "1:-1", "1:1,"])
def test_a_mix_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"mix must be TOKENS:WEIGHT,\.\.\. with positive numbers"):
        parse_mix(text)


def test_layers_are_all_or_some_of_those_served() -> None:
    served = (3, 4, 5, 6)
    assert parse_layers("all", served, "tiny") == served
    assert parse_layers("6,3-4", served, "tiny") == (6, 3, 4)
    with pytest.raises(ValueError, match=r"layers must be some that tiny serves, \[3, 4, 5, 6\], got 9"):
        parse_layers("9", served, "tiny")
    with pytest.raises(ValueError, match="layers must be 'all' or like"):
        parse_layers("some", served, "tiny")


def test_poisson_arrivals_have_exponential_gaps_and_are_fixed_by_the_seed() -> None:
    moments = np.array(take(arrivals("poisson", 100.0, 5, 0, 1), 20_000))
    gaps = np.diff(moments)
    assert gaps.mean() == pytest.approx(0.01, rel=0.03)
    assert gaps.std() == pytest.approx(0.01, rel=0.05)
    assert (gaps < 0.01).mean() == pytest.approx(1 - np.exp(-1), abs=0.02)
    assert moments[:50].tolist() == take(arrivals("poisson", 100.0, 5, 0, 1), 50)
    assert moments[:50].tolist() != take(arrivals("poisson", 100.0, 6, 0, 1), 50)


def test_constant_arrivals_of_several_processes_interleave_to_one_row() -> None:
    parts = [take(arrivals("constant", 100.0, 0, part, 4), 25) for part in range(4)]
    assert sorted(itertools.chain(*parts)) == pytest.approx([number / 100 for number in range(100)])


def test_a_point_for_each_size_and_load() -> None:
    closed = points(Load(tokens=(1, 16), concurrency=(1, 8)))
    assert [point.name for point in closed] == [
        "tokens=1 concurrency=1",
        "tokens=1 concurrency=8",
        "tokens=16 concurrency=1",
        "tokens=16 concurrency=8",
    ]
    (mixed,) = points(Load(mix=parse_mix("64:1,1:3"), rate=(250.0,), max_inflight=9))
    assert (mixed.name, mixed.size, mixed.connections) == ("tokens=1:0.75,64:0.25 rate=250", "mix", 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ()}, r"tokens must be one or more positive numbers, got \[\]"),
        ({"tokens": (4, 0)}, r"tokens must be one or more positive numbers, got \[4, 0\]"),
        ({"concurrency": (0,)}, r"concurrency must be one or more positive numbers, got \[0\]"),
        ({"rate": (0.0,)}, "rate must be positive numbers of requests a second"),
        ({"rate": (float("nan"),)}, "rate must be positive"),
        ({"rate": (1.0,), "max_inflight": 0}, "max_inflight must be at least 1, got 0"),
        ({"requests": 0}, "requests must be at least 1, got 0"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"processes": 9}, r"processes must not be more than callers \(8\), got 9"),
        ({"seconds": 0}, "seconds must be positive"),
        ({"warmup_seconds": -1}, "warmup_seconds 0 or more"),
        ({"timeout_seconds": 0}, "timeout_seconds must be positive, got 0"),
        ({"slo_milliseconds": -1.0}, "slo_milliseconds must be positive"),
        ({"dtype": "int4"}, "dtype must be one of bf16, f16, f32, fp8, got 'int4'"),
        ({"routing": "hash"}, "routing must be one of server, topk, logits, got 'hash'"),
        ({"arrivals": "bursts"}, "arrivals must be one of poisson, constant, got 'bursts'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Load(**options)
