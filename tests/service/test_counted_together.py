from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry, Counter

from moe_forward.counted_together import MOST_WAITING, CountedTogether
from moe_forward.series import Settling


def test_what_happened_is_counted_in_order_when_enough_of_it_waits() -> None:
    counted: list[list[int]] = []
    together = CountedTogether(counted.append)
    for number in range(2 * MOST_WAITING + 1):
        together.add(number)
    assert counted == [list(range(MOST_WAITING)), list(range(MOST_WAITING, 2 * MOST_WAITING))]
    together.settle()
    together.settle()
    assert counted[2:] == [[2 * MOST_WAITING]]


def test_who_reads_a_registry_sees_all_that_happened_before() -> None:
    registry = CollectorRegistry()
    together: CountedTogether[int] = CountedTogether(lambda numbers: series.inc(sum(numbers)))
    registry.register(Settling(together.settle))
    series = Counter("seen", "Numbers.", registry=registry)
    for number in range(1, 6):
        together.add(1)
        assert registry.get_sample_value("seen_total") == number


def test_nothing_is_lost_or_counted_twice_while_another_thread_reads() -> None:
    counted: list[int] = []
    together = CountedTogether(counted.extend)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            together.settle()

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(50_000):
        together.add(number)
    done.set()
    for reader in readers:
        reader.join()
    together.settle()
    assert counted == list(range(50_000))
