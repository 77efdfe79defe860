from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_ll import metrics
from edge_ll.metrics import Counts

counts = st.integers(0, 10**6).flatmap(lambda n: st.builds(Counts, st.integers(0, n), st.just(n)))


def matrix(*rows):
    """Accuracies in per cent as counts of 100."""
    return [[Counts(value, 100) for value in row] for row in rows]


# Three experiences; by hand from the definitions:
# ACC is the mean of 60, 70, 90;
# forgetting the mean of 85 - 60 (the best of 80 and 85) and 75 - 70;
# BWT the mean of 60 - 80 and 70 - 75;
# anytime accuracy the mean of the rows' means over what was taught: 80, 80 and 73.3.
THREE = matrix((80, 0, 0), (85, 75, 0), (60, 70, 90))
# Later learning helped: forgetting is negative, transfer positive.
HELPED = matrix((50, 10), (70, 90))
CASES = [
    (THREE, 220 / 3, 15.0, -12.5, (80 + 80 + 220 / 3) / 3),
    (HELPED, 80.0, -20.0, 20.0, (50 + 80) / 2),
    (matrix((40,)), 40.0, 0.0, 0.0, 40.0),
    (matrix((90, 0), (90, 60)), 75.0, 0.0, 0.0, 82.5),
    # The best earlier accuracy, not the first and not the latest.
    (matrix((50, 0, 0, 0), (90, 80, 0, 0), (60, 80, 80, 0), (40, 80, 80, 80)),
     70.0, 50 / 3, -10 / 3, (50 + 85 + 220 / 3 + 70) / 4),
]  # fmt: skip


@pytest.mark.parametrize(("given_matrix", "acc", "forgot", "bwt", "anytime"), CASES)
def test_the_definitions_by_hand(given_matrix, acc, forgot, bwt, anytime):
    assert metrics.average_accuracy(given_matrix) == pytest.approx(acc / 100)
    assert metrics.forgetting(given_matrix) == pytest.approx(forgot / 100)
    assert metrics.backward_transfer(given_matrix) == pytest.approx(bwt / 100)
    assert metrics.average_anytime_accuracy(given_matrix) == pytest.approx(anytime / 100)


@given(st.integers(1, 5).flatmap(lambda k: st.lists(
    st.lists(st.integers(0, 100), min_size=k, max_size=k), min_size=k, max_size=k)))  # fmt: skip
def test_forgetting_bounds_backward_transfer(rows):
    """The best earlier accuracy is at least the one just after learning."""
    measured = matrix(*rows)
    assert metrics.forgetting(measured) >= -metrics.backward_transfer(measured) - 1e-12


def test_only_taught_groups_count_towards_anytime_accuracy():
    low, high = matrix((80, 0), (60, 40)), matrix((80, 99), (60, 40))
    assert metrics.average_anytime_accuracy(low) == metrics.average_anytime_accuracy(high)


def test_groups_are_weighted_alike_however_many_samples_they_have():
    assert metrics.average_accuracy([[Counts(1, 1), Counts(0, 999)]]) == 0.5


def test_an_empty_group_makes_the_mean_unknown():
    holed = [[Counts(1, 1), Counts(0, 0)], [Counts(1, 1), Counts(0, 0)]]
    assert math.isnan(metrics.average_accuracy(holed))
    assert math.isnan(metrics.average_anytime_accuracy(holed))
    assert metrics.forgetting(holed) == 0.0


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3; and textbook values for n = 10.
WILSON = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (0, 10, 0.0, 0.2775),
    (5, 10, 0.2366, 0.7634),
    (10, 10, 0.7225, 1.0),
    (1, 1, 0.2065, 1.0),
]


@pytest.mark.parametrize(("correct", "n", "low", "high"), WILSON)
def test_wilson_intervals_of_the_literature(correct, n, low, high):
    assert metrics.wilson_interval(Counts(correct, n)) == pytest.approx((low, high), abs=5e-5)


def test_nothing_counted_is_nothing_known():
    assert metrics.wilson_interval(Counts(0, 0)) == (0.0, 1.0)
    assert math.isnan(Counts(0, 0).accuracy)


@given(counts, st.floats(0.1, 5))
def test_the_interval_holds_the_rate_and_is_symmetric(measured, z):
    low, high = metrics.wilson_interval(measured, z=z)
    assert 0 <= low <= high <= 1
    if measured.n:
        assert low - 1e-12 <= measured.accuracy <= high + 1e-12
    mirrored = Counts(measured.n - measured.correct, measured.n)
    assert metrics.wilson_interval(mirrored, z=z) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(counts, st.floats(0.1, 2), st.floats(0.1, 2))
def test_more_confidence_is_a_wider_interval(measured, z, more):
    narrow = metrics.wilson_interval(measured, z=z)
    wide = metrics.wilson_interval(measured, z=z + more)
    assert wide[0] <= narrow[0] + 1e-12
    assert wide[1] >= narrow[1] - 1e-12


@given(st.lists(counts), st.lists(counts))
def test_reports_merge_by_addition_in_any_order(here, there):
    merged = metrics.total(here) + metrics.total(there)
    assert merged == metrics.total([*there, *here])
    assert merged.n == sum(item.n for item in [*here, *there])
    assert merged + Counts(0, 0) == merged


@given(st.lists(counts, min_size=1))
def test_merged_counts_give_the_rate_of_the_pooled_samples(parts):
    pooled = metrics.total(parts)
    if pooled.n:
        weighted = sum(part.accuracy * part.n for part in parts if part.n) / pooled.n
        assert pooled.accuracy == pytest.approx(weighted)


@pytest.mark.parametrize(("correct", "n"), [(2, 1), (-1, 1), (0, -1), (-2, -1), (1, 0)])
def test_counts_that_cannot_be(correct, n):
    with pytest.raises(ValueError, match="expected 0 <= correct <= n"):
        Counts(correct, n)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert([correct, n], Counts)


def test_counts_travel_as_a_pair():
    assert msgspec.json.encode(Counts(3, 4)) == b"[3,4]"
    assert msgspec.json.decode(msgspec.json.encode(Counts(3, 4)), type=Counts) == Counts(3, 4)
