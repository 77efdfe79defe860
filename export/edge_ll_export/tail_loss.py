"""The training loss, written once: torch computes it, both engines' graphs come from it.

Per-sample weights and targets are inputs, so a method of continual learning is a way of filling a
batch (see :class:`edge_ll.engine.Batch`), not code:

| term | formula, mean over the batch | used by |
|---|---|---|
| cross-entropy | ``ce_weight * -log softmax(logits + class_mask)[label]`` | every method |
| logit distance | ``target_weight * mean_c (logits - target_logits)²`` | DER, DER++ |

DER: Buzzega et al., NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_ll.engine.port import Batch
from edge_ll.manifest import ThetaEntry

BATCH_NAMES = Batch._fields


def tail_loss(
    logits: Tensor,
    labels: Tensor,
    ce_weight: Tensor,
    class_mask: Tensor,
    target_logits: Tensor,
    target_weight: Tensor,
) -> Tensor:
    """The loss of one batch, a scalar; shapes and dtypes as in :class:`edge_ll.engine.Batch`."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    chosen = (labels.unsqueeze(1) == classes).to(logits.dtype)
    log_probability = F.log_softmax(logits + class_mask, dim=1)
    cross_entropy = -(chosen * log_probability).sum(dim=1)
    difference = logits - target_logits
    distance = (difference * difference).mean(dim=1)
    return (ce_weight * cross_entropy + target_weight * distance).mean()


class TailLoss(nn.Module):
    """A tail together with its loss: the module that is exported for training."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.tail = tail

    def forward(
        self,
        latents: Tensor,
        labels: Tensor,
        ce_weight: Tensor,
        class_mask: Tensor,
        target_logits: Tensor,
        target_weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The loss (scalar) and the logits, float32 [N, C]."""
        logits = self.tail(latents)
        loss = tail_loss(logits, labels, ce_weight, class_mask, target_logits, target_weight)
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
    return {
        entry.name: theta[entry.offset : entry.offset + entry.size].reshape(entry.shape)
        for entry in layout
    }


def join_theta(parameters: Mapping[str, Tensor], layout: tuple[ThetaEntry, ...]) -> Tensor:
    """The inverse of :func:`split_theta`: one vector from tensors by name."""
    return torch.cat([parameters[entry.name].reshape(-1) for entry in layout])


def example_batch(module: nn.Module, sizes: tuple[int, ...]) -> int:
    """A batch size that no other axis has: tracing takes equal sizes for the same axis."""
    taken = {size for parameter in module.parameters() for size in parameter.shape} | {*sizes, 0, 1}
    return next(n for n in range(2, 2 + len(taken) + 1) if n not in taken)
