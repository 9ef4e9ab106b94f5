"""Counts of values in buckets whose width grows with the value: small, exact to 0.4 %, and mergeable.

A power of two is divided into 128 equal buckets, and values below 256 have one each; so a bucket's middle is within
1/256 of every value in it. Source: the idea of HdrHistogram (https://hdrhistogram.github.io/HdrHistogram).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SUB_BUCKET_BITS = 7


class Histogram:
    """Whole numbers of 0 and more, usually nanoseconds. Sums are exact, since Python's integers are."""

    __slots__ = ("count", "counts", "largest", "smallest", "squares", "total")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.count = self.total = self.squares = self.smallest = self.largest = 0

    def add(self, value: int) -> None:
        """Count one value; what is below 0 counts as 0."""
        value = max(value, 0)
        shift = max(0, value.bit_length() - SUB_BUCKET_BITS - 1)
        index = (shift << SUB_BUCKET_BITS) + (value >> shift)
        self.counts[index] = self.counts.get(index, 0) + 1
        self.smallest = value if not self.count or value < self.smallest else self.smallest
        self.largest = max(self.largest, value)
        self.count += 1
        self.total += value
        self.squares += value * value

    def merge(self, other: Histogram) -> None:
        """Count everything that `other` has counted."""
        if not other.count:
            return
        for index, times in other.counts.items():
            self.counts[index] = self.counts.get(index, 0) + times
        self.smallest = min(self.smallest, other.smallest) if self.count else other.smallest
        self.largest = max(self.largest, other.largest)
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def quantile(self, share: float) -> float:
        """Return the value that `share` of all values do not exceed (nearest rank). Raises: ValueError when empty."""
        if not self.count:
            raise ValueError("a quantile needs at least one value, the histogram is empty")
        rank = max(1, math.ceil(share * self.count))
        if rank == self.count:
            return float(self.largest)
        for index in sorted(self.counts):
            rank -= self.counts[index]
            if rank <= 0:
                break
        return min(max(_middle(index), self.smallest), self.largest)

    @property
    def mean(self) -> float:
        """Mean of the values themselves, not of their buckets; 0 when empty."""
        return self.total / self.count if self.count else 0.0

    @property
    def stdev(self) -> float:
        """Standard deviation of the values themselves; 0 when empty."""
        spread = self.squares * self.count - self.total * self.total
        return math.sqrt(spread) / self.count if self.count else 0.0

    def to_document(self) -> dict[str, Any]:
        """What `from_document` reads: sparse [bucket, count] pairs by ascending bucket, and the exact sums."""
        return {
            "unit": "nanoseconds",
            "sub_bucket_bits": SUB_BUCKET_BITS,
            "count": self.count,
            "total": self.total,
            "squares": self.squares,
            "smallest": self.smallest,
            "largest": self.largest,
            "buckets": [[index, self.counts[index]] for index in sorted(self.counts)],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Histogram:
        """Read what `to_document` wrote. Raises: ValueError for another division of buckets."""
        if document["sub_bucket_bits"] != SUB_BUCKET_BITS:
            raise ValueError(f"sub_bucket_bits must be {SUB_BUCKET_BITS}, got {document['sub_bucket_bits']}")
        made = cls()
        made.counts = {int(index): int(times) for index, times in document["buckets"]}
        made.count, made.total, made.squares = document["count"], document["total"], document["squares"]
        made.smallest, made.largest = document["smallest"], document["largest"]
        return made


def _middle(index: int) -> float:
    shift = max(0, (index >> SUB_BUCKET_BITS) - 1)
    first = (index - (shift << SUB_BUCKET_BITS)) << shift
    return first + ((1 << shift) - 1) / 2
