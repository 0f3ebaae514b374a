"""The divergence of two predictions, by torch's own and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_sparse.functional import distillation_loss
from tests.helpers.oracles import sample


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_divergence_of_torch(temperature: float) -> None:
    student, teacher = sample(6, 10), sample(6, 10, seed=1)
    softened = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    expected = F.kl_div(*softened, reduction="batchmean", log_target=True) * temperature**2
    torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected)


def test_maps_and_tokens_are_means_over_all_positions() -> None:
    student, teacher = sample(2, 5, 3, 4), sample(2, 5, 3, 4, seed=1)
    found = distillation_loss(student, teacher, 2.0, dim=1)
    flat = distillation_loss(student.movedim(1, -1).flatten(0, 2), teacher.movedim(1, -1).flatten(0, 2), 2.0)
    torch.testing.assert_close(found, flat)


def test_the_gradient_keeps_its_size_and_stays_with_the_student() -> None:
    """For high temperatures it is that of half the squared distance of the logits over classes, whatever the temperature."""
    student, teacher = sample(4, 3).requires_grad_(), sample(4, 3, seed=1).requires_grad_()
    distillation_loss(student, teacher, 1000.0).backward()  # type: ignore[no-untyped-call]
    centered = [(z - z.mean(1, keepdim=True)).detach() for z in (student, teacher)]
    torch.testing.assert_close(student.grad, (centered[0] - centered[1]) / 12, rtol=1e-2, atol=1e-3)
    assert teacher.grad is None


def test_low_precision_is_computed_in_float32() -> None:
    assert distillation_loss(torch.zeros(2, 3).bfloat16(), torch.ones(2, 3).bfloat16()).dtype == torch.float32


def test_classes_that_are_ruled_out_add_nothing() -> None:
    student, teacher = sample(6, 4).requires_grad_(), sample(6, 4, seed=1)
    expected = distillation_loss(student[:, :3], teacher[:, :3])
    (gradient,) = torch.autograd.grad(expected, student)
    masked = student.masked_fill(torch.tensor([False, False, False, True]), -torch.inf)
    found = distillation_loss(masked, teacher.masked_fill(torch.tensor([False, False, False, True]), -torch.inf))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], gradient)
