"""Buckets against numpy on the values themselves."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from moe_forward.bench.histogram import Histogram

QUANTILES = (0.0, 0.01, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


def counted(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    for value in values.tolist():
        histogram.add(value)
    return histogram


def samples(seed: int, scale: float = 1e6, number: int = 5000) -> np.ndarray:
    return (np.random.default_rng(seed).lognormal(sigma=2.0, size=number) * scale).astype(np.int64)


@pytest.mark.parametrize("scale", [1.0, 300.0, 1e6, 1e12])
def test_quantiles_are_within_half_a_percent_of_numpys(scale: float) -> None:
    values = samples(1, scale)
    histogram = counted(values)
    for share in QUANTILES:
        exact = float(np.quantile(values, share, method="inverted_cdf"))
        assert histogram.quantile(share) == pytest.approx(exact, rel=0.005, abs=0.5)
    assert histogram.mean == pytest.approx(values.mean())
    assert histogram.stdev == pytest.approx(values.std())


def test_every_value_lies_in_a_bucket_whose_middle_is_near() -> None:
    for value in [*range(2000), *(2**power + offset for power in range(11, 60) for offset in (-1, 0, 1))]:
        histogram = Histogram()
        histogram.add(value)
        (index,) = histogram.counts
        histogram.smallest, histogram.largest = 0, 1 << 62  # so that the bucket alone answers
        histogram.count = 2
        assert histogram.quantile(0.5) == pytest.approx(value, rel=1 / 256)
        assert index >= 0


def test_merging_is_counting_everything_in_one() -> None:
    first, second = samples(1), samples(2, 1e3)
    merged = counted(first)
    merged.merge(counted(second))
    merged.merge(Histogram())
    other_way = Histogram()
    other_way.merge(counted(second))
    other_way.merge(counted(first))
    whole = counted(np.concatenate([first, second])).to_document()
    assert merged.to_document() == other_way.to_document() == whole


def test_a_document_brings_everything_back_and_is_small() -> None:
    histogram = counted(samples(3))
    text = json.dumps(histogram.to_document())
    again = Histogram.from_document(json.loads(text))
    assert again.to_document() == histogram.to_document()
    assert again.quantile(0.99) == histogram.quantile(0.99)
    assert len(text) < 5000 * 5


def test_another_division_of_buckets_is_refused() -> None:
    with pytest.raises(ValueError, match="sub_bucket_bits must be 7, got 5"):
        Histogram.from_document(Histogram().to_document() | {"sub_bucket_bits": 5})


def test_an_empty_histogram_has_no_quantile() -> None:
    empty = Histogram()
    assert (empty.mean, empty.stdev) == (0.0, 0.0)
    with pytest.raises(ValueError, match="at least one value"):
        empty.quantile(0.5)


def test_equal_values_have_no_spread_and_negative_ones_count_as_zero() -> None:
    histogram = counted(np.full(1000, 123_456_789))
    assert histogram.stdev == 0.0
    assert histogram.quantile(0.5) == 123_456_789  # clipped to the smallest and largest that came
    histogram.add(-5)
    assert histogram.smallest == 0
    assert math.isfinite(histogram.stdev)
