"""What is summed up over the calibration samples of one dense layer, and what its repair is aimed at."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from optimum_comp.core.equalization import Room
from optimum_comp.core.gram import add_cross_moment
from optimum_comp.core.recovery import foreseeable
from optimum_comp.core.selection import Units
from optimum_comp.core.surgery import Counts, channels_of
from optimum_comp.families import HEADS, KV
from optimum_comp.sweep.folding import Factors
from optimum_comp.sweep.junction import Junction


@dataclasses.dataclass
class Moments:
    """What a layer's consumer saw on the calibration samples, summed over all processes.

    Attributes:
        gram: second moments of its inputs, `[width, width]`.
        cross: cross moment of what its output is to gain with its inputs, `[hidden, width]`, or `None`.
        own_share: how much of its own outputs `cross` holds (see `quadratic.share_own`).
        weight: its weight as the residual stream sees it (see `Junction.gained`), `[hidden, width]`, with the effect
            of removed layers behind it fitted in where that has to come before the choice.
        plain: the weight as it is.
        junction: how its output reaches the residual stream.
        factors: what evens out the inputs of the layer's other dense layers, by parameter.
        largest: largest absolute value of each of the consumer's inputs, `[width]`; `None` if nobody asks.
        room: exponents that scales of these inputs may have for what makes them; likewise.
    """

    gram: Tensor
    cross: Tensor | None
    own_share: float
    weight: Tensor
    plain: Tensor
    junction: Junction
    factors: Factors = dataclasses.field(default_factory=dict)
    largest: Tensor | None = None
    room: Room | None = None


@dataclasses.dataclass(frozen=True)
class Output:
    """What a dense weight makes of a batch, where that matters.

    Attributes:
        output: without its bias, `[..., d_out]`; `None` where no norm follows.
        scales: of the norm, `[...]`; likewise.
    """

    output: Tensor | None = None
    scales: Tensor | None = None

    @property
    def token_weights(self) -> Tensor | None:
        """Weight of each token's squared error, `[...]`; `None` weighs all alike."""
        return None if self.scales is None else self.scales.square()


@dataclasses.dataclass
class Aim:
    """Where the dense model's hidden states are, as a cross moment with a consumer's inputs.

    Without a norm behind the consumer that is linear: the moment is of all that it is to contribute, its own part and
    the share that is asked for are accounted for afterwards (see `quadratic.share_own`). With one, the moment is of
    what is lacking, and only what inputs foretell of it is kept (see `recovery.foreseeable`); start tokens, which are
    out of all proportion in such models, are left as they are.

    Attributes:
        junction: how the consumer's output reaches the residual stream.
        alignment: share of what is lacking that is aimed at.
        start: positions at a sample's beginning that hold start tokens.
        moments: one `[d_out, d_in]`; behind a norm two, of the first and the second half of every sample.
    """

    junction: Junction
    alignment: float
    start: int
    moments: list[Tensor]

    def add(self, wanted: Tensor, own: Output, inputs: Tensor) -> None:
        """Add a batch: what the consumer is to contribute `[batch, length, d_out]`, and its inputs."""
        if own.output is None:
            add_cross_moment(self.moments[0], self.junction.target(wanted, None), inputs)
            return
        lacking = self.alignment * (wanted - self.junction.contribution(own.output))
        target = self.junction.target(lacking, own.scales)
        half = wanted.shape[1] // 2
        for moment, part in zip(self.moments, (slice(self.start, half), slice(half, None)), strict=True):
            add_cross_moment(moment, target[:, part], inputs[:, part])

    def result(self, gram: Tensor, ridge: float) -> tuple[Tensor, float]:
        """The moment, and how much of the consumer's own outputs it holds."""
        if len(self.moments) == 1:
            return self.moments[0].mul_(self.alignment), self.alignment
        return foreseeable((self.moments[0], self.moments[1]), gram, ridge), 0.0


def units_of(axis: str, counts: Counts, channels: int) -> Units:
    """The units of an attention axis among the channels that its consumer reads.

    Args:
        axis: `kv` or `heads`.
        counts: heads and groups.
        channels: how many there are.
    """
    units = torch.arange(counts[axis])
    classes = torch.zeros_like(units) if axis == KV else units // (counts[HEADS] // counts[KV])
    return Units(channels_of(units, channels // counts[axis]).view(counts[axis], -1), classes)
