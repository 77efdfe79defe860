"""Do the engines compute what torch computes? Asked at every export, and by ``edge-ll verify``.

torch's side is independent of the graphs: autograd and ``torch.optim`` on the module itself.
"""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from edge_ll.bundle import RECIPE, Bundle
from edge_ll.engine import MASKED, Batch, Engine
from edge_ll.engine.load import open_engine
from edge_ll.engine.step_graph import BETA1, BETA2, EPSILON
from edge_ll.errors import BundleError, ExportError
from edge_ll.manifest import EngineName, LearnerDefaults, Manifest
from edge_ll_export.models import build_tail
from edge_ll_export.recipe import Recipe
from edge_ll_export.tail_loss import TailLoss, flatten_theta

STEPS = 10
TOLERANCE = 1e-4
MOVEMENT_SHARE = 5e-4


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """Worst absolute differences between torch and one engine.

    ``theta_allowed`` is a small share of how far the steps moved θ: with a low learning rate, a
    wrong constant in the optimizer would hide below any fixed tolerance.
    """

    engine: str
    runtime: str
    logits: float
    losses: float
    theta: float
    steps: int
    theta_allowed: float = TOLERANCE

    @property
    def ok(self) -> bool:
        """Whether every difference is within the tolerance; NaN never is."""
        return (
            self.logits <= TOLERANCE
            and self.losses <= TOLERANCE
            and self.theta <= self.theta_allowed
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
    bundle: Bundle, engine: EngineName, tail: nn.Module, *, steps: int = STEPS
) -> Parity:
    """Run torch and one engine side by side from the bundle's θ.

    Raises:
        EngineError: The engine cannot run here.
    """
    opened = open_engine(bundle, engine)
    manifest = bundle.manifest
    rng = np.random.default_rng(0)
    batches = [_batch(manifest, rng, n=1 + 7 * (i % 3)) for i in range(steps)]
    tail = copy.deepcopy(tail)
    with torch.no_grad():
        expected = tail(torch.from_numpy(batches[-1].latents)).numpy()
    logits = _gap(opened.logits(batches[-1].latents), expected)
    losses = _train_both(opened, tail, batches, manifest.learner)
    return Parity(
        engine=opened.info.name,
        runtime=opened.info.runtime,
        logits=logits,
        losses=losses,
        theta=_gap(opened.theta, flatten_theta(tail).numpy()),
        theta_allowed=min(TOLERANCE, 1e-6 + MOVEMENT_SHARE * _gap(opened.theta, bundle.theta())),
        steps=steps,
    )


def require_parity(parity: Parity) -> None:
    """Let no engine pass that disagrees with torch.

    Raises:
        ExportError: By how much, and where.
    """
    if not parity.ok:
        raise ExportError(
            f"{parity.engine} on {parity.runtime} differs from torch: logits {parity.logits:.2e}, "
            f"losses {parity.losses:.2e} (allowed {TOLERANCE:.0e}), θ after {parity.steps} steps "
            f"{parity.theta:.2e} (allowed {parity.theta_allowed:.1e})"
        )


def _train_both(
    engine: Engine, tail: nn.Module, batches: list[Batch], learner: LearnerDefaults
) -> float:
    """The worst difference between the losses of all steps."""
    module = TailLoss(tail)
    optimizer: torch.optim.Optimizer
    if learner.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            tail.parameters(),
            lr=learner.learning_rate,
            betas=(BETA1, BETA2),
            eps=EPSILON,
            weight_decay=learner.weight_decay,
        )
    else:
        optimizer = torch.optim.SGD(
            tail.parameters(),
            lr=learner.learning_rate,
            momentum=learner.momentum,
            weight_decay=learner.weight_decay,
        )
    worst = 0.0
    for batch in batches:
        optimizer.zero_grad()
        loss = module(*(torch.from_numpy(part) for part in batch))[0]
        loss.backward()
        nn.utils.clip_grad_norm_(tail.parameters(), learner.clip_norm)
        optimizer.step()
        worst = max(worst, _gap(engine.step(batch), loss.item()))
    return worst


def _batch(manifest: Manifest, rng: np.random.Generator, *, n: int) -> Batch:
    """Random latents with every term of the loss in use, and one class masked."""
    classes = manifest.capacity
    labels = rng.integers(0, classes - 1, n)
    mask = np.zeros((n, classes), np.float32)
    mask[:, -1] = MASKED
    return Batch(
        latents=rng.standard_normal((n, *manifest.latent.shape)).astype(np.float32),
        labels=labels.astype(np.int64),
        ce_weight=rng.random(n).astype(np.float32),
        class_mask=mask,
        target_logits=rng.standard_normal((n, classes)).astype(np.float32),
        target_weight=rng.random(n).astype(np.float32),
    )


def _gap(got: Any, expected: Any) -> float:
    """Worst absolute difference; infinite where a value is not finite."""
    worst = float(np.abs(got - expected).max())
    return worst if np.isfinite(worst) else float("inf")
