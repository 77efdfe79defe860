"""The server's run, from a recipe to a trained student: pre-train, distil, compare, keep.

:func:`train` gives a :class:`Trained`, which can be saved to a folder and read again;
:mod:`edge_ll_export.pack` turns it into a bundle.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from edge_ll import config
from edge_ll.errors import DataError
from edge_ll_export.data import Dataset, Split, load_dataset
from edge_ll_export.distil import distil_student
from edge_ll_export.fit import TrainingSet, accuracy, training_set
from edge_ll_export.models import Student, build_student, build_teacher
from edge_ll_export.models.backbones import Remembered
from edge_ll_export.models.teacher import AnyTeacher, HeadTeacher
from edge_ll_export.pretrain import pretrain_teacher
from edge_ll_export.recipe import Recipe

Progress = Callable[[str, int, int, float], None]
"""Told (stage, epoch from 1, epochs, mean loss)."""

RECIPE, WEIGHTS, METRICS = "recipe.toml", "student.npz", "metrics.json"


@dataclass(frozen=True)
class Metrics:
    """Accuracy on the base classes of the test split, and what the run took."""

    teacher_acc: float
    student_acc: float
    student_acc_without_teacher: float
    train_seconds: float


@dataclass(frozen=True)
class Trained:
    """A student in evaluation mode, with what it was made from."""

    recipe: Recipe
    dataset: Dataset
    split: Split
    student: Student
    metrics: Metrics


def train(recipe: Recipe, *, on_progress: Progress | None = None) -> Trained:
    """Pre-train the teacher, distil the student, and train the same student without a teacher.

    Raises:
        DataError: The data is missing or damaged.
    """
    started = time.perf_counter()
    torch.set_num_threads(recipe.threads)
    dataset, split = load_dataset(recipe)
    data = training_set(recipe, dataset, split)
    told = on_progress or (lambda *_: None)

    teacher = build_teacher(recipe)
    students = {stage: build_student(recipe) for stage in ("student", "student without teacher")}
    _remember(teacher, list(students.values()))
    teacher.calibrate(data.x)
    pretrain_teacher(
        teacher,
        data,
        fitting=recipe.teacher.fit,
        seed=recipe.seed,
        on_epoch=lambda *at: told("teacher", *at),
    )
    for stage, student in students.items():
        student.calibrate(data.x)
        distil_student(
            teacher if stage == "student" else None,
            student,
            data,
            fitting=recipe.student.fit,
            distil=recipe.distil,
            seed=recipe.seed,
            on_epoch=lambda *at, stage=stage: told(stage, *at),
        )
    metrics = Metrics(
        teacher_acc=_base_accuracy(teacher, dataset, split, data),
        student_acc=_base_accuracy(students["student"], dataset, split, data),
        student_acc_without_teacher=_base_accuracy(
            students["student without teacher"], dataset, split, data
        ),
        train_seconds=time.perf_counter() - started,
    )
    student = students["student"]
    if isinstance(student.backbone, Remembered):
        student.backbone = student.backbone.backbone
    return Trained(recipe, dataset, split, student.eval(), metrics)


def _remember(teacher: AnyTeacher, students: list[Student]) -> None:
    """Where backbones are frozen: encode each sample once for the teacher, once for students."""
    if isinstance(teacher, HeadTeacher) and teacher.backbone.frozen:
        teacher.backbone = Remembered(teacher.backbone)
    shared = students[0].backbone
    if shared.frozen:
        remembered = Remembered(shared)
        for student in students:
            student.backbone = remembered


def _base_accuracy(
    model: torch.nn.Module, dataset: Dataset, split: Split, data: TrainingSet
) -> float:
    x, y = dataset.x[split.test], dataset.y[split.test]
    base = (data.mask == 0).nonzero().flatten().numpy()
    rows = np.isin(y, base)
    return accuracy(model, torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), mask=data.mask)


def save_trained(trained: Trained, folder: Path, recipe_file: Path) -> None:
    """Keep a run: the recipe as it was written, the weights as plain arrays, the metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipe_file, folder / RECIPE)
    weights = {name: value.numpy() for name, value in trained.student.state_dict().items()}
    np.savez(folder / WEIGHTS, **weights)
    (folder / METRICS).write_text(json.dumps(asdict(trained.metrics), indent=1), encoding="utf-8")


def load_trained(folder: Path) -> Trained:
    """Read what :func:`save_trained` kept.

    Raises:
        ConfigError: The recipe is wrong.
        DataError: A file is missing or damaged, or does not fit the recipe.
    """
    recipe = config.load(folder / RECIPE, Recipe)
    dataset, split = load_dataset(recipe)
    student = build_student(recipe)
    try:
        metrics = msgspec.json.decode((folder / METRICS).read_bytes(), type=Metrics)
        with np.load(folder / WEIGHTS, allow_pickle=False) as file:
            weights = {name: torch.from_numpy(file[name]) for name in file.files}
        student.load_state_dict(weights)
    except (OSError, ValueError, RuntimeError, EOFError, msgspec.MsgspecError) as error:
        raise DataError(
            f"{folder}: expected a folder written by `edge-ll train`: {error}"
        ) from error
    return Trained(recipe, dataset, split, student.eval(), metrics)
