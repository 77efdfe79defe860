"""Distillation: the student learns from labels and from the teacher's soft answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_ll_export.fit import OnEpoch, TrainingSet, fit
from edge_ll_export.models.student import Student
from edge_ll_export.models.teacher import AnyTeacher
from edge_ll_export.recipe import Distil, Fitting


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    weight: float,
) -> Tensor:
    """``weight * T^2 * KL(teacher_T || student_T) + (1 - weight) * CE(student, labels)``.

    ``p_T`` is the softmax of logits divided by ``T``; both terms are means over the batch. The
    factor ``T^2`` keeps the soft gradients as large as the hard ones when ``T`` changes.

    Source: G. Hinton, O. Vinyals, J. Dean, Distilling the Knowledge in a Neural Network, 2015.

    Args:
        student_logits: float32 ``[N, C]``, masked where a class is not in use.
        teacher_logits: float32 ``[N, C]``, masked alike; no gradient flows into it.
        labels: int64 ``[N]``.
        temperature: ``T > 0``.
        weight: Share of the soft loss, 0 to 1.
    """
    soft_student = F.log_softmax(student_logits / temperature, dim=1)
    soft_teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    soft = F.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
    hard = F.cross_entropy(student_logits, labels)
    return weight * temperature**2 * soft + (1 - weight) * hard


def distil_student(
    teacher: AnyTeacher | None,
    student: Student,
    data: TrainingSet,
    *,
    fitting: Fitting,
    distil: Distil,
    seed: int,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Train ``student`` in place and leave it in evaluation mode.

    The teacher sees the same augmented views as the student. Without a teacher the student
    learns from labels alone, with the same seed, order, views and steps: a fair comparison.

    Args:
        teacher: Pre-trained, or None for labels alone.
        student: Fresh from ``build_student``.
        data: From ``training_set``.
        fitting: Epochs, batch, learning rate and weight decay.
        distil: Temperature and share of the soft loss.
        seed: Of order and augmentation.
        on_epoch: Told ``(epoch from 1, epochs, mean loss)``.
    """

    def loss(views: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        if teacher is None:
            return F.cross_entropy(logits, labels)
        with torch.no_grad():
            answers = teacher(views)
        return distillation_loss(
            logits,
            answers + data.mask,
            labels,
            temperature=distil.temperature,
            weight=distil.weight,
        )

    if teacher is not None:
        teacher.eval()
    student.calibrate(data.x)
    fit(student, data, loss=loss, fitting=fitting, seed=seed, on_epoch=on_epoch)
