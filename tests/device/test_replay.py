"""The replay buffer: bounded, balanced, fair to old samples, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ll.quantize import LatentQuantizer
from edge_ll_device.replay import BufferState, ReplayBuffer

QUANTIZER = LatentQuantizer(np.array([1.0], np.float32), np.array([0], np.int8))
CLASSES = 5

streams = st.lists(st.integers(0, CLASSES - 1), max_size=120)


def _buffer(entries: int, *, seed: int = 0, classes: int = CLASSES) -> ReplayBuffer:
    return ReplayBuffer(
        entries, (1,), classes=classes, quantizer=QUANTIZER, rng=np.random.default_rng(seed)
    )


def _fill(buffer: ReplayBuffer, labels: list[int]) -> ReplayBuffer:
    """Each latent is its own label, so content and labels can be held against each other."""
    array = np.array(labels, np.int64)
    buffer.add(array[:, None].astype(np.float32), array)
    return buffer


def _consistent(buffer: ReplayBuffer, entries: int) -> None:
    state = buffer.state()
    assert len(buffer) == len(state.labels) == sum(buffer.class_counts) <= entries
    assert buffer.class_counts == np.bincount(state.labels, minlength=CLASSES).tolist()
    assert state.codes[:, 0].tolist() == state.labels.tolist()
    slots = sorted(slot for own in buffer._slots for slot in own)
    assert slots == list(range(len(buffer)))
    for label, own in enumerate(buffer._slots):
        assert all(state.labels[slot] == label for slot in own)


@given(st.integers(0, 12), streams, st.integers(1, 7), st.integers(0, 3))
@settings(deadline=None)
def test_never_above_capacity_and_always_consistent(entries, labels, step, seed):
    buffer = _buffer(entries, seed=seed)
    for at in range(0, len(labels), step):
        _fill(buffer, labels[at : at + step])
        _consistent(buffer, entries)
    assert len(buffer) == min(entries, len(labels))
    assert buffer.state().seen.tolist() == np.bincount(labels, minlength=CLASSES).tolist()


@given(st.integers(1, 23), st.permutations(range(CLASSES)), st.integers(0, 3))
@settings(deadline=None)
def test_balanced_within_one_once_every_class_has_enough(entries, order, seed):
    buffer = _buffer(entries, seed=seed)
    for label in order:  # the worst order: one class after the other
        _fill(buffer, [label] * (entries + 1))
    counts = buffer.class_counts
    assert max(counts) - min(counts) <= 1
    assert len(buffer) == entries


@given(st.integers(1, 12), streams)
@settings(deadline=None)
def test_the_same_seed_keeps_and_draws_the_same(entries, labels):
    one, two = (_fill(_buffer(entries, seed=7), labels) for _ in range(2))
    for a, b in zip((*one.state(), *one.sample(9)), (*two.state(), *two.sample(9)), strict=True):
        assert np.array_equal(a, b)


def test_another_seed_keeps_others():
    def kept(seed):
        buffer = _buffer(20, seed=seed, classes=1)
        for i in range(100):
            buffer.add(np.full((1, 1), i, np.float32), np.zeros(1, np.int64))
        return sorted(buffer.state().codes[:, 0].tolist())

    assert kept(0) != kept(1)


def test_a_buffer_of_size_zero_keeps_nothing_and_gives_nothing():
    buffer = _fill(_buffer(0), [0, 1, 2, 3, 4])
    latents, labels = buffer.sample(8)
    assert len(buffer) == buffer.size_bytes == 0
    assert (latents.shape, latents.dtype) == ((0, 1), np.float32)
    assert (labels.shape, labels.dtype) == ((0,), np.int64)


def test_an_empty_buffer_and_an_empty_add():
    buffer = _buffer(4)
    buffer.add(np.zeros((0, 1), np.float32), np.zeros(0, np.int64))
    assert len(buffer) == 0
    assert [len(part) for part in buffer.sample(3)] == [0, 0]


def test_fewer_entries_than_classes():
    buffer = _fill(_buffer(3), [0, 1, 2, 3, 4] * 40)
    _consistent(buffer, 3)
    assert len(buffer) == 3
    assert max(buffer.class_counts) == 1


def test_a_rare_class_keeps_all_it_ever_had():
    rng = np.random.default_rng(0)
    labels = rng.permutation([0] * 500 + [1] * 3).tolist()
    assert _fill(_buffer(20), labels).class_counts[:2] == [17, 3]


def test_samples_come_from_the_buffer_uniformly_with_replacement():
    buffer = _fill(_buffer(4), [0, 1, 2, 3])
    latents, labels = buffer.sample(4000)
    assert latents[:, 0].tolist() == labels.tolist()
    assert np.abs(np.bincount(labels, minlength=4) - 1000).max() < 150
    assert len(_fill(_buffer(4), [0]).sample(9)[1]) == 9


@pytest.mark.parametrize(("entries", "classes"), [(12, 1), (12, 2), (13, 2), (10, 4)])
def test_old_samples_are_kept_as_well_as_new_ones(entries, classes):
    """Within its class every sample seen has the same chance, also where sizes differ by one."""
    length, ages = 100 * classes, []
    for seed in range(30):
        buffer = _buffer(entries, seed=seed, classes=classes)
        for i in range(length):
            code = np.full((1, 1), i // classes, np.float32)
            buffer.add(code, np.array([i % classes]))
        ages += buffer.state().codes[:, 0].tolist()
    # Uniform on 0..99: mean 49.5, standard error 28.9 / sqrt(30 * entries) < 1.7.
    assert 42 < np.mean(ages) < 57


@given(st.integers(0, 12), streams, streams)
@settings(deadline=None)
def test_restore_round_trip(entries, before, after):
    buffer = _fill(_buffer(entries), before)
    state = buffer.state()
    other = _buffer(entries, seed=5)
    other.restore(state)
    for a, b in zip(other.state(), state, strict=True):
        assert np.array_equal(a, b)
    _consistent(other, entries)
    _fill(other, after)
    _consistent(other, entries)


def test_a_state_is_a_copy():
    buffer = _fill(_buffer(4), [0, 1, 2, 3])
    state = buffer.state()
    for part in state:
        part[:] = 4
    assert buffer.class_counts == [1, 1, 1, 1, 0]
    assert buffer.state().codes[:, 0].tolist() == [0, 1, 2, 3]
    kept = buffer.state()
    buffer.restore(kept)
    _fill(buffer, [4] * 5)
    assert kept.labels.tolist() == [0, 1, 2, 3]
    assert kept.seen.tolist() == [1, 1, 1, 1, 0]


def test_restore_into_a_larger_buffer_leaves_room():
    state = _fill(_buffer(4), [0, 1, 2, 3]).state()
    larger = _buffer(6)
    larger.restore(state)
    _fill(larger, [4, 4])
    assert larger.class_counts == [1, 1, 1, 1, 2]


def test_restore_into_a_smaller_buffer_keeps_every_class():
    state = _fill(_buffer(50), [label for label in range(CLASSES) for _ in range(10)]).state()
    smaller = _buffer(10)
    smaller.restore(state)
    _consistent(smaller, 10)
    assert smaller.class_counts == [2] * CLASSES


def test_restore_into_a_buffer_for_more_classes():
    state = _fill(_buffer(4, classes=2), [0, 0, 1, 1]).state()
    wider = _buffer(4, classes=5)
    wider.restore(state)
    _fill(wider, [4, 4])
    assert wider.class_counts[4] >= 1


def test_restore_of_classes_past_the_room_leaves_them_out():
    narrow = _buffer(4, classes=2)
    narrow.restore(_fill(_buffer(4), [0, 1, 4, 4]).state())
    assert narrow.sample(50)[1].max() <= 1
    assert len(narrow) == sum(narrow.class_counts)


def test_size_bytes_counts_latents_and_labels():
    assert _buffer(10).size_bytes == 10 * (1 + 8)


def test_codes_are_int8_of_the_quantizer():
    quantizer = LatentQuantizer(np.array([0.5, 0.25], np.float32), np.array([0, 10], np.int8))
    buffer = ReplayBuffer(2, (2, 3), classes=1, quantizer=quantizer, rng=np.random.default_rng(0))
    latents = np.array([[[0.5, -1, 100], [0.25, 0, -0.5]]], np.float32)
    buffer.add(latents, np.zeros(1, np.int64))
    assert buffer.state().codes.tolist() == [[[1, -2, 127], [11, 10, 8]]]
    decoded = buffer.sample(1)[0]
    assert decoded.tolist() == [[[0.5, -1.0, 63.5], [0.25, 0.0, -0.5]]]
    assert isinstance(buffer.state(), BufferState)
