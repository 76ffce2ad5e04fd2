"""The loss of distillation, in a memory of its own size; pure tensor mathematics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


_CHUNK_VALUES = 2**23
"""Logits that are worked on in float32 at a time."""


class _Divergence(torch.autograd.Function):
    """Kullback-Leibler divergence of the student's predictions from the teacher's, and its gradient, in one pass.

    Of the vocabulary's size there is one tensor beside the two that are given, in the student's dtype: the gradient
    `(softmax(s) − softmax(t)) / n` is what is kept for the way back.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        count, vocabulary = student.shape
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        step = max(1, _CHUNK_VALUES // vocabulary)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            wanted = torch.log_softmax(teacher[rows].float(), -1)
            found = torch.log_softmax(student[rows].float(), -1)
            share = wanted.exp()
            total += (share * (wanted - found)).sum(dtype=torch.float64)
            if gradient is not None:
                gradient[rows] = found.exp_().sub_(share).div_(count).to(student.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return (total / count).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * above[0].to(gradient.dtype), None


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence `KL(teacher ‖ student)` of next-token predictions, in nats, over all positions.

    The forward form of Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), at
    temperature 1: its gradient is that of the cross-entropy to the teacher's whole distribution, so every token of
    text teaches as many numbers as the vocabulary has.

    Args:
        student: logits `[..., vocabulary]`; the gradient goes here.
        teacher: logits of the same shape.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits are {list(student.shape)} and the teacher's {list(teacher.shape)}; both must have "
            "one vocabulary."
        )
    found: Tensor = _Divergence.apply(student.flatten(0, -2), teacher.flatten(0, -2).detach())
    return found
