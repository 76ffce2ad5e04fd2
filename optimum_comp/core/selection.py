"""Which input channels of a dense layer stay: the importance metrics, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optimum_comp.core.gram import regularize
from optimum_comp.core.quadratic import Problem, eliminate, gram_form, mask_form, mask_gram


def magnitude(weight: Tensor, gram: Tensor, generator: torch.Generator) -> Tensor:
    """Squared norm of each column of `W`, `[d_in]`."""
    return weight.double().square().sum(0)


def wanda(weight: Tensor, gram: Tensor, generator: torch.Generator) -> Tensor:
    """Weight energy × activation energy, `‖W_:j‖² G_jj`, `[d_in]`.

    The column form of Wanda (Sun et al., arXiv 2306.11695) that FASP (arXiv 2501.09412) uses.
    """
    return magnitude(weight, gram, generator) * gram.diagonal()


def random(weight: Tensor, gram: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform scores, `[d_in]`: the floor that any metric has to beat."""
    return torch.rand(weight.shape[1], generator=generator, dtype=torch.float64).to(weight.device)


SCORES: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "random": random,
}
"""Metrics that rank the channels once: `(weight [d_out, d_in], gram [d_in, d_in], generator) -> [d_in]`."""

CONDITION_FORMS = ("condition_gram", "condition_mask")
"""Metrics that discount energy by the matrix condition and change as channels go."""


def condition_problem(metric: str, weight: Tensor, gram: Tensor, ridge: float, cross: Tensor | None = None) -> Problem:
    """The regularised quadratic problem that a form of the matrix-condition metric stands for."""
    if metric == "condition_gram":
        return gram_form(weight, regularize(gram, ridge), cross)
    if metric == "condition_mask":
        return mask_form(weight, regularize(mask_gram(weight, gram), ridge), cross)
    raise ValueError(f"neuron metric {metric!r} has no quadratic form; these have: {', '.join(CONDITION_FORMS)}.")


def select_channels(
    metric: str,
    weight: Tensor,
    gram: Tensor,
    keep: int,
    *,
    ridge: float,
    block_size: int,
    generator: torch.Generator,
    cross: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the input channels that stay.

    Args:
        metric: a name in `SCORES` or `CONDITION_FORMS`.
        weight: `[d_out, d_in]` of the consumer.
        gram: `[d_in, d_in]`, not regularised.
        keep: how many stay.
        ridge: λ of `regularize`.
        block_size: channels removed between two evaluations of a matrix-condition metric; 0 ranks once.
        generator: source of the `random` metric.
        cross: aims a matrix-condition metric at the outputs that the recovery will aim at.

    Returns:
        Kept indices ascending, `[keep]`, and every channel's score before anything was removed, `[d_in]`.
    """
    if metric in SCORES:
        scores = SCORES[metric](weight, gram, generator)
        return torch.topk(scores, keep).indices.sort().values, scores
    problem = condition_problem(metric, weight, gram, ridge, cross)
    return eliminate(problem, keep, block_size or weight.shape[1])
