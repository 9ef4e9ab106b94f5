"""The ledger, and the sums behind the tables, without a service."""

from __future__ import annotations

import json

import pytest

from .connection import Reply
from .faults import FAULTS
from .ledger import Ledger, Outcome, judge
from .program import shared
from .report import table
from .samples import Sample, growths, short_name
from .soak import judge_growth

HEADER = b'{"output":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'
TENSOR = bytes([1, 2, 3, 4])


def answer(tensor: bytes) -> Reply:
    return Reply(200, {}, len(HEADER).to_bytes(8, "little") + HEADER + tensor)


def refusal(status: int, code: str, **headers: str) -> Reply:
    body = json.dumps({"error": "why", "code": code, "request_id": "1"}).encode()
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (answer(TENSOR), Outcome.RIGHT),
        (answer(bytes([1, 2, 3, 5])), Outcome.WRONG),
        (answer(TENSOR[:3]), Outcome.WRONG),
        (Reply(200, {}, b""), Outcome.WRONG),
        (refusal(503, "rank_lost", retry_after="2"), Outcome.REFUSED),
        (refusal(429, "queue_full", retry_after="1"), Outcome.REFUSED),
        (refusal(504, "deadline_exceeded"), Outcome.REFUSED),
        (refusal(503, "rank_lost"), Outcome.BROKEN),
        (refusal(503, "rank_lost", retry_after="0"), Outcome.BROKEN),
        (refusal(500, "internal"), Outcome.BROKEN),
        (refusal(400, "malformed_body"), Outcome.BROKEN),
        (Reply(503, {"retry-after": "1"}, b"<html>"), Outcome.BROKEN),
    ],
)
def test_a_reply_is_right_by_its_bits_and_refused_only_as_promised(reply: Reply, outcome: Outcome) -> None:
    assert judge(reply, TENSOR)[0] is outcome


def test_a_request_ends_once() -> None:
    ledger = Ledger()
    number = ledger.send("one", 1.0)
    assert ledger.open == 1
    assert ledger.end(number, 3.5, Outcome.RIGHT, answer(TENSOR)).seconds == 2.5
    with pytest.raises(KeyError):
        ledger.end(number, 4.0, Outcome.RIGHT)
    assert (ledger.open, ledger.counts()["right"]) == (0, 1)


def test_what_never_ended_is_lost() -> None:
    ledger = Ledger()
    ledger.send("one", 1.0)
    ledger.forget(ledger.send("who hung up", 1.0))
    ledger.end(ledger.send("two", 1.0), 2.0, Outcome.REFUSED, refusal(429, "queue_full", retry_after="1"))
    ledger.give_up(9.0)
    assert {name: count for name, count in ledger.counts().items() if count} == {"lost": 1, "refused": 1}
    assert ledger.codes() == {"429 queue_full": 1}
    assert ledger.worst(Outcome.LOST) == ["one: lost after 8.000 s: 0  its client never heard of it"]


def test_a_row_adds_up_the_trials_of_a_fault() -> None:
    counts = dict.fromkeys((outcome.value for outcome in Outcome), 0)
    trials = [
        {
            "fault": "k",
            "about": "kill",
            "detected": 0.1 * n,
            "recovered": 2.0 * n,
            "counts": {**counts, "right": 5, "refused": n},
        }
        for n in (1, 2, 3)
    ]
    calm = {
        "fault": "c",
        "about": "calm",
        "detected": None,
        "recovered": None,
        "counts": {**counts, "right": 7, "broken": 1},
    }
    rows = table([{"trials": trials[:2]}, {"trials": [trials[2], calm]}]).splitlines()[2:]
    assert rows == [
        "| kill | 3 | 0.20 s / 0.30 s | 4.00 s / 6.00 s | 15 | 6 | 0 | 0 | 0 | 0 | k |",
        "| calm | 1 | - | - | 7 | 0 | 0 | 0 | 1 | 0 | c |",
    ]


def test_growth_of_the_second_half_is_a_leak() -> None:
    def samples(process: str, leak_bytes: int) -> list[Sample]:
        sizes = [10 << 20, 50 << 20, *((60 << 20) + n * leak_bytes for n in range(6))]
        return [Sample(10.0 * n, process, size, size, 20 + (n if leak_bytes else 0), 5) for n, size in enumerate(sizes)]

    steady, leaky = growths([*samples("steady", 0), *samples("leaky", 2 << 20)])
    assert (steady.megabytes_per_hour, steady.files, steady.first_megabytes) == (0.0, 0, 10.0)
    assert leaky.megabytes_per_hour == pytest.approx(720.0)
    assert judge_growth(steady, 70.0) == []
    assert judge_growth(leaky, 70.0) == ["leaky grows by 720 MiB/h"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("ray::RankProcess.run", "ray::RankProcess.run"),
        ("/x/bin/python -u /x/ray/autoscaler/_private/monitor.py --logs", "monitor.py"),
        ("/x/core/src/ray/raylet/raylet --raylet_socket=a", "raylet"),
        ("", "?"),
    ],
)
def test_a_process_has_a_name_that_tells_what_it_is(line: str, name: str) -> None:
    assert short_name(line) == name


def test_every_fault_says_what_it_is_and_what_follows() -> None:
    assert len({fault.about for fault in FAULTS.values()}) == len(FAULTS)
    assert {fault.after for fault in FAULTS.values()} == {"lost", "cut", "unharmed", "either", "ended"}


def test_faults_share_a_service_where_it_is_started_alike() -> None:
    groups = shared(list(FAULTS.values()))
    assert sorted(fault.name for group in groups for fault in group) == sorted(FAULTS)
    for group in groups:
        alike = [
            fault.name for fault in FAULTS.values() if (fault.start, fault.config) == (group[0].start, group[0].config)
        ]
        assert [fault.name for fault in group] == alike
