"""Histograms of durations."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cenote.core.histogram import BOUNDS_S, BUCKETS, FIRST_S, Histogram


def bucket_of(duration_s: float) -> int:
    histogram = Histogram()
    histogram.observe(duration_s)
    assert sum(histogram.buckets) == histogram.count() == 1
    return histogram.buckets.index(1)


@given(st.floats(0, 1e6))
def test_a_duration_is_counted_below_its_bucket_s_bound_and_not_below_the_one_before(duration_s: float) -> None:
    at = bucket_of(duration_s)
    assert at == BUCKETS - 1 or duration_s < BOUNDS_S[at]
    assert at == 0 or duration_s >= BOUNDS_S[at - 1]


def test_a_duration_of_exactly_a_bound_belongs_to_the_next_bucket() -> None:
    assert [bucket_of(bound) for bound in BOUNDS_S] == list(range(1, BUCKETS))


def test_bounds_double_from_64_microseconds_to_some_minutes() -> None:
    assert BOUNDS_S[0] == FIRST_S == 64e-6
    assert all(high == 2 * low for low, high in pairwise(BOUNDS_S))
    assert 240 < BOUNDS_S[-1] < 300


def test_a_negative_duration_counts_as_zero_and_takes_nothing_off_the_sum() -> None:
    histogram = Histogram()
    histogram.observe(1.0)
    histogram.observe(-5.0)
    assert (histogram.sum_s, histogram.count(), histogram.buckets[0]) == (1.0, 2, 1)


def test_a_quantile_is_an_upper_bound_of_the_durations_it_covers() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.99) == 0.0
    for _ in range(99):
        histogram.observe(0.001)
    histogram.observe(10_000.0)
    assert 0.001 <= histogram.quantile(0.5) <= 0.002048
    assert histogram.quantile(0.99) == histogram.quantile(0.5)
    assert histogram.quantile(1.0) == float("inf")
