from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_ll.quantize import LatentQuantizer

values = st.floats(-1e4, 1e4, width=32)
latents = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=5),
    elements=values,
)
headrooms = st.sampled_from([0.0, 0.5, 2.0])


def channels_last(array):
    """[N, C, ...] as [samples, C]."""
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])


@given(latents, headrooms)
@settings(deadline=None)
def test_inside_the_range_the_error_is_at_most_half_a_step(x, headroom):
    quantizer = LatentQuantizer.fit(x, headroom=headroom)
    back = quantizer.decode(quantizer.encode(x))
    assert back.shape == x.shape
    assert back.dtype == np.float32
    error = np.abs(channels_last(back) - channels_last(x))
    rounding = 4e-7 * 256 * quantizer.scale
    # Without headroom, rounding the zero can cost another half step at the very end.
    assert (error <= quantizer.scale * (0.5 if headroom else 1.0) + rounding).all()


@given(latents, latents)
@settings(deadline=None)
def test_codes_of_any_data_survive_a_round_trip(x, other):
    quantizer = LatentQuantizer.fit(x)
    other = np.resize(other, (3, *x.shape[1:]))
    codes = quantizer.encode(other)
    assert codes.dtype == np.int8
    assert (quantizer.encode(quantizer.decode(codes)) == codes).all()


@given(latents)
@settings(deadline=None)
def test_zero_is_exactly_zero(x):
    quantizer = LatentQuantizer.fit(x)
    codes = quantizer.encode(np.zeros_like(x))
    assert (channels_last(codes) == quantizer.zero).all()
    assert (quantizer.decode(codes) == 0).all()


@given(latents)
@settings(deadline=None)
def test_steps_are_positive_and_finite(x):
    quantizer = LatentQuantizer.fit(x)
    assert quantizer.scale.shape == quantizer.zero.shape == (x.shape[1],)
    assert (quantizer.scale > 0).all()
    assert np.isfinite(quantizer.scale).all()


def test_outside_the_range_values_are_clipped_to_its_ends():
    quantizer = LatentQuantizer(np.array([0.5], np.float32), np.array([-28], np.int8))
    x = np.array([[-1e9], [-50.5], [-50.0], [0.0], [77.5], [78.0], [1e9]], np.float32)
    assert quantizer.encode(x)[:, 0].tolist() == [-128, -128, -128, -28, 127, 127, 127]
    ends = quantizer.decode(quantizer.encode(x))[[0, -1], 0]
    assert ends.tolist() == [-50.0, 77.5]


def test_each_channel_has_its_own_step():
    x = np.stack([np.linspace(-1, 1, 50), np.linspace(-100, 100, 50)], axis=1).astype(np.float32)
    scale = LatentQuantizer.fit(x, headroom=0.0).scale
    # The quiet channel is lifted to a tenth of the widest range.
    assert scale == pytest.approx([20 / 255, 200 / 255], rel=1e-5)


def test_channels_are_the_first_axis_of_a_latent():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3, 7)).astype(np.float32) * np.array([1, 5, 2], np.float32)[:, None]
    quantizer = LatentQuantizer.fit(x)
    together = quantizer.decode(quantizer.encode(x))
    for channel in range(3):
        alone = LatentQuantizer(*(part[channel : channel + 1] for part in quantizer))
        part = x[:, channel : channel + 1]
        assert (alone.decode(alone.encode(part)) == together[:, channel : channel + 1]).all()


def test_headroom_widens_the_range():
    x = np.array([[0.0], [10.0]], np.float32)
    tight, wide = (LatentQuantizer.fit(x, headroom=h) for h in (0.0, 0.5))
    beyond = np.array([[14.9]], np.float32)
    assert tight.decode(tight.encode(beyond)).item() == pytest.approx(10.0)
    assert wide.decode(wide.encode(beyond)).item() == pytest.approx(14.9, abs=0.05)


def test_a_positive_channel_spends_no_code_on_negative_values():
    quantizer = LatentQuantizer.fit(np.array([[3.0], [5.0]], np.float32))
    assert quantizer.zero.tolist() == [-128]
