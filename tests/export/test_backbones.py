"""Backbones: torch and the exported graph agree, on raw input of any number of samples."""

from __future__ import annotations

import numpy as np
import pytest

from edge_ll.errors import DataError
from tests.export.graph_checks import check_portable, run_graph

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

# Sizes are odd and differ, so that a mixed-up axis shows; 7 is what packing traces with.
SPECS = {
    "image": {"kind": "image", "shape": (3, 15, 13), "dtype": "uint8", "full_scale": 255.0},
    "waveform": {
        "kind": "waveform", "shape": (3000,), "dtype": "int16", "full_scale": 32768.0,
        "sample_rate_hz": 4000,
    },
    "window": {"kind": "window", "shape": (21, 7), "dtype": "float32"},
    "text": {"kind": "text", "shape": (9,), "dtype": "int64"},
}  # fmt: skip
SIZES = {"channels": (8, 8, 16), "latent_channels": 20}
TINY = {"vocabulary": 50, "width": 12, "hidden": 20, "heads": 3, "positions": 16}
# Name -> (kind, input, keys, shape of the latent)
CASES = {
    "conv": ("conv", "image", SIZES, (20 * 4 * 4,)),
    "mobilenet": ("mobilenet", "image", SIZES | {"stride": 1, "width": 1.0, "pool": False},
                  (20, 4, 4)),
    "wide mobilenet": ("mobilenet", "image", SIZES | {"stride": 2, "width": 2.0, "pool": True},
                       (20,)),
    "resnet": ("resnet", "image", SIZES | {"stride": 1, "pool": False}, (20, 4, 4)),
    "coarse resnet": ("resnet", "image", SIZES | {"stride": 2, "pool": True}, (20,)),
    "dscnn": ("dscnn", "waveform", SIZES | {"pool": False}, (20, 19, 5)),
    "pooled dscnn": ("dscnn", "waveform", SIZES | {"pool": True}, (20,)),
    "dscnn1d": ("dscnn1d", "waveform", SIZES, (20, 6)),
    "tcn": ("tcn", "window", SIZES | {"stride": 1, "pool": False}, (20, 21)),
    "coarse tcn": ("tcn", "window", SIZES | {"stride": 4, "pool": False}, (20, 6)),
    "pooled tcn": ("tcn", "window", SIZES | {"stride": 1, "pool": True}, (20,)),
    "mlp": ("mlp", "window", SIZES, (20,)),
    "minilm": ("minilm", "text", {"layers": 2, "pool": False}, (12, 9)),
    "pooled minilm": ("minilm", "text", {"layers": 1, "pool": True}, (12,)),
}  # fmt: skip


def spec_of(name: str, **changes):
    from edge_ll_export.data import InputSpec

    return InputSpec(**SPECS[name] | changes)


def raw(spec, count: int, seed: int = 0):
    """Samples as a sensor gives them; texts end at different places."""
    rng = np.random.default_rng(seed)
    if spec.kind == "image":
        x = rng.integers(0, 256, (count, *spec.shape))
    elif spec.kind == "waveform":
        x = rng.normal(0, 3000, (count, *spec.shape))
    elif spec.kind == "window":
        x = rng.normal(100, 30, (count, *spec.shape)) * np.arange(1, spec.shape[1] + 1)
    else:
        ends = rng.integers(1, spec.shape[0] + 1, (count, 1))
        x = rng.integers(1, 50, (count, *spec.shape)) * (np.arange(spec.shape[0]) < ends)
    return torch.from_numpy(x.astype(spec.dtype))


def build(case: str, seed: int = 0):
    """A backbone that has seen data: calibrated, and its batch norms moved."""
    from edge_ll_export.models.backbones import KINDS
    from edge_ll_export.models.backbones.minilm import MiniLmBackbone
    from edge_ll_export.models.seeding import seeded

    kind, name, keys, _ = CASES[case]
    spec = spec_of(name)
    with seeded(seed):
        if kind == "minilm":
            backbone = MiniLmBackbone(spec=spec, **keys, **TINY)
        else:
            backbone = KINDS[kind](spec=spec, **keys)
    x = raw(spec, 64, seed=1)
    backbone.calibrate(x)
    with torch.no_grad():
        for _ in range(10):
            backbone.train()(x)
    return backbone.eval(), spec


def test_every_kind_is_here():
    from edge_ll_export.models import backbones, teacher
    from edge_ll_export.recipe import BACKBONE_KEYS, BACKBONES

    kinds = {kind for fitting in BACKBONES.values() for kind in fitting}
    assert kinds == set(backbones.KINDS) == set(teacher.KINDS) == set(BACKBONE_KEYS)
    assert kinds == {case[0] for case in CASES.values()}
    for kind, name, keys, _ in CASES.values():
        assert kind in BACKBONES[name]
        assert set(keys) == set(BACKBONE_KEYS[kind])


@pytest.mark.parametrize("case", CASES)
def test_the_exported_graph_is_what_torch_computes(case):
    from edge_ll_export.graphs import export_backbone

    backbone, spec = build(case)
    x = raw(spec, 19)
    with torch.no_grad():
        expected = backbone(x).numpy()
    assert backbone.latent_shape == CASES[case][3] == expected.shape[1:]
    data = export_backbone(backbone, x[:7])
    model = check_portable(data)
    assert [item.name for item in model.graph.input] == ["x"]
    assert [item.name for item in model.graph.output] == ["latents"]
    assert not {"BatchNormalization", "Loop", "If"} & {node.op_type for node in model.graph.node}
    for count in (1, 2, 7, 19):
        (got,) = run_graph(data, ["latents"], x=x[:count].numpy())
        assert got.dtype == np.float32
        assert got.shape == (count, *backbone.latent_shape)
        assert np.abs(got - expected[:count]).max() < 1e-4
    assert expected.std() > 1e-2, "a constant would agree as well"


@pytest.mark.parametrize("case", CASES)
def test_the_recipe_knows_the_axes_of_the_latent(case):
    from edge_ll_export.recipe import Backbone

    kind, _, keys, shape = CASES[case]
    assert len(Backbone(kind=kind, **keys).latent_axes) == len(shape)


@pytest.mark.parametrize("case", CASES)
def test_the_seed_decides_the_weights(case):
    first, spec = build(case, seed=5)
    again, _ = build(case, seed=5)
    other, _ = build(case, seed=6)
    x = raw(spec, 3)
    with torch.no_grad():
        assert torch.equal(first(x), again(x))
        assert not torch.allclose(first(x), other(x), atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_each_sample_is_encoded_on_its_own_and_in_any_number(case):
    backbone, spec = build(case)
    x = raw(spec, 300)
    with torch.no_grad():
        alone = torch.cat([backbone(row[None]) for row in x[:9]])
    latents = backbone.encode(x)
    assert latents.shape == (300, *backbone.latent_shape)
    assert not latents.requires_grad
    assert torch.allclose(latents[:9], alone, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [("resnet", "image"), ("tcn", "window")])
def test_units_do_not_matter_once_calibrated(kind, name):
    """Scale and offset of a sensor are constants of the graph, not of the device's code."""
    from edge_ll_export.models.backbones import KINDS
    from edge_ll_export.models.seeding import seeded

    spec = spec_of(name)
    keys = SIZES | {"stride": 1, "pool": True}
    latents = []
    for gain, offset in ((1, 0), (3, 40)):
        with seeded(0):
            backbone = KINDS[kind](spec=spec, **keys).eval()
        x = (raw(spec, 32).to(torch.float32) / 4).floor() * gain + offset
        backbone.calibrate(x.to(getattr(torch, spec.dtype)))
        latents.append(backbone.encode(x.to(getattr(torch, spec.dtype))))
    assert torch.allclose(latents[0], latents[1], atol=1e-4)


def test_standardising_leaves_a_dead_sensor_finite():
    from edge_ll_export.models.backbones.standardise import Standardise

    x = raw(spec_of("window"), 40)
    x[:, :, 2] = 17.0
    standardise = Standardise(7, axis=2, axes=3)
    standardise.calibrate(x)
    y = standardise(x)
    assert torch.isfinite(y).all()
    assert y[:, :, 2].abs().max() < 1e-4
    live = [0, 1, 3, 4, 5, 6]
    assert y[:, :, live].mean(dim=(0, 1)).abs().max() < 1e-4
    assert (y[:, :, live].std(dim=(0, 1)) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("case", ["tcn", "coarse tcn"])
def test_a_tcn_sees_the_last_step_and_never_a_later_one(case):
    backbone, spec = build(case)
    x = raw(spec, 4)
    changed = x.clone()
    changed[:, -1] += 500.0
    before, after = backbone.encode(x), backbone.encode(changed)
    assert torch.allclose(before[:, :, :-1], after[:, :, :-1], atol=1e-5)
    assert (before[:, :, -1] - after[:, :, -1]).abs().max() > 1e-2


def test_one_second_gives_the_map_of_the_paper():
    from edge_ll_export.models.backbones import KINDS

    for rate in (8000, 16000):
        spec = spec_of("waveform", shape=(rate,), sample_rate_hz=rate)
        backbone = KINDS["dscnn"](spec=spec, channels=(8,), latent_channels=64, pool=False)
        assert backbone.latent_shape == (64, 25, 5)


def test_a_waveform_shorter_than_a_frame_is_refused():
    from edge_ll_export.models.backbones import KINDS

    spec = spec_of("waveform", shape=(100,))
    with pytest.raises(DataError, match="100 samples are shorter than a frame of 256"):
        KINDS["dscnn1d"](spec=spec, **SIZES)


@pytest.mark.parametrize("case", ["conv", "mobilenet", "resnet", "dscnn", "dscnn1d", "tcn", "mlp"])
def test_the_teacher_of_each_kind_takes_the_same_raw_input(case):
    from edge_ll_export.models import teacher

    kind, name, _, _ = CASES[case]
    spec = spec_of(name)
    model = teacher.KINDS[kind](spec=spec, width=4, capacity=5).eval()
    x = raw(spec, 3)
    model.calibrate(x)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (3, 5)
        assert torch.allclose(model(x[:1]), logits[:1], atol=1e-5)


def test_a_teacher_brings_large_images_down():
    from edge_ll_export.models import teacher

    spec = spec_of("image", shape=(3, 96, 130))
    model = teacher.KINDS["resnet"](spec=spec, width=4, capacity=5)
    assert model.backbone.blocks[0].stride == (3, 3)
    assert model(raw(spec, 2)).shape == (2, 5)


# Text.


def test_padding_takes_no_part():
    from edge_ll_export.models.backbones.minilm import MiniLmBackbone

    states, spec = build("minilm")
    pooled = MiniLmBackbone(spec=spec, layers=2, pool=True, **TINY).eval()
    pooled.load_state_dict(states.state_dict())
    x = raw(spec, 1)
    x[0, 4:] = 0
    with torch.no_grad():
        long, short = states(x), states(x[:, :4])
        assert torch.allclose(long[:, :, :4], short, atol=1e-6)
        assert (long[:, :, 4:] == 0).all()
        assert torch.allclose(pooled(x), short.mean(dim=2), atol=1e-6)
        assert torch.isfinite(pooled(torch.zeros_like(x))).all()


def test_a_layer_is_that_of_torch():
    """An implementation that is not ours: post-norm, GELU, the mask as for keys."""
    from edge_ll_export.models.backbones.minilm import TransformerLayer

    torch.manual_seed(0)
    ours = TransformerLayer(width=12, hidden=20, heads=3).eval()
    theirs = torch.nn.TransformerEncoderLayer(
        12, 3, 20, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    ).eval()
    attention = theirs.self_attn
    with torch.no_grad():
        for part in ("weight", "bias"):
            parts = [getattr(getattr(ours, name), part) for name in ("query", "key", "value")]
            getattr(attention, f"in_proj_{part}").copy_(torch.cat(parts))
    attention.out_proj.load_state_dict(ours.mix.state_dict())
    theirs.linear1.load_state_dict(ours.widen.state_dict())
    theirs.linear2.load_state_dict(ours.narrow.state_dict())
    theirs.norm1.load_state_dict(ours.attention_norm.state_dict())
    theirs.norm2.load_state_dict(ours.norm.state_dict())
    h, padding = torch.randn(4, 9, 12), torch.arange(9) >= torch.tensor([[9], [5], [3], [1]])
    with torch.no_grad():
        got = ours(h, padding.to(torch.float32)[:, None, None, :] * -1e9)
        expected = theirs(h, src_key_padding_mask=padding)
    assert torch.allclose(got[~padding], expected[~padding], atol=1e-5)


def test_a_text_longer_than_the_positions_is_refused():
    from edge_ll_export.models.backbones.minilm import MiniLmBackbone

    with pytest.raises(ValueError, match="17 tokens; this encoder takes at most 16"):
        MiniLmBackbone(spec=spec_of("text", shape=(17,)), layers=1, pool=True, **TINY)


def test_a_frozen_backbone_encodes_a_sample_once():
    from edge_ll_export.models.backbones import Remembered

    backbone, spec = build("pooled minilm")
    assert backbone.frozen
    assert not any(p.requires_grad for p in backbone.parameters())
    encoded = []
    plain = backbone.encode
    backbone.encode = lambda x: encoded.append(len(x)) or plain(x)
    remembered = Remembered(backbone).train()
    x = raw(spec, 6)
    x[5] = x[0]
    first = remembered(x)
    assert torch.equal(first, plain(x))
    assert torch.equal(remembered(x.flip(0)), first.flip(0))
    assert torch.equal(remembered(raw(spec, 3, seed=9))[:2], plain(raw(spec, 3, seed=9))[:2])
    assert encoded == [5, 3]
