"""Do the engines compute what torch computes? Asked at every export, and by ``edge-ll verify``.

torch's side is independent of the graphs: autograd and ``torch.optim`` on the module itself.

The gradient of a ReLU jumps at zero, and which side a sample falls on may hang on the last bit of a
sum. After such a sample two exact implementations go different ways, as torch does when it starts
one rounding away. So a batch is taken only if none of its gradients changes much under errors ten
times and more as large as those of rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from edge_ll.bundle import RECIPE, Bundle
from edge_ll.engine import MASKED, Batch, Engine
from edge_ll.engine.load import open_engine
from edge_ll.engine.step_graph import BETA1, BETA2, EPSILON
from edge_ll.errors import BundleError, ExportError
from edge_ll.manifest import EngineName, LearnerDefaults, Manifest
from edge_ll_export.models import build_tail
from edge_ll_export.recipe import Recipe
from edge_ll_export.tail_loss import TailLoss, flatten_theta

STEPS = 100
TOLERANCE = 1e-4
EARLY_STEPS = 10
MOVEMENT_SHARE = 5e-4
FAINT = 1e-6
_JITTER, _STEADY, _NEARLY_ZERO = 2e-6, 1e-2, 2e-7  # share of θ; of each gradient; a gradient
_DIRECTIONS, _DRAWS, _TRIES = 3, 50, 3
_SIZES = (1, 8, 15)  # of the batches, in turn
_PROJECT_EVERY = 2  # steps, where the bundle can project


class Gap(msgspec.Struct, frozen=True):
    """How far two tensors are apart at worst.

    Attributes:
        absolute: Largest difference; infinite where a value is not finite.
        relative: The same, as a share of the largest expected value.
    """

    absolute: float = 0.0
    relative: float = 0.0

    def __or__(self, other: Gap) -> Gap:
        """The worse of two."""
        return Gap(
            max(self.absolute, other.absolute),
            max(self.relative, other.relative),
        )


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """Worst differences between torch and one engine.

    ``gradients`` is the worst of all parameters, each beside its own largest value, over several
    batches; a parameter whose gradients are all below ``FAINT`` has none to speak of. ``early`` is
    θ after the first few steps, and ``early_allowed`` a small share of how far those steps moved
    it: with a low learning rate, a wrong constant in the optimizer would hide below any fixed
    tolerance, and later AdamW makes more of rounding errors than that share.
    """

    engine: str
    runtime: str
    provider: str
    logits: Gap
    losses: Gap
    gradients: Gap
    early: Gap
    theta: Gap
    steps: int
    early_allowed: float = TOLERANCE

    @property
    def ok(self) -> bool:
        """Whether every difference is within the tolerance; NaN never is."""
        return (
            all(min(g.absolute, g.relative) <= TOLERANCE for g in (self.logits, self.losses))
            and self.gradients.relative <= TOLERANCE
            and self.early.absolute <= self.early_allowed
            and self.theta.absolute <= TOLERANCE
        )


def tail_of(bundle: Bundle) -> nn.Module:
    """The bundle's tail as a torch module, built from the recipe that it carries.

    Raises:
        BundleError: It carries no recipe, or one that does not make this tail.
    """
    try:
        recipe = msgspec.json.decode(bundle.read(RECIPE), type=Recipe)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{RECIPE}: {error}") from error
    tail = build_tail(recipe, bundle.manifest.latent.shape)
    theta = bundle.theta()
    shapes = {entry.name: entry.shape for entry in bundle.manifest.theta}
    if {name: tuple(p.shape) for name, p in tail.named_parameters()} != shapes:
        raise BundleError(f"{RECIPE}: its tail has other parameters than the manifest says")
    with torch.no_grad():
        for entry, parameter in zip(bundle.manifest.theta, tail.parameters(), strict=True):
            part = theta[entry.offset : entry.offset + entry.size]
            parameter.copy_(torch.from_numpy(part.reshape(entry.shape)))
    return tail


def check_parity(
    bundle: Bundle,
    engine: EngineName,
    tail: nn.Module,
    *,
    steps: int = STEPS,
    providers: tuple[str, ...] = ("cpu",),
) -> Parity:
    """Run torch and one engine side by side from the bundle's θ.

    An edge may still be missed, in one of six runs of a large transformer, so a check that fails is
    made anew on other batches, twice. An engine that is wrong fails them all.

    Raises:
        EngineError: The engine cannot run here.
    """
    for seed in range(_TRIES):
        opened = open_engine(bundle, engine, providers=providers)
        parity = _compare(bundle, opened, tail, np.random.default_rng(seed), steps)
        if parity.ok:
            break
    return parity


def _compare(
    bundle: Bundle, opened: Engine, tail: nn.Module, rng: np.random.Generator, steps: int
) -> Parity:
    manifest = bundle.manifest
    reference = _TorchTail(copy.deepcopy(tail), manifest.learner)
    if manifest.learner.loss.anchor:
        size = manifest.theta_size
        centre = bundle.theta() + 0.1 * rng.standard_normal(size).astype(np.float32)
        weight = np.full(size, 0.1, np.float32) * rng.random(size).astype(np.float32)
        opened.set_anchor(centre, weight)
        reference.set_anchor(centre, weight)
    logits = gradients = Gap()
    for n in _SIZES:
        batch = _steady_batch(reference, manifest, rng, n)
        logits |= _gap(opened.logits(batch.latents), reference.logits(batch))
        for got, expected in _by_parameter(manifest, opened, reference, batch):
            gradients |= _gap(got, expected, least=FAINT)
    first = min(steps, EARLY_STEPS)
    losses = _train_both(opened, reference, manifest, rng, first)
    early = _gap(opened.theta, reference.theta)
    moved = _gap(opened.theta, bundle.theta()).absolute
    losses |= _train_both(opened, reference, manifest, rng, steps - first)
    return Parity(
        engine=opened.info.name,
        runtime=opened.info.runtime,
        provider=opened.info.provider,
        logits=logits,
        losses=losses,
        gradients=gradients,
        early=early,
        theta=_gap(opened.theta, reference.theta),
        early_allowed=min(TOLERANCE, 1e-6 + MOVEMENT_SHARE * moved),
        steps=steps,
    )


def require_parity(parity: Parity) -> None:
    """Let no engine pass that disagrees with torch.

    Raises:
        ExportError: By how much, and where.
    """
    if not parity.ok:
        raise ExportError(
            f"{parity.engine} on {parity.runtime} differs from torch: logits "
            f"{parity.logits.absolute:.2e}, losses {parity.losses.absolute:.2e}, gradients "
            f"{parity.gradients.relative:.2e} of their largest, θ after "
            f"{parity.steps} steps {parity.theta.absolute:.2e} (allowed {TOLERANCE:.0e}), θ after "
            f"the first {EARLY_STEPS} {parity.early.absolute:.2e} (allowed "
            f"{parity.early_allowed:.1e})"
        )


class _TorchTail:
    """What an engine does, by autograd and ``torch.optim``."""

    def __init__(self, tail: nn.Module, learner: LearnerDefaults) -> None:
        self._tail = tail
        self._module = TailLoss(tail, learner.loss)
        self._clip = learner.clip_norm
        self._optimizer = _optimizer(tail, learner)
        self._anchor: list[Tensor] = []

    @property
    def theta(self) -> Any:
        return flatten_theta(self._tail).numpy()

    def set_anchor(self, centre: Any, weight: Any) -> None:
        self._anchor = [torch.from_numpy(centre), torch.from_numpy(weight)]

    @torch.no_grad()
    def logits(self, batch: Batch) -> Any:
        return self._tail(torch.from_numpy(batch.latents)).numpy()

    def gradient(self, batch: Batch) -> Any:
        return self._backward(batch, self._anchor)[1].numpy()

    def is_steady(self, batch: Batch, rng: np.random.Generator) -> bool:
        """Whether the gradient is nearly the same at every θ that is a little off.

        Off to both sides: a sample next to a ReLU's edge crosses it on one of them.
        """
        kept = [p.detach().clone() for p in self._tail.parameters()]
        here = self._backward(batch, self._anchor)[1]
        steady = True
        for _ in range(_DIRECTIONS):
            noise = [torch.from_numpy(rng.standard_normal(p.shape).astype("f4")) for p in kept]
            for step in (_JITTER, -_JITTER):
                self._put([p * (1 + step * n) for p, n in zip(kept, noise, strict=True)])
                away = (self._backward(batch, self._anchor)[1] - here).abs()
                # Number by number: AdamW makes a full step of the smallest gradient that was zero.
                steady = steady and bool((away <= _STEADY * here.abs() + _NEARLY_ZERO).all())
            if not steady:
                break
        self._put(kept)
        return steady

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._tail.parameters(), values, strict=True):
            parameter.copy_(value)

    def step(self, batch: Batch, reference: Batch | None) -> float:
        loss, gradient = self._backward(batch, self._anchor)
        if reference is not None:
            # A-GEM projects the gradients of the data; what holds θ is added after.
            plain = self._backward(batch, self._off)[1]
            against = self._backward(reference, self._off)[1]
            share = torch.clamp_max(plain @ against, 0.0) / (against @ against)
            gradient = gradient - share * against
        parts = torch.split(gradient, [p.numel() for p in self._tail.parameters()])
        for parameter, part in zip(self._tail.parameters(), parts, strict=True):
            parameter.grad = part.reshape(parameter.shape).clone()
        nn.utils.clip_grad_norm_(self._tail.parameters(), self._clip)
        self._optimizer.step()
        return loss

    @property
    def _off(self) -> list[Tensor]:
        return [torch.zeros_like(part) for part in self._anchor]

    def _backward(self, batch: Batch, anchor: list[Tensor]) -> tuple[float, Tensor]:
        inputs = [*(torch.from_numpy(part) for part in batch), *anchor]
        loss = self._module(*inputs)[0]
        parts = torch.autograd.grad(loss, list(self._tail.parameters()))
        return loss.item(), torch.cat([part.reshape(-1) for part in parts])


def _optimizer(tail: nn.Module, learner: LearnerDefaults) -> torch.optim.Optimizer:
    if learner.optimizer == "adamw":
        return torch.optim.AdamW(
            tail.parameters(),
            lr=learner.learning_rate,
            betas=(BETA1, BETA2),
            eps=EPSILON,
            weight_decay=learner.weight_decay,
        )
    return torch.optim.SGD(
        tail.parameters(),
        lr=learner.learning_rate,
        momentum=learner.momentum,
        weight_decay=learner.weight_decay,
    )


def _by_parameter(
    manifest: Manifest, engine: Engine, reference: _TorchTail, batch: Batch
) -> Iterator[tuple[Any, Any]]:
    """The gradients of one batch by engine and torch, parameter by parameter."""
    got, expected = engine.gradient(batch), reference.gradient(batch)
    for entry in manifest.theta:
        part = slice(entry.offset, entry.offset + entry.size)
        yield got[part], expected[part]


def _train_both(
    engine: Engine,
    torch_tail: _TorchTail,
    manifest: Manifest,
    rng: np.random.Generator,
    steps: int,
) -> Gap:
    """The worst difference between the losses of all steps."""
    worst = Gap()
    for i in range(steps):
        batch = _steady_batch(torch_tail, manifest, rng, _SIZES[i % len(_SIZES)])
        reference = None
        if manifest.learner.loss.projection and i % _PROJECT_EVERY == 0:
            reference = _steady_batch(torch_tail, manifest, rng, _SIZES[-1])
        expected = torch_tail.step(batch, reference)
        worst |= _gap(engine.step(batch, reference), expected)
    return worst


def _steady_batch(
    torch_tail: _TorchTail, manifest: Manifest, rng: np.random.Generator, n: int
) -> Batch:
    """The next batch whose gradient does not hang on a rounding error.

    A tail that has none within many draws is compared as it is.
    """
    for _ in range(_DRAWS):
        batch = _batch(manifest, rng, n=n)
        if torch_tail.is_steady(batch, rng):
            break
    return batch


def _batch(manifest: Manifest, rng: np.random.Generator, *, n: int) -> Batch:
    """Random latents with every term of the loss in use, and one class masked."""
    classes = manifest.capacity
    labels = rng.integers(0, classes - 1, n)
    mask = np.zeros((n, classes), np.float32)
    mask[:, -1] = MASKED
    target = rng.standard_normal((n, classes)).astype(np.float32)
    if manifest.learner.loss.target == "kl":
        target[:, -1] = MASKED
    return Batch(
        latents=rng.standard_normal((n, *manifest.latent.shape)).astype(np.float32),
        labels=labels.astype(np.int64),
        ce_weight=rng.random(n).astype(np.float32),
        class_mask=mask,
        target_logits=target,
        target_weight=rng.random(n).astype(np.float32),
    )


def _gap(got: Any, expected: Any, *, least: float = 1e-12) -> Gap:
    """The difference, as a share of the largest expected value or of ``least``."""
    worst = float(np.abs(got - expected).max())
    if not np.isfinite(worst):
        return Gap(float("inf"), float("inf"))
    return Gap(worst, worst / max(float(np.abs(expected).max()), least))
