"""The training loss, written once: torch computes it, both engines' graphs come from it.

Per-sample weights and targets are inputs, so a method of continual learning is a way of filling a
batch (see :class:`edge_ll.engine.Batch`), not code. The closed list of terms, each a mean over the
batch but the last; ``z`` are the logits, ``t`` the target logits:

| term | formula | used by |
|---|---|---|
| cross-entropy | ``ce_weight * -log softmax(z + class_mask)[label]`` | every method; the mask is |
|  |  | also ER-ACE's asymmetric one |
| target, ``mse`` | ``target_weight * mean_c (z - t)²`` | DER, DER++ |
| target, ``kl`` | ``target_weight * T² * KL(softmax(t / T) || softmax(z / T))``, over the | LwF |
|  | classes whose ``t`` is not ``MASKED`` |  |
| anchor | ``sum_i weight_i (θ_i - centre_i)²``, with ``weight = λF`` | EWC, L2-SP |

The target is one of the two, and the anchor is there or not: a recipe decides, so that a device
pays for no term that it does not use.

Sources: ER-ACE: Caccia et al., ICLR 2022. DER: Buzzega et al., NeurIPS 2020. LwF: Li and Hoiem,
ECCV 2016, with Hinton et al., 2015, for T². EWC: Kirkpatrick et al., PNAS 2017, whose ½ is in λ.
L2-SP: Li et al., ICML 2018.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_ll.engine.port import MASKED, Batch
from edge_ll.manifest import LossTerms, ThetaEntry

BATCH_NAMES = Batch._fields
ANCHOR_NAMES = ("anchor_centre", "anchor_weight")


def batch_loss(
    logits: Tensor,
    labels: Tensor,
    ce_weight: Tensor,
    class_mask: Tensor,
    target_logits: Tensor,
    target_weight: Tensor,
    *,
    terms: LossTerms,
) -> Tensor:
    """Every term but the anchor, a scalar; shapes and dtypes as in :class:`edge_ll.engine.Batch`.

    :func:`batch_loss_slope` is its derivative: they change together.
    """
    log_probability = F.log_softmax(logits + class_mask, dim=1)
    cross_entropy = -(_one_hot(labels, logits) * log_probability).sum(dim=1)
    if terms.target == "kl":
        temperature = terms.temperature
        wanted = F.log_softmax(target_logits / temperature, dim=1)
        got = F.log_softmax(_aligned(logits, target_logits) / temperature, dim=1)
        distance = (wanted.exp() * (wanted - got)).sum(dim=1) * temperature**2
    else:
        away = logits - target_logits
        distance = (away * away).mean(dim=1)
    return (ce_weight * cross_entropy + target_weight * distance).mean()


def batch_loss_slope(
    logits: Tensor,
    labels: Tensor,
    ce_weight: Tensor,
    class_mask: Tensor,
    target_logits: Tensor,
    target_weight: Tensor,
    *,
    terms: LossTerms,
) -> Tensor:
    """The derivative of :func:`batch_loss` by the logits, float32 [N, C].

    In closed form it is half as many operators as what automatic differentiation leaves.
    """
    samples, classes = logits.shape
    probability = F.log_softmax(logits + class_mask, dim=1).exp()
    slope = (ce_weight / samples).unsqueeze(1) * (probability - _one_hot(labels, logits))
    if terms.target == "kl":
        temperature = terms.temperature
        got = F.softmax(_aligned(logits, target_logits) / temperature, dim=1)
        pull, scale = got - F.softmax(target_logits / temperature, dim=1), temperature
    else:
        pull, scale = logits - target_logits, 2.0 / classes
    return slope + (target_weight * (scale / samples)).unsqueeze(1) * pull


def anchor_loss(theta: Tensor, centre: Tensor, weight: Tensor) -> Tensor:
    """``sum_i weight_i (θ_i - centre_i)²``, a scalar of float32 [P] vectors."""
    away = theta - centre
    return (weight * away * away).sum()


def anchor_slope(theta: Tensor, centre: Tensor, weight: Tensor) -> Tensor:
    """The derivative of :func:`anchor_loss` by θ, float32 [P]."""
    return 2.0 * weight * (theta - centre)


def _aligned(logits: Tensor, target_logits: Tensor) -> Tensor:
    """The logits, without the classes that the target knows nothing of."""
    return logits + (target_logits < MASKED / 2).to(logits.dtype) * MASKED


def _one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    classes = torch.arange(logits.shape[1], device=logits.device)
    return (labels.unsqueeze(1) == classes).to(logits.dtype)


class TailLoss(nn.Module):
    """A tail together with its loss: the module that is exported for training.

    Args:
        tail: Latents to logits.
        terms: Which terms the loss has.
    """

    def __init__(self, tail: nn.Module, terms: LossTerms) -> None:
        super().__init__()
        self.tail = tail
        self.terms = terms

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the forward pass's inputs."""
        return (*BATCH_NAMES, *(ANCHOR_NAMES if self.terms.anchor else ()))

    def forward(self, latents: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (scalar) and the logits, float32 [N, C]; inputs as :attr:`inputs` says."""
        logits = self.tail(latents)
        loss = batch_loss(logits, *rest[: len(BATCH_NAMES) - 1], terms=self.terms)
        if self.terms.anchor:
            theta = torch.cat([p.reshape(-1) for p in self.tail.parameters()])
            loss = loss + anchor_loss(theta, *rest[len(BATCH_NAMES) - 1 :])
        return loss, logits


def theta_layout(tail: nn.Module) -> tuple[ThetaEntry, ...]:
    """Where each parameter lies in θ: in the module's order, without gaps."""
    entries, offset = [], 0
    for name, parameter in tail.named_parameters():
        entries.append(ThetaEntry(name=name, offset=offset, shape=tuple(parameter.shape)))
        offset += parameter.numel()
    return tuple(entries)


def flatten_theta(tail: nn.Module) -> Tensor:
    """θ as one float32 vector [P]."""
    return torch.cat([p.detach().reshape(-1) for p in tail.parameters()]).to(torch.float32)


def split_theta(theta: Tensor, layout: tuple[ThetaEntry, ...]) -> dict[str, Tensor]:
    """Views of θ in the shapes of the parameters, by name."""
    parts = torch.split(theta, [entry.size for entry in layout])
    return {e.name: part.reshape(e.shape) for e, part in zip(layout, parts, strict=True)}


def join_theta(parameters: Mapping[str, Tensor], layout: tuple[ThetaEntry, ...]) -> Tensor:
    """The inverse of :func:`split_theta`: one vector from tensors by name."""
    return torch.cat([parameters[entry.name].reshape(-1) for entry in layout])


def example_batch(module: nn.Module, sizes: tuple[int, ...]) -> int:
    """A batch size that no other axis has: tracing takes equal sizes for the same axis."""
    taken = {size for parameter in module.parameters() for size in parameter.shape} | {*sizes, 0, 1}
    return next(n for n in range(2, 2 + len(taken) + 1) if n not in taken)
