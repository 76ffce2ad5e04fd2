"""A width for each layer, by what removing neurons there costs in loss: one pass of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_comp.core.allocation import distribute
from optimum_comp.core.gram import GramAccumulator
from optimum_comp.core.quadratic import removal_costs
from optimum_comp.core.recovery import problem_of
from optimum_comp.sweep.junction import Junction
from optimum_comp.sweep.loop import sweep
from optimum_comp.sweep.memory import solve_dtype
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.runner import LayerRunner, Tap, replaced
from optimum_comp.sweep.states import ActivationStore, rows_of
from optimum_comp.utils import progress_disabled


Measure = Callable[[int], tuple[Tensor, float] | None]
"""A layer -> the root that errors behind it are measured by, in float64, and what the square of such an error costs in
nats; `None` where an error there costs nothing."""

_TOKENS_PER_CHANNEL = 8
"""That are looked at, if there are as many: costs are only compared, and a repair isn't made of them."""


class _Costs:
    """Collects each layer's moments on the way through the dense model, and what removing neurons costs there."""

    def __init__(
        self,
        runner: LayerRunner,
        rows: list[slice],
        states: ActivationStore,
        ranks: Ranks,
        measure: Measure,
        form: str,
        ridge: float,
        sizes: Sequence[int],
        kept: set[int],
        progress: tqdm,
    ):
        self._runner, self._rows, self._states, self._ranks = runner, rows, states, ranks
        self._measure, self._form, self._ridge, self._sizes = measure, form, ridge, sizes
        self._kept, self._progress = kept, progress
        self._gram = self._weight = torch.empty(0)
        tokens = torch.tensor([float(sum(each.stop - each.start for each in rows) * states.shape[1])])
        ranks.sum_(tokens)
        self.tokens = float(tokens)
        self.costs: list[list[float]] = []

    def visit(self, index: int, layer: nn.Module) -> None:
        source = self._runner.source
        axis = source.family.ffn
        junction = Junction(source.family, source.model.config, axis, layer)
        weight = axis.consumer.matrix(layer).detach().clone()
        gram = GramAccumulator(weight.shape[1], device=source.device, dtype=solve_dtype(weight.shape[1]))
        tap = Tap(axis.consumer, layer, with_bias=junction.norm is None)
        for rows in self._rows:
            hidden = self._states.read(rows, source.device, source.compute_dtype)
            with replaced(layer, axis.consumer.path, tap):
                residual = self._runner.run(index, hidden)
            assert tap.inputs is not None
            seen = tap.inputs.to(residual.dtype)
            with self._runner.products():
                output = nn.functional.linear(seen, weight).to(seen.dtype)
            if index in self._kept:
                scales = junction.token_scales(output)
                gram.update(seen, None if scales is None else scales.square())
            self._states.write(rows, residual + junction.contribution(output).view_as(residual))
        self._gram, self._weight = gram.value(), junction.multiplier * junction.gained(weight)

    def leave(self, index: int) -> None:
        if index in self._kept:
            self._ranks.sum_(self._gram)
            self.costs.append(self._of_layer(index) if self._ranks.is_first else [])
        self._gram = self._weight = torch.empty(0)
        self._progress.update()

    def _of_layer(self, index: int) -> list[float]:
        measured = self._measure(index)
        if measured is None:
            return [0.0] * len(self._sizes)
        root, price = measured
        gram = self._gram
        problem = problem_of(self._form, self._weight.to(gram), gram, self._ridge, root=root.to(gram), overwrite=True)
        if self._form == "condition_mask":
            # The root is a part of the matrix there, and its scale with it.
            problem = problem._replace(root=None)
        return [price * cost / self.tokens for cost in removal_costs(problem, self._sizes)]


def find_widths(
    runner: LayerRunner,
    batches: list[Tensor],
    states: ActivationStore,
    ranks: Ranks,
    measure: Measure,
    *,
    form: str,
    ridge: float,
    kept: Sequence[int],
    sizes: Sequence[int],
    budget: int,
    step: int,
) -> tuple[list[int], list[float]]:
    """A width for each layer that stays, so that all together cost the least loss.

    The loss that an error behind a layer adds is told to second order (see `core.fisher`), and losses of several
    layers add up.

    Args:
        runner: of the dense model.
        batches: this process's samples, of which as many are looked at as it takes.
        states: a store of hidden states that may be overwritten.
        ranks: the processes that share the samples.
        measure: how errors behind a layer are measured.
        form: of the matrix-condition metric that neurons go by.
        ridge: of the solves.
        kept: layers that stay; the others are gone through alone.
        sizes: that a layer may have, descending from the dense one.
        budget: neurons that may stay in all layers together.
        step: neurons between two sizes.

    Returns:
        The width of each layer in `kept`, and what it is expected to cost, in nats a token.
    """
    tokens = ranks.size * sum(batch.numel() for batch in batches)
    # Spread over all of them, so that every source has its part.
    batches = batches[:: max(1, tokens // (_TOKENS_PER_CHANNEL * sizes[0]))]
    rows = rows_of(batches)
    runner.embed_all(batches, states)
    last = max(kept)
    disable = progress_disabled() or not ranks.is_first
    with tqdm(total=last + 1, desc="Weighing widths", unit="layer", disable=disable) as progress:
        visitor = _Costs(runner, rows, states, ranks, measure, form, ridge, sizes, set(kept), progress)
        sweep(runner.source, range(last + 1), visitor)
    found = None
    if ranks.is_first:
        widths = distribute(sizes, visitor.costs, budget, step)
        numbers = [sizes.index(width) for width in widths]
        found = (widths, [costs[number] for costs, number in zip(visitor.costs, numbers, strict=True)])
    shared = ranks.from_first(found)
    assert shared is not None
    return shared
