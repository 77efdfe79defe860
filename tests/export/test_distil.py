from __future__ import annotations

import math
from pathlib import Path

import pytest

from edge_ll.config import load
from edge_ll_export.recipe import Fitting, Recipe

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

RECIPE = load(Path(__file__).parents[2] / "export" / "recipes" / "digits.toml", Recipe)
SHORT = Fitting(epochs=4, batch=64, lr=4e-3)


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    from edge_ll_export.data import load_dataset

    return load_dataset(RECIPE)


@pytest.fixture(scope="module")
def data(digits):
    from edge_ll_export.fit import training_set

    return training_set(RECIPE, *digits)


@pytest.fixture(scope="module")
def teacher(data):
    from edge_ll_export.models import build_teacher
    from edge_ll_export.pretrain import pretrain_teacher

    model = build_teacher(RECIPE)
    pretrain_teacher(model, data, fitting=SHORT, seed=0)
    return model


def _distilled(teacher, data, **over):
    from edge_ll_export.distil import distil_student
    from edge_ll_export.models import build_student

    student = build_student(RECIPE)
    arguments = {"fitting": SHORT, "distil": RECIPE.distil, "seed": 0} | over
    distil_student(teacher, student, data, **arguments)
    return student


def _softmax(logits, temperature):
    powers = [math.exp(value / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (4.0, 0.7), (2.0, 0.0)])
def test_the_loss_is_the_formula(temperature, weight):
    from edge_ll_export.distil import distillation_loss

    student, teacher = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], [[2.0, 0.0, -1.0], [1.0, 1.0, 4.0]]
    labels = [0, 2]
    expected = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        p, q = _softmax(t, temperature), _softmax(s, temperature)
        soft = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        hard = -math.log(_softmax(s, 1.0)[label])
        expected += (weight * temperature**2 * soft + (1 - weight) * hard) / 2
    actual = distillation_loss(
        torch.tensor(student),
        torch.tensor(teacher),
        torch.tensor(labels),
        temperature=temperature,
        weight=weight,
    )
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_masked_classes_add_nothing_and_get_no_gradient():
    from edge_ll_export.distil import distillation_loss
    from edge_ll_export.fit import class_mask

    mask = class_mask([0, 2], 4)
    student = torch.tensor([[0.3, 5.0, -1.0, 9.0]], requires_grad=True)
    teacher, labels = torch.tensor([[1.0, 7.0, 0.0, -3.0]]), torch.tensor([2])
    masked = distillation_loss(student + mask, teacher + mask, labels, temperature=4.0, weight=0.7)
    masked.backward()
    assert student.grad[0, [1, 3]].abs().max() == 0
    alone = distillation_loss(
        student[:, [0, 2]],
        teacher[:, [0, 2]],
        torch.tensor([1]),
        temperature=4.0,
        weight=0.7,
    )
    assert masked.item() == pytest.approx(alone.item(), rel=1e-5)


def test_no_gradient_flows_into_the_teacher():
    from edge_ll_export.distil import distillation_loss

    student, teacher = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    labels = torch.tensor([0, 1])
    distillation_loss(student, teacher, labels, temperature=2.0, weight=0.5).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_a_short_run_learns_and_reports_its_progress(digits, data, teacher):
    from edge_ll_export.fit import accuracy

    dataset, split = digits
    seen = []
    student = _distilled(
        teacher,
        data,
        fitting=Fitting(epochs=10, batch=64, lr=4e-3),
        on_epoch=lambda epoch, epochs, loss: seen.append((epoch, epochs, loss)),
    )
    assert [item[:2] for item in seen] == [(epoch, 10) for epoch in range(1, 11)]
    assert seen[-1][2] < seen[0][2] / 4
    assert not student.training
    x, y = torch.from_numpy(dataset.x), torch.from_numpy(dataset.y)
    rows = split.traffic
    assert accuracy(student, x[rows], y[rows], mask=data.mask) > 0.8
    assert accuracy(teacher, x[rows], y[rows], mask=data.mask) > 0.8


def test_the_same_seed_gives_the_same_student(data, teacher):
    first, again = _distilled(teacher, data), _distilled(teacher, data)
    other = _distilled(teacher, data, seed=1)
    flat = [torch.cat([p.flatten() for p in s.parameters()]) for s in (first, again, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_without_a_teacher_the_labels_remain(data, teacher):
    from edge_ll_export.recipe import Distil

    alone = _distilled(None, data)
    labels_only = _distilled(teacher, data, distil=Distil(temperature=4.0, weight=0.0))
    pairs = zip(alone.parameters(), labels_only.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_outputs_of_unseen_classes_stay_as_they_were_drawn(data):
    from edge_ll_export.models import build_student

    student = _distilled(None, data, fitting=Fitting(epochs=1, batch=64, lr=4e-3))
    before = build_student(RECIPE).tail.layers[-1].weight[6:]
    assert torch.equal(student.tail.layers[-1].weight[6:], before)


def test_too_little_data_is_refused(data):
    from dataclasses import replace

    with pytest.raises(ValueError, match="at least two samples, got 1"):
        _distilled(None, replace(data, x=data.x[:1], y=data.y[:1]))
