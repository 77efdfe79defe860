"""Pre-training of the teacher on the base classes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from edge_ll_export.fit import OnEpoch, TrainingSet, fit
from edge_ll_export.models.teacher import AnyTeacher
from edge_ll_export.recipe import Fitting


def pretrain_teacher(
    teacher: AnyTeacher,
    data: TrainingSet,
    *,
    fitting: Fitting,
    seed: int,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Train ``teacher`` in place with cross-entropy and leave it in evaluation mode.

    Args:
        teacher: Fresh from ``build_teacher``.
        data: From ``training_set``.
        fitting: Epochs, batch, learning rate and weight decay.
        seed: Of order and augmentation.
        on_epoch: Told ``(epoch from 1, epochs, mean loss)``.
    """

    def loss(_views: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    teacher.calibrate(data.x)
    fit(teacher, data, loss=loss, fitting=fitting, seed=seed, on_epoch=on_epoch)
