from __future__ import annotations

from pathlib import Path

import pytest

from edge_ll.config import load
from edge_ll_export.recipe import AudioAugment, ImageAugment, Recipe, WindowAugment

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

RECIPES = Path(__file__).parents[2] / "export" / "recipes"


def _rng(seed=0):
    return torch.Generator().manual_seed(seed)


def _images():
    return torch.randint(0, 17, (6, 1, 8, 8), generator=_rng(5)).to(torch.uint8)


def _clips():
    return torch.randint(-9000, 9000, (6, 8000), generator=_rng(5)).to(torch.int16)


def _colours():
    return torch.randint(0, 256, (6, 3, 32, 32), generator=_rng(5)).to(torch.uint8)


@pytest.mark.parametrize(
    ("name", "make"), [("digits", _images), ("fsdd", _clips), ("cifar10", _colours)]
)
def test_the_generator_decides_and_shape_and_type_stay(name, make):
    from edge_ll_export.augment import build_augmentation

    augment = build_augmentation(load(RECIPES / f"{name}.toml", Recipe))
    x = make()
    before, state = x.clone(), torch.get_rng_state()
    first, again, other = augment(x, _rng(1)), augment(x, _rng(1)), augment(x, _rng(2))
    assert first.shape == x.shape
    assert first.dtype == x.dtype
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_zero_changes_are_the_identity():
    from edge_ll_export.augment import augment_audio, augment_images
    from edge_ll_export.data import digits, fsdd

    x = _images()
    assert torch.equal(augment_images(x, ImageAugment(), spec=digits.SPEC, generator=_rng()), x)
    x = _clips()
    assert torch.equal(augment_audio(x, AudioAugment(), spec=fsdd.SPEC, generator=_rng()), x)


def test_images_move_by_pixels_and_stay_in_range():
    from edge_ll_export.augment import augment_images
    from edge_ll_export.data import digits

    x = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    x[:, :, 3:5, 3:5] = 16
    table = ImageAugment(max_shift_px=2.0)
    moved = augment_images(x, table, spec=digits.SPEC, generator=_rng()).float()
    columns = (moved.sum(dim=(1, 2)) * torch.arange(8)).sum(1) / moved.sum(dim=(1, 2, 3))
    offset = columns - 3.5
    assert offset.abs().max() < 2.2
    assert offset.std() == pytest.approx(2 / 3**0.5, rel=0.15)
    noisy = augment_images(x, ImageAugment(max_noise=0.5), spec=digits.SPEC, generator=_rng())
    assert noisy.max() == 16


def test_audio_shifts_in_silence_and_keeps_the_gain_in_bounds():
    from edge_ll_export.augment import augment_audio
    from edge_ll_export.data import fsdd

    x = torch.full((50, 8000), 1000, dtype=torch.int16)
    moved = augment_audio(x, AudioAugment(max_shift_s=0.1), spec=fsdd.SPEC, generator=_rng())
    silent = (moved == 0).sum(dim=1)
    assert 0 < silent.max() <= 800
    assert set(moved.unique().tolist()) == {0, 1000}
    louder = augment_audio(x, AudioAugment(max_gain_db=6.0), spec=fsdd.SPEC, generator=_rng())
    assert louder.min() >= 501
    assert louder.max() <= 1996
    full = torch.full((4, 8000), 32767, dtype=torch.int16)
    clipped = augment_audio(full, AudioAugment(max_gain_db=6.0), spec=fsdd.SPEC, generator=_rng())
    assert clipped.min() > 0


def test_mirroring_turns_about_half_of_the_images_and_changes_nothing_else():
    from edge_ll_export.augment import augment_images
    from edge_ll_export.data import cifar10

    x = _colours()[:1].expand(200, -1, -1, -1)
    y = augment_images(x, ImageAugment(mirror=True), spec=cifar10.SPEC, generator=_rng())
    turned = (y == x.flip(3)).flatten(1).all(dim=1)
    same = (y == x).flatten(1).all(dim=1)
    assert (turned ^ same).all()
    assert 70 < turned.sum() < 130


def test_windows_change_by_their_sensors_own_scale():
    from edge_ll_export.augment import augment_windows

    x = torch.randn(400, 20, 2, generator=_rng(5)) * torch.tensor([1.0, 1000.0])
    assert torch.equal(augment_windows(x, WindowAugment(), generator=_rng()), x)
    scaled = augment_windows(x, WindowAugment(max_scale=0.1), generator=_rng()) / x
    assert (scaled.amax(dim=(1, 2)) - scaled.amin(dim=(1, 2))).abs().max() < 1e-4
    assert 0.9 <= scaled.min() < 0.92
    assert 1.08 < scaled.max() <= 1.1001
    noise = augment_windows(x, WindowAugment(max_noise=0.2), generator=_rng()) - x
    ratio = noise.std(dim=(0, 1)) / x.std(dim=(0, 1))
    assert torch.allclose(ratio, torch.full((2,), 0.2 / 3**0.5), rtol=0.1)


def test_texts_stay_as_they_are():
    from edge_ll_export.augment import build_augmentation

    x = torch.randint(0, 99, (4, 32), generator=_rng())
    augment = build_augmentation(load(RECIPES / "clinc150.toml", Recipe))
    assert torch.equal(augment(x, _rng()), x)
