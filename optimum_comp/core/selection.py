"""Which input channels of a dense layer stay, by which metric, and the layer without the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_comp.core.quadratic import Elimination, Problem, eliminate, eliminate_units, optimum
from optimum_comp.core.recovery import FORMS, energy_of_kept, problem_of, recover, weight_of


def magnitude(weight: Tensor, gram: Tensor, generator: torch.Generator) -> Tensor:
    """Squared norm of each column of `W`, `[d_in]`."""
    return weight.square().sum(0)


def wanda(weight: Tensor, gram: Tensor, generator: torch.Generator) -> Tensor:
    """Weight energy × activation energy, `‖W_:j‖² G_jj`, `[d_in]`.

    The column form of Wanda (Sun et al., arXiv 2306.11695) that FASP (arXiv 2501.09412) uses.
    """
    return magnitude(weight, gram, generator) * gram.diagonal()


def random(weight: Tensor, gram: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform scores, `[d_in]`: the floor that any metric has to beat."""
    return torch.rand(weight.shape[1], generator=generator, dtype=torch.float64).to(weight)


SCORES: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "random": random,
}
"""Metrics that rank the channels once: `(weight [d_out, d_in], gram [d_in, d_in], generator) -> [d_in]`."""


@dataclass(frozen=True)
class Units:
    """Channels that go together.

    Attributes:
        channels: of each unit, ascending, `[units, width]`.
        classes: the class of each, `[units]`; as many stay of each class.
    """

    channels: Tensor
    classes: Tensor

    def to(self, device: torch.device) -> Units:
        """The same on another device."""
        return Units(self.channels.to(device), self.classes.to(device))

    def best(self, scores: Tensor, keep: int) -> Tensor:
        """The units with the highest scores `[units]`, `keep` of each class, ascending."""
        found = [
            members[torch.topk(scores[members], keep).indices]
            for members in (torch.nonzero(self.classes == each).flatten() for each in self.classes.unique())
        ]
        return torch.cat(found).sort().values


@dataclass(frozen=True)
class Reduction:
    """A dense layer with fewer input channels.

    Attributes:
        kept: indices of the channels that stay, ascending, `[channels]`.
        weight: the repaired weight, `[d_out, channels]`.
        scores: the score of every channel, or unit, before anything was removed.
        error: squared error that the removal leaves in the output, summed over tokens, compared with what the repair
            aims at.
        unrepaired: the same error of the columns that stay as they were before the repair; `None` where the Gram
            matrix was overwritten.
    """

    kept: Tensor
    weight: Tensor
    scores: Tensor
    error: float
    unrepaired: float | None = None

    def relative_error(self, energy: float) -> float:
        """The part that couldn't be kept: the error over it and the energy of the repaired output."""
        return self.error / (self.error + energy) if self.error > 0 else 0.0

    def relative_unrepaired_error(self, energy: float) -> float | None:
        """What `relative_error` would be without the repair: over the same sum, so never less than that.

        Above 1 where what is left is further from the aim than no output at all.
        """
        if self.unrepaired is None:
            return None
        whole = max(self.error, 0.0) + energy
        return max(self.unrepaired, 0.0) / whole if whole > 0 else 0.0


def reduce_channels(
    weight: Tensor,
    gram: Tensor,
    keep: int,
    *,
    metric: str,
    recovery: str,
    ridge: float,
    block_size: int,
    generator: torch.Generator,
    cross: Tensor | None = None,
    own_share: float = 0.0,
    root: Tensor | None = None,
    overwrite: bool = False,
    units: Units | None = None,
) -> Reduction:
    """Choose the input channels that stay, and repair the dense layer; in the Gram matrix's dtype.

    Where the metric is the form of the matrix condition that the recovery solves, one elimination gives both.

    Args:
        weight: `[d_out, d_in]` of the consumer.
        gram: `[d_in, d_in]`, not regularised.
        keep: how many stay; of units, in each class.
        metric: a name in `SCORES` or `FORMS`.
        recovery: a name in `RECOVERIES`.
        ridge: λ of `regularize`.
        block_size: channels removed between two evaluations of a matrix-condition metric; 0 ranks once.
        generator: source of the `random` metric.
        cross: cross moment `[d_out, d_in]` of what the output is to gain with the inputs; `None` for nothing.
        own_share: how much of the layer's own outputs `cross` holds (see `share_own`).
        root: by which a matrix-condition metric, and mask tuning, measure errors in the output (see `problem_of`);
            those of a `Reduction` are measured without.
        overwrite: the Gram matrix isn't needed any more; then no second one of its size is made where one serves,
            and `unrepaired` can't be worked out there.
        units: channels that go together, one unit at a time; `None`: each goes alone.

    Raises:
        FloatingPointError: the Gram matrix holds NaN or infinity.
        torch.linalg.LinAlgError: it can't be inverted (raise the ridge).
        ValueError: no such metric.
    """
    weight = weight.to(gram.dtype)
    block_size = block_size or weight.shape[1]

    def eliminated(problem: Problem) -> Elimination:
        if units is None:
            return eliminate(problem, keep, block_size, overwrite=True)
        return eliminate_units(problem, units.channels, units.classes, keep, overwrite=True)

    # A mask's cost is measured by the root, and would have to be worked out once more.
    if FORMS.get(metric) == recovery and (root is None or recovery != "mask"):
        is_gone = overwrite and metric == "condition_gram"
        problem = problem_of(metric, weight, gram, ridge, cross, own_share, root=root, overwrite=overwrite)
        # What was added to the diagonal: the elimination's cost counts it, too.
        shift = float(problem.matrix.diagonal().mean()) * ridge / (1 + ridge)
        found = eliminated(problem)
        plain = weight[:, found.kept]
        repaired = weight_of(metric, plain, found.target)
        unrepaired = None
        if not is_gone:
            # From the optimum on the kept channels, the error grows by the square of the way.
            moved = found.target - (plain if metric == "condition_gram" else 1)
            way = energy_of_kept(repaired - plain, gram, found.kept)
            unrepaired = found.cost + way + shift * float(moved.square().sum())
        return Reduction(found.kept, repaired, found.scores, found.cost, unrepaired)
    if metric in SCORES:
        scores = SCORES[metric](weight, gram, generator)
        if units is None:
            kept = torch.topk(scores, keep).indices.sort().values
        else:
            scores = scores[units.channels].sum(1)
            kept = units.channels[units.best(scores, keep)].flatten()
    else:
        problem = problem_of(metric, weight, gram, ridge, cross, own_share, root=root)
        found = eliminated(problem)
        kept, scores = found.kept, found.scores
    repaired = recover(recovery, weight, gram, kept, ridge, cross, own_share, root)
    aim = weight
    if cross is not None and recovery != "none":
        aim = optimum(problem_of("condition_gram", weight, gram, ridge, cross, own_share))
    difference = aim.clone()
    difference[:, kept] -= repaired
    change = repaired - weight[:, kept]
    product = difference @ gram
    crossed = 2 * float((product[:, kept] * change).sum())
    error = float(product.mul_(difference).sum())
    return Reduction(kept, repaired, scores, error, error + crossed + energy_of_kept(change, gram, kept))
