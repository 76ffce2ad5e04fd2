"""The loss of distillation, in a memory of its own size; pure tensor mathematics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


_CHUNK_VALUES, _CHUNK_VALUES_GPU = 2**18, 2**23
"""Logits that are worked on in float32 at a time: on a processor, as many as stay in its cache and need no new pages
of memory (three to five times as fast as 2^23)."""


class _Loss(torch.autograd.Function):
    """Divergence of the student's predictions from the teacher's and from what the text says, and its gradient.

    Of the vocabulary's size there is one tensor beside the two that are given, in the student's dtype: the gradient
    `(softmax(s) − (1 − a) softmax(t) − a · label) / n` is what is kept for the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor, offsets: Tensor | None
    ) -> Tensor:
        count, vocabulary = student.shape
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        most = _CHUNK_VALUES if student.device.type == "cpu" else _CHUNK_VALUES_GPU
        step = max(1, most // vocabulary)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            wanted, found = (
                torch.log_softmax(logits.float() if offsets is None else logits.float() + offsets, -1)
                for logits in (teacher[rows], student[rows])
            )
            share, weight, label = wanted.exp(), weights[rows, None], labels[rows, None]
            total += ((1 - weight) * share * (wanted - found)).sum(dtype=torch.float64)
            total -= (weight * found.gather(1, label)).sum(dtype=torch.float64)
            if gradient is not None:
                share.mul_(1 - weight).scatter_add_(1, label, weight)
                gradient[rows] = found.exp_().sub_(share).div_(count).to(student.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return (total / count).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * above[0].to(gradient.dtype), None, None, None, None


def divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    share: float | Tensor = 0.0,
    offsets: Tensor | None = None,
) -> Tensor:
    """Mean Kullback-Leibler divergence `KL(teacher ‖ student)` of next-token predictions, in nats, over all positions.

    The forward form of Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), at
    temperature 1: its gradient is that of the cross-entropy to the teacher's whole distribution, so every token of
    text teaches as many numbers as the vocabulary has. As there, the tokens that do come next can count, too:
    `(1 − a) KL(teacher ‖ student) − a log student(label)`.

    Args:
        student: logits `[..., vocabulary]`; the gradient goes here.
        teacher: logits of the same shape.
        labels: the tokens that come next, `[...]`; negative where none is known, and there only the teacher counts.
        share: `a`, how much they count, in [0, 1]: everywhere, or for each position, `[...]`.
        offsets: added to the logits of both, `[vocabulary]`: the logarithm of how many tokens each stands for, where
            some stand for others that were left out.

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
    known = torch.zeros(student.shape[:-1], dtype=torch.int64, device=student.device) if labels is None else labels
    shares = torch.as_tensor(share if labels is not None else 0.0, dtype=torch.float32, device=student.device)
    weights = torch.where(known < 0, 0.0, shares).flatten()
    found: Tensor = _Loss.apply(
        student.flatten(0, -2), teacher.flatten(0, -2).detach(), known.clamp(min=0).flatten(), weights, offsets
    )
    return found


def grouped(
    logits: Tensor,
    own: Tensor,
    members: Tensor,
    groups: Tensor,
    offsets: Tensor | None = None,
    group_offsets: Tensor | None = None,
) -> Tensor:
    """Logits of groups of tokens: a group is as likely as all its tokens together.

    Args:
        logits: `[n, tokens]`.
        own: a token of each group, `[groups]`.
        members: further tokens that are in a group, `[m]`; those that are in none don't count.
        groups: the group of each of these, `[m]`.
        offsets: added to the logits first, `[tokens]`, as in `divergence`.
        group_offsets: taken off what comes out, `[groups]`, where `divergence` will add it.

    Returns:
        `[n, groups]`, float32: `log Σ exp(logit)` over each group's tokens.
    """
    found = torch.empty(len(logits), len(own), device=logits.device)
    most = _CHUNK_VALUES if logits.device.type == "cpu" else _CHUNK_VALUES_GPU
    step = max(1, most // logits.shape[1])
    smallest = torch.finfo(torch.float32).tiny
    for start in range(0, len(logits), step):
        rows = logits[start : start + step].float()
        if offsets is not None:
            rows = rows + offsets
        largest = rows.amax(-1, keepdim=True)
        likely = (rows - largest).exp_()
        sums = likely.index_select(1, own).index_add_(1, groups, likely.index_select(1, members))
        # What is too unlikely for a number is so in every case.
        part = sums.clamp_(min=smallest).log_().add_(largest)
        found[start : start + step] = part if group_offsets is None else part - group_offsets
    return found
