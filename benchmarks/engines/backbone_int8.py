"""The int8 backbone next to the float32 one: a student of the recipe fsdd, trained for this.

Runs where torch is: ``python -m benchmarks.engines.backbone_int8`` prints one JSON value. Training
takes fewer epochs than the recipe says: enough for an accuracy that int8 can lose.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from benchmarks.engines.student import recipe
from edge_ll.errors import DataError
from edge_ll_export.graphs import export_backbone, export_tail
from edge_ll_export.pipeline import train
from edge_ll_export.precision import compare_precisions
from edge_ll_export.quantize_backbone import quantize_backbone
from edge_ll_export.recipe import Recipe
from edge_ll_export.tail_loss import flatten_theta

_EPOCHS = 8
_CALIBRATION = 200


def measure() -> dict[str, Any]:
    """``{"speedup": float32 time / int8 time, "acc_change": int8 - float32, ...}``.

    Both at batch 1, one thread, on the installed runtime; without the data set the reason instead.
    """
    table = _short(recipe())
    try:
        trained = train(table)
    except DataError as error:
        return {"speedup": None, "acc_change": None, "reason": str(error)}
    student, x, y = trained.student, trained.dataset.x, trained.dataset.y
    held = trained.split.test[np.isin(y[trained.split.test], table.classes.base)]
    backbone = export_backbone(student.backbone, torch.from_numpy(x[trained.split.train[:7]]))
    report = compare_precisions(
        backbone,
        quantize_backbone(backbone, x[trained.split.train[:_CALIBRATION]]),
        tail=(
            export_tail(student.tail, student.latent_shape),
            flatten_theta(student.tail).numpy(),
        ),
        x=x[held],
        y=y[held],
        classes=table.classes.base,
        max_accuracy_loss=1.0,
    )
    return {
        "speedup": round(report.speeds[0].speedup, 2),
        "acc_change": round(report.acc_change, 4),
        "speedup_batch_16": round(report.speeds[1].speedup, 2),
        "right_of": [report.int8.correct, report.float32.correct, report.int8.n],
        "size": round(report.int8_bytes / report.float32_bytes, 2),
        "runtime": report.runtime,
    }


def _short(table: Recipe) -> Recipe:
    student, teacher = table.student, table.teacher
    return replace(
        table,
        student=replace(student, fit=replace(student.fit, epochs=_EPOCHS)),
        teacher=replace(teacher, fit=replace(teacher.fit, epochs=_EPOCHS)),
    )


if __name__ == "__main__":
    print(json.dumps(measure()))
