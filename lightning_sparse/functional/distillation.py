"""The distance between a student's and a teacher's predictions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["distillation_loss"]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0, dim: int = -1) -> Tensor:
    r"""The Kullback-Leibler divergence of softened predictions, times the square of the temperature.

    $$ T^2 \; \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\big) $$

    The sum over classes, the mean over everything else, in float32 or wider. The factor keeps the size of the gradients when
    the temperature changes.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531.

    Args:
        student: logits.
        teacher: logits of the same shape; a constant.
        temperature: T, positive.
        dim: the class dimension.

    Example:
        >>> round(float(distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))), 4)
        0.4438
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    ours = F.log_softmax(student.to(wide) / temperature, dim)
    theirs = F.log_softmax(teacher.detach().to(wide) / temperature, dim)
    ratio = (theirs - ours).masked_fill(theirs == -torch.inf, 0)  # a class that the teacher rules out adds nothing
    return (theirs.exp() * ratio).sum(dim).mean() * temperature**2
