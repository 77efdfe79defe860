import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sqlalchemy", reason="the fleet extra is not installed")

from edge_ll.errors import DataError
from edge_ll.fleet.merge import TailUpdate, check_updates, federated_average, gate
from edge_ll.metrics import Counts

pytestmark = pytest.mark.fleet


def update(device, values, samples=1):
    return TailUpdate(device, np.asarray(values, np.float32), samples)


def test_the_mean_is_weighted_by_samples():
    merged = federated_average([update("a", [0.0, 4.0], 1), update("b", [4.0, 0.0], 3)])
    assert merged.dtype == np.float32
    assert merged.tolist() == [3.0, 1.0]


values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3)


@given(values, st.lists(st.integers(1, 10**6), min_size=1, max_size=6))
def test_equal_updates_average_to_themselves(theta, samples):
    updates = [update(str(i), theta, n) for i, n in enumerate(samples)]
    expected = np.asarray(theta, np.float32)
    np.testing.assert_allclose(federated_average(updates), expected, rtol=1e-6, atol=1e-12)


@given(st.lists(st.tuples(values, st.integers(1, 1000)), min_size=1, max_size=6), st.randoms())
def test_the_order_does_not_matter(rows, random):
    updates = [update(str(i), theta, n) for i, (theta, n) in enumerate(rows)]
    shuffled = list(updates)
    random.shuffle(shuffled)
    np.testing.assert_allclose(
        federated_average(updates), federated_average(shuffled), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ([], "at least one"),
        ([update("a", [math.nan])], "not finite"),
        ([update("a", [math.inf])], "not finite"),
        ([update("a", [1.0]), update("b", [1.0, 2.0])], "b: expected float32"),
        ([update("a", [1.0], 0)], "no sample"),
    ],
)
def test_the_mean_of_nonsense_is_refused(updates, expected):
    with pytest.raises(DataError, match=expected):
        federated_average(updates)


def test_malformed_updates_are_left_out_with_the_reason():
    base = np.zeros(2, np.float32)
    wide = TailUpdate("wide", np.ones(2), 1)
    checked = check_updates(
        base,
        [update("good", [1, 0]), update("nan", [1, math.nan]), update("long", [1, 2, 3]), wide],
        norm_factor=3.0,
    )
    assert [item.device for item in checked.kept] == ["good"]
    assert checked.left_out == {
        "nan": "1 of 2 values are not finite",
        "long": "expected float32 [2], got float32 [3]",
        "wide": "expected float32 [2], got float64 [2]",
    }


def test_an_outlier_is_left_out():
    base = np.ones(1, np.float32)
    near = [update(name, [2.0]) for name in "abc"]
    checked = check_updates(base, [*near, update("far", [5.0])], norm_factor=3.0)
    assert list(checked.left_out) == ["far"]
    assert "4.0 times the median 1; at most 3 times" in checked.left_out["far"]
    assert not check_updates(base, [*near, update("edge", [4.0])], norm_factor=3.0).left_out


def test_a_median_of_zero_is_no_scale():
    base = np.ones(1, np.float32)
    idle = [update(name, [1.0]) for name in "abc"]
    assert not check_updates(base, [*idle, update("busy", [2.0])], norm_factor=3.0).left_out


BEFORE = {"old": Counts(19, 20), "new": Counts(0, 20)}


def decide(after, **options):
    keep = options.get("keep", ["old"])
    return gate(BEFORE, after, max_forgetting=0.05, groups_to_keep=keep)


def test_a_merge_that_learns_and_keeps_is_accepted():
    assert decide({"old": Counts(18, 20), "new": Counts(15, 20)}).accepted  # exactly 5 points
    assert decide({"old": Counts(19, 20), "new": Counts(1, 20)}).reasons == ()


def test_a_merge_that_forgets_is_refused_with_numbers():
    verdict = decide({"old": Counts(16, 20), "new": Counts(20, 20)})
    assert not verdict.accepted
    (reason,) = verdict.reasons
    assert reason == (
        "group 'old' falls from 95.0 % (19 of 20) to 80.0 % (16 of 20), by 15.0 points; "
        "at most 5.0 are allowed."
    )


def test_a_merge_that_does_not_improve_is_refused():
    verdict = decide(BEFORE)
    (reason,) = verdict.reasons
    assert reason == (
        "accuracy on the whole hold-out does not rise: 47.5 % (19 of 40) before, "
        "47.5 % (19 of 40) after."
    )


def test_what_must_be_kept_must_be_measured():
    verdict = decide({"new": Counts(20, 20)}, keep=["old", "absent"])
    assert len(verdict.reasons) == 2
    assert "no sample" in verdict.reasons[0]


def test_an_empty_holdout_shows_nothing():
    verdict = gate({}, {}, max_forgetting=0.05, groups_to_keep=[])
    assert verdict.reasons == ("the hold-out is empty, so nothing shows an improvement.",)
