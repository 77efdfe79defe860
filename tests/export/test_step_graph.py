"""The step graph: its gradient is the loss's, its update torch's, its operators everybody's."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from edge_ll.bundle import PROJECTED_STEP
from edge_ll.engine import MASKED
from edge_ll.engine.step_graph import HYPER, OUTPUTS, hyper_parameters
from edge_ll.errors import ExportError
from edge_ll.manifest import LossTerms
from tests.tiny_bundle import (
    CAPACITY,
    LATENT,
    LEARNER,
    TAILS,
    exported_step,
    exported_steps,
    step_graph,
    torch_tail,
)

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

OPTIMIZERS = {
    "adamw": replace(LEARNER, clip_norm=1.0),
    "sgd": replace(LEARNER, optimizer="sgd", clip_norm=1.0, momentum=0.9),
}
EVERY_TERM = {
    "mse": LossTerms(anchor=True, projection=True),
    "kl": LossTerms(target="kl", temperature=3.0, anchor=True, projection=True),
}


def _batch(kind: str, n: int, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.zeros((n, CAPACITY), dtype)
    mask[:, -1] = MASKED
    return {
        "latents": rng.standard_normal((n, *TAILS[kind].latent)).astype(dtype),
        "labels": rng.integers(0, CAPACITY - 1, n),
        "ce_weight": rng.random(n).astype(dtype),
        "class_mask": mask,
        "target_logits": rng.standard_normal((n, CAPACITY)).astype(dtype),
        "target_weight": rng.random(n).astype(dtype),
    }


def _session(data: bytes):
    import onnxruntime

    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def _theta(kind: str) -> np.ndarray:
    from edge_ll_export.tail_loss import flatten_theta

    return flatten_theta(torch_tail(kind)).numpy()


def _run(session, kind: str, batches, learner=OPTIMIZERS["adamw"]):
    """θ, m, v and all losses after the batches."""
    theta, losses = _theta(kind), []
    m = v = np.zeros_like(theta)
    for count, batch in enumerate(batches, 1):
        hyper = hyper_parameters(learner, count)
        feeds = {**batch, "theta": theta, "m": m, "v": v, HYPER: hyper}
        loss, _norm, theta, m, v = session.run(list(OUTPUTS), feeds)
        losses.append(float(loss))
    return theta, m, v, losses


# The tails with the plain loss; every term of the loss with the smallest tail.
CASES = {kind: (kind, LossTerms()) for kind in TAILS} | {
    name: ("linear", terms) for name, terms in EVERY_TERM.items()
}


@pytest.mark.parametrize(("kind", "terms"), CASES.values(), ids=CASES)
def test_the_gradient_is_that_of_finite_differences(kind, terms):
    """In float64, with no momentum and no clipping, m' of SGD is the gradient itself."""
    from edge_ll_export.step_graph import training_step
    from edge_ll_export.tail_loss import TailLoss, flatten_theta, split_theta, theta_layout

    tail = torch_tail(kind).double()
    terms = replace(terms, projection=False)
    step = training_step(tail, "sgd", terms)
    batch = [torch.from_numpy(part) for part in _batch(kind, 5, dtype=np.float64).values()]
    if terms.target == "kl":
        batch[4][:, -1] = MASKED
    # Off the fresh weights, whose biases of zero put dead positions on the edge of a ReLU.
    noise = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta = flatten_theta(tail).double()
    theta = theta + 0.05 * noise[: len(theta)]
    zero = torch.zeros_like(theta)
    anchor = [theta + 0.1, torch.linspace(0, 1, len(theta), dtype=torch.float64)]
    anchor = anchor if terms.anchor else []
    hyper = torch.tensor([0.1, 0.0, 1e9, 0.0, 0.0], dtype=torch.float64)

    module, layout = TailLoss(tail, terms), theta_layout(tail)

    def loss_at(point):
        named = {f"tail.{name}": part for name, part in split_theta(point, layout).items()}
        return torch.func.functional_call(module, named, (*batch, *anchor))[0]

    _, norm, _, gradient, _ = step(*batch, *anchor, theta, zero, zero, hyper)
    width = 1e-5
    nudges = width * torch.eye(len(theta), dtype=torch.float64)
    losses = torch.func.vmap(loss_at, chunk_size=64)(torch.cat([theta + nudges, theta - nudges]))
    numeric = (losses[: len(theta)] - losses[len(theta) :]) / (2 * width)
    assert torch.abs(numeric - gradient).max() < 1e-7
    assert float(norm) == pytest.approx(float(gradient.norm()), rel=1e-12)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "terms"), CASES.values(), ids=CASES)
def test_the_graph_s_gradient_is_the_traced_one(kind, terms):
    """The forms in the graph are others than torch's; m' shows the gradient that they give."""
    from edge_ll_export.step_graph import step_inputs, training_step

    tail = torch_tail(kind)
    graphs = exported_steps(kind, "sgd", terms)
    theta = _theta(kind)
    rng = np.random.default_rng(1)
    given = {
        **_batch(kind, 7),
        **{f"reference_{name}": part for name, part in _batch(kind, 3, seed=5).items()},
        "anchor_centre": rng.standard_normal(len(theta)).astype(np.float32),
        "anchor_weight": rng.random(len(theta)).astype(np.float32) * np.float32(0.01),
        "theta": theta,
        "m": np.zeros_like(theta),
        "v": np.zeros_like(theta),
        HYPER: np.array([0.1, 0.0, 1e9, 0.0, 0.0], np.float32),
    }
    if terms.target == "kl":
        given["target_logits"][:, -1] = MASKED
        given["reference_target_logits"][:, -1] = MASKED
    for name, graph in graphs.items():
        projected = name == PROJECTED_STEP
        names = step_inputs(terms, projected=projected)
        expected = training_step(tail, "sgd", terms, projected=projected)(
            *(torch.from_numpy(given[name]) for name in names)
        )
        got = _session(graph).run(list(OUTPUTS), {name: given[name] for name in names})
        for mine, theirs in zip(got, expected, strict=True):
            assert np.abs(mine - theirs.detach().numpy()).max() < 2e-5


def test_a_projected_step_does_not_raise_the_reference_s_loss():
    """A-GEM's condition on a pair of batches whose gradients oppose each other."""
    from edge_ll_export.step_graph import training_step

    terms = LossTerms(projection=True)
    tail = torch_tail("mlp")
    new = _batch("mlp", 6) | {"target_weight": np.zeros(6, np.float32)}
    old = {**new, "labels": (new["labels"] + 1) % (CAPACITY - 1)}  # the same, otherwise labelled
    theta = torch.from_numpy(_theta("mlp"))
    zero, hyper = torch.zeros_like(theta), torch.tensor([0.1, 0.0, 1e9, 0.0, 0.0])
    batches = [[torch.from_numpy(part) for part in batch.values()] for batch in (new, old)]

    def gradient(*names, projected=False):
        step = training_step(tail, "sgd", terms, projected=projected)
        return step(*(part for name in names for part in batches[name]), theta, zero, zero, hyper)[
            3
        ]

    plain, reference = gradient(0), gradient(1)
    assert plain @ reference < -1e-3
    safe = gradient(0, 1, projected=True)
    assert abs(float(safe @ reference)) < 1e-6
    along = plain - (plain @ reference) / (reference @ reference) * reference
    assert torch.allclose(safe, along, atol=1e-6)
    assert torch.equal(gradient(0, 0, projected=True), plain)  # nothing opposes: nothing changes


def test_the_step_leaves_the_module_alone():
    from edge_ll_export.step_graph import training_step

    tail, before = torch_tail("mlp"), _theta("mlp")
    batch = [torch.from_numpy(part) for part in _batch("mlp", 4).values()]
    state = [torch.from_numpy(_theta("mlp")), torch.zeros(len(before)), torch.zeros(len(before))]
    hyper = torch.from_numpy(hyper_parameters(OPTIMIZERS["adamw"], 1))
    training_step(tail, "adamw", LossTerms())(*batch, *state, hyper)
    from edge_ll_export.tail_loss import flatten_theta

    assert np.array_equal(flatten_theta(tail).numpy(), before)
    assert all(parameter.grad is None for parameter in tail.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", TAILS)
def test_the_graph_runs_everywhere_on_any_batch(kind, optimizer):
    from tests.export.test_graphs import check_portable

    data = exported_step(kind, optimizer)
    model = check_portable(data)
    names = [*_batch(kind, 1), "theta", "m", "v", HYPER]
    assert {item.name for item in model.graph.input} == set(names)
    assert [item.name for item in model.graph.output] == list(OUTPUTS)
    session = _session(data)
    for n in (1, 2, 5, 40):
        theta, m, v, losses = _run(session, kind, [_batch(kind, n)], OPTIMIZERS[optimizer])
        assert theta.shape == m.shape == v.shape == _theta(kind).shape
        assert theta.dtype == np.float32
        assert np.isfinite([*theta, *m, *v, *losses]).all()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", TAILS)
def test_a_gradient_of_zero_moves_nothing_and_is_no_nan(kind, optimizer):
    batch = _batch(kind, 3)
    batch |= {"ce_weight": np.zeros(3, np.float32), "target_weight": np.zeros(3, np.float32)}
    learner = replace(OPTIMIZERS[optimizer], weight_decay=0.0)
    theta, m, v, losses = _run(_session(exported_step(kind, optimizer)), kind, [batch] * 3, learner)
    assert np.array_equal(theta, _theta(kind))
    assert not m.any()
    assert not v.any()
    assert losses == [0.0] * 3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_handwritten_graph_is_the_exported_one(optimizer):
    batches = [_batch("linear", 1 + i % 7, seed=i) for i in range(20)]
    learner = OPTIMIZERS[optimizer]
    ours = _run(_session(step_graph(optimizer)), "linear", batches, learner)
    theirs = _run(_session(exported_step("linear", optimizer)), "linear", batches, learner)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.array(a) - np.array(b)).max() < 2e-6
    onnx.checker.check_model(onnx.load_from_string(step_graph(optimizer)))


@pytest.mark.parametrize("clip", [1e-3, 0.1, 1e6])
def test_the_gradient_is_clipped_by_its_norm(clip):
    session, batch = _session(exported_step("linear", "sgd")), _batch("linear", 6)

    def gradient(limit: float) -> np.ndarray:
        learner = replace(OPTIMIZERS["sgd"], clip_norm=limit, momentum=0.0, weight_decay=0.0)
        return _run(session, "linear", [batch], learner)[1]

    whole = gradient(1e6)
    norm = np.linalg.norm(whole)
    expected = whole * min(1.0, clip / norm)
    assert np.allclose(gradient(clip), expected, atol=1e-7)


class Branching(torch.nn.Module):
    """A tail that decides by values, which no graph can express."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, z):
        return z * self.weight if z.sum() > 0 else z


def test_a_tail_that_cannot_be_traced_is_an_export_error():
    from edge_ll_export.step_graph import export_step_graph

    with pytest.raises(ExportError):
        export_step_graph(Branching(), (6,), "adamw", LossTerms())


@pytest.mark.parametrize(
    ("shape", "capacity"), [((LATENT,), 3), ((3,), CAPACITY)], ids=["capacity", "latent"]
)
def test_no_size_of_the_tail_is_mistaken_for_the_batch(shape, capacity):
    """Three classes, or a latent of three, as many as the example batch has samples."""
    from edge_ll_export.models.tails import MlpTail
    from edge_ll_export.step_graph import export_step_graph

    tail = MlpTail(latent_shape=shape, hidden=(), capacity=capacity)
    model = onnx.load_from_string(export_step_graph(tail, shape, "sgd", LossTerms()))
    for item in model.graph.input[:6]:
        assert item.type.tensor_type.shape.dim[0].dim_param, f"{item.name} has a fixed batch"
