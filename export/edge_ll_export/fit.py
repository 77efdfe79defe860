"""The training loop that teacher and student share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge_ll_export.augment import Augmentation, build_augmentation
from edge_ll_export.data import Dataset, Split
from edge_ll_export.recipe import Fitting, Recipe

OnEpoch = Callable[[int, int, float], None]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

_MASKED = -1e9  # added to a logit: its probability becomes zero, its gradient vanishes


def class_mask(classes: Sequence[int], capacity: int) -> Tensor:
    """What to add to logits so that only ``classes`` take part: float32 ``[capacity]``.

    Outputs that have no samples yet would otherwise be pushed down for epochs, and a device that
    meets such a class later would first have to undo that.
    """
    mask = torch.full((capacity,), _MASKED)
    mask[list(classes)] = 0.0
    return mask


@dataclass(frozen=True)
class TrainingSet:
    """What teacher and student are trained on.

    Attributes:
        x: Raw samples ``[N, ...]`` of the base classes.
        y: int64 ``[N]``.
        mask: Of the base classes, float32 ``[capacity]``; added to all logits.
        augment: Applied to every raw batch.
    """

    x: Tensor
    y: Tensor
    mask: Tensor
    augment: Augmentation


def training_set(recipe: Recipe, dataset: Dataset, split: Split) -> TrainingSet:
    """The training part of ``split`` under the recipe's augmentation and base classes."""
    return TrainingSet(
        x=torch.from_numpy(dataset.x[split.train]),
        y=torch.from_numpy(dataset.y[split.train]),
        mask=class_mask(recipe.classes.base, recipe.classes.capacity),
        augment=build_augmentation(recipe),
    )


def fit(
    model: nn.Module,
    data: TrainingSet,
    *,
    loss: Loss,
    fitting: Fitting,
    seed: int,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Train ``model`` in place and leave it in evaluation mode.

    AdamW (Loshchilov and Hutter, 2019) under a one-cycle learning rate (Smith and Topin, 2018).

    Args:
        model: Takes raw batches, gives logits.
        data: Samples, labels, mask and augmentation.
        loss: Of ``(raw batch, masked logits, labels)``, a scalar.
        fitting: Epochs, batch, learning rate and weight decay.
        seed: Of order and augmentation; the same seed gives the same weights.
        on_epoch: Told ``(epoch from 1, epochs, mean loss)``.

    Raises:
        ValueError: There are fewer than two samples.
    """
    count = len(data.x)
    if count < 2:
        raise ValueError(f"training needs at least two samples, got {count}")
    generator = torch.Generator().manual_seed(seed)
    batch = min(fitting.batch, count)
    steps = count // batch  # a rest would give batch norm too few samples; it changes by epoch
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=fitting.lr, weight_decay=fitting.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=fitting.lr, total_steps=fitting.epochs * steps
    )
    model.train()
    for epoch in range(1, fitting.epochs + 1):
        order = torch.randperm(count, generator=generator)
        total = 0.0
        for rows in order[: steps * batch].view(steps, batch):
            views = data.augment(data.x[rows], generator)
            value = loss(views, model(views) + data.mask, data.y[rows])
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += value.item()
        if on_epoch is not None:
            on_epoch(epoch, fitting.epochs, total / steps)
    model.eval()


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, *, mask: Tensor, batch: int = 512) -> Tensor:
    """Class ids int64 ``[N]`` for raw samples, among the classes that ``mask`` lets through."""
    model.eval()
    return torch.cat([(model(part) + mask).argmax(dim=1) for part in torch.split(x, batch)])


def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, mask: Tensor) -> float:
    """Share of ``x`` that ``model`` gives its label ``y``."""
    return float((predict(model, x, mask=mask) == y).to(torch.float32).mean())
