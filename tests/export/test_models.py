from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_ll.config import load
from edge_ll_export.recipe import Recipe

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

RECIPES = Path(__file__).parents[2] / "export" / "recipes"
TAILS = [
    ("linear", (24,), ()),
    ("mlp", (24,), (16,)),
    ("mlp", (6, 4), (16, 8)),
    ("pointwise", (6, 4), (6, 8)),
    ("pointwise", (6, 4, 3), (6, 8)),
    ("separable", (6, 10), (6, 8)),
    ("separable", (6, 4, 3), (6, 8)),
    ("transformer", (6, 5), (8, 12)),
]


def _recipe(name):
    return load(RECIPES / f"{name}.toml", Recipe)


def _raw(name, count=3):
    rng = torch.Generator().manual_seed(0)
    if name == "digits":
        return torch.randint(0, 17, (count, 1, 8, 8), generator=rng).to(torch.uint8)
    return (torch.randn(count, 8000, generator=rng) * 3000).to(torch.int16)


def _tail(kind, shape, hidden):
    from edge_ll_export.models.tails import TAILS as KINDS

    torch.manual_seed(0)
    return KINDS[kind](latent_shape=shape, hidden=hidden, capacity=5)


@pytest.mark.parametrize("name", ["digits", "fsdd"])
def test_student_and_teacher_take_raw_input(name):
    from edge_ll_export.models import build_student, build_teacher

    recipe = _recipe(name)
    student, teacher, x = build_student(recipe).eval(), build_teacher(recipe).eval(), _raw(name)
    latent = student.backbone(x)
    assert latent.dtype == torch.float32
    assert latent.shape[1:] == student.latent_shape
    assert torch.equal(student.tail(latent), student(x))
    assert student(x).shape == teacher(x).shape == (3, recipe.classes.capacity)
    assert student(x[:1]).shape == (1, recipe.classes.capacity)
    assert torch.allclose(student(x)[:1], student(x[:1]), atol=1e-5)
    size = sum(p.numel() for p in student.parameters())
    assert size < 60_000
    assert size < sum(p.numel() for p in teacher.parameters()) / 1.5


def test_the_seed_decides_the_weights_and_the_global_state_stays():
    from edge_ll_export.models import build_student

    state = torch.get_rng_state()
    first, again = build_student(_recipe("digits")), build_student(_recipe("digits"))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("kind", "shape", "hidden"), TAILS)
@pytest.mark.parametrize("count", [1, 7])
def test_tails_are_pure_functions_of_their_parameters(kind, shape, hidden, count):
    from torch.func import functional_call, grad

    tail = _tail(kind, shape, hidden)
    params = {name: value.detach() for name, value in tail.named_parameters()}
    z = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))

    def loss(theta):
        return functional_call(tail, theta, (z,)).square().mean()

    gradients = grad(loss)(params)
    assert set(gradients) == set(params)
    assert not list(tail.buffers())
    for name, value in gradients.items():
        assert value.shape == params[name].shape
        assert torch.isfinite(value).all()
    tail(z).square().mean().backward()
    for name, value in tail.named_parameters():
        assert torch.allclose(value.grad, gradients[name], atol=1e-6)


@pytest.mark.parametrize(("kind", "shape", "hidden"), TAILS)
def test_tails_treat_each_sample_on_its_own(kind, shape, hidden):
    tail = _tail(kind, shape, hidden)
    z = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([tail(row[None]) for row in z])
    assert torch.allclose(tail(z), alone, atol=1e-6)


def test_the_plain_norm_is_layer_norm():
    from edge_ll_export.models.tails.norm import ChannelNorm

    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    expected = torch.nn.functional.layer_norm(x, (8,))
    assert torch.allclose(ChannelNorm(8)(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "shape", "hidden"), [row for row in TAILS if row[0] in {"pointwise", "separable"}]
)
def test_a_convolutional_tail_does_not_hear_how_loud_a_sample_is(kind, shape, hidden):
    tail = _tail(kind, shape, hidden)
    z = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tail(z), tail(7 * z + 2), atol=1e-4)
    assert not torch.allclose(tail(z), tail(z.flip(1)), atol=1e-3)


def test_only_a_separable_tail_sees_which_positions_are_neighbours():
    z = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    turned = z[:, :, torch.randperm(10, generator=torch.Generator().manual_seed(1))]
    pointwise, separable = (_tail(kind, (6, 10), (8,)) for kind in ("pointwise", "separable"))
    assert torch.allclose(pointwise(z), pointwise(turned), atol=1e-5)
    assert not torch.allclose(separable(z), separable(turned), atol=1e-3)


def test_a_transformer_tail_does_not_see_padding():
    short, long = _tail("transformer", (6, 3), (8, 12)), _tail("transformer", (6, 5), (8, 12))
    z = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    z[:, :, 3:] = 0
    assert torch.allclose(long(z), short(z[:, :, :3]), atol=1e-6)
    assert torch.isfinite(long(torch.zeros(2, 6, 5))).all()


def test_a_recipe_builds_its_tail():
    from edge_ll_export.models import build_tail
    from edge_ll_export.models.tails import SeparableTail
    from edge_ll_export.recipe import Tail

    recipe = _recipe("fsdd")
    student = replace(recipe.student, tail=Tail(kind="separable", hidden=(8,)))
    separable = replace(recipe, student=student)
    tails = [build_tail(separable, (40, 16)) for _ in range(2)]
    assert isinstance(tails[0], SeparableTail)
    assert all(map(torch.equal, tails[0].parameters(), tails[1].parameters()))


def test_log_mel_is_what_an_fft_gives():
    from edge_ll_export.models.logmel import LogMel

    features = LogMel(sample_rate_hz=8000, full_scale=32768.0)
    x = _raw("fsdd", 2)
    wave = x.numpy().astype(np.float64) / 32768.0
    frames = np.lib.stride_tricks.sliding_window_view(wave, 256, axis=1)[:, ::128]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    power = np.abs(np.fft.rfft(frames * hann, axis=-1)) ** 2
    mel = np.linspace(2595 * np.log10(1 + 20 / 700), 2595 * np.log10(1 + 4000 / 700), 34)
    edges, bins = 700 * (10 ** (mel / 2595) - 1), np.arange(129) * 8000 / 256
    filters = np.stack([np.interp(bins, edges[i : i + 3], [0.0, 1.0, 0.0]) for i in range(32)])
    expected = np.log(power @ filters.T + 1e-6).transpose(0, 2, 1)
    actual = features(x).numpy()
    assert actual.shape == (2, 32, features.frames(8000)) == expected.shape
    np.testing.assert_allclose(actual, expected, atol=2e-3)


def test_calibration_fixes_each_band():
    from edge_ll_export.models.logmel import LogMel

    features = LogMel(sample_rate_hz=8000, full_scale=32768.0)
    x = _raw("fsdd", 8)
    features.calibrate(x)
    bands = features(x)
    assert bands.mean(dim=(0, 2)).abs().max() < 1e-4
    assert (bands.std(dim=(0, 2)) - 1).abs().max() < 1e-3
    features.calibrate(torch.zeros(2, 8000, dtype=torch.int16))
    assert torch.isfinite(features(x)).all()
