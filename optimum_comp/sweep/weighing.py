"""What removing neurons, attention units and whole layers costs in loss, on one scale: one pass of the dense model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_comp.core.gram import GramAccumulator, add_cross_moment, diagonal_shift
from optimum_comp.core.quadratic import Problem, factor_in_place, removal_costs, units_removal_costs
from optimum_comp.core.recovery import problem_of
from optimum_comp.families import HEADS, KV
from optimum_comp.families.spec import Axis
from optimum_comp.sweep.junction import Junction
from optimum_comp.sweep.loop import sweep
from optimum_comp.sweep.memory import solve_dtype
from optimum_comp.sweep.moments import units_of
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.runner import LayerRunner, Tap, replaced
from optimum_comp.sweep.states import ActivationStore, rows_of
from optimum_comp.utils import progress_disabled


Measure = Callable[[int], tuple[Tensor, float] | None]
"""A layer -> the root that errors behind it are measured by, in float64, and what the square of such an error costs in
nats; `None` where an error there costs nothing."""

_TOKENS_PER_CHANNEL = 8
"""That are looked at, if there are as many: costs are only compared, and a repair isn't made of them."""


@dataclasses.dataclass(frozen=True)
class Weighing:
    """What is to be weighed.

    Attributes:
        form: of the matrix-condition metric that units go by.
        ridge: of the solves.
        kept: layers that may stay; the others are gone through alone.
        sizes: neurons that a layer may keep, descending from all of them.
        attention: how many key-value groups, and heads, may stay in a layer, as pairs; the first is all of them.
        layers: whether whole layers may go.
        is_bridged: whether the layer before one that goes is fitted anew to stand in for it.
    """

    form: str
    ridge: float
    kept: Sequence[int]
    sizes: Sequence[int]
    attention: Sequence[tuple[int, int]] = ()
    layers: bool = False
    is_bridged: bool = True


@dataclasses.dataclass
class LayerCosts:
    """What goes from a layer costs, in nats a token of the calibration text.

    Attributes:
        sizes: with each number of neurons that was to be weighed.
        attention: with each choice of groups and heads.
        gone: without the layer; infinite where that can't be told.
    """

    sizes: list[float]
    attention: list[float]
    gone: float = torch.inf


class _Bridge:
    """What the layer before one that goes can take over of it, as moments over all tokens.

    A layer adds `δ` to the residual stream. Of the inputs `x` of the feed-forward consumer before it, a change `ΔW` of
    that consumer's weight makes `m s ΔW x` there (see `Junction`); what is left, `δ − m s ΔW x`, is the error.
    """

    def __init__(self, hidden: int, width: int, device: torch.device, dtype: torch.dtype, *, has_norm: bool):
        def zeros(columns: int) -> Tensor:
            return torch.zeros(hidden, columns, dtype=dtype, device=device)

        self.added = zeros(hidden)
        self.moment = zeros(width)
        # Behind a norm, what is aimed at isn't what is added.
        self.target = zeros(width) if has_norm else None

    def update(self, junction: Junction, added: Tensor, inputs: Tensor, scales: Tensor | None) -> None:
        """Add a batch: `δ: [batch, length, hidden]`, `x: [batch, length, width]` and `s: [batch, length]`."""
        add_cross_moment(self.added, added, added)
        add_cross_moment(self.moment, added if scales is None else scales[..., None] * added, inputs)
        if self.target is not None:
            add_cross_moment(self.target, junction.target(added, scales), inputs)

    def tensors(self) -> list[Tensor]:
        """What is summed over processes."""
        return [each for each in (self.added, self.moment, self.target) if each is not None]

    def error(
        self, root: Tensor, junction: Junction | None = None, gram: Tensor | None = None, ridge: float = 0.0
    ) -> float:
        """`Σ ‖R (δ − m s ΔW x)‖²` over all tokens, `ΔW` fitted in closed form; without a Gram matrix, `ΔW = 0`.

        Args:
            root: `R: [hidden, hidden]`.
            junction: of the layer before.
            gram: second moments of `x`, each token weighed by `s²`, not regularised; overwritten.
            ridge: λ of `regularize`.
        """
        root = root.to(self.added)
        left = float(((root @ self.added) * root).sum())
        if gram is None or junction is None:
            return left
        target = self.moment / junction.multiplier if self.target is None else self.target
        shift = diagonal_shift(gram, ridge)
        gram.diagonal().add_(shift)
        factor = factor_in_place(gram)
        change = root @ torch.cholesky_solve(target.T, factor).T * junction.multiplier
        crossed = float(((root @ self.moment) * change).sum())
        # `tr(D G Dᵀ)` from the factor of the regularised matrix.
        made = float((change @ torch.tril(factor)).square().sum()) - shift * float(change.square().sum())
        return max(0.0, left - 2 * crossed + made)


@dataclasses.dataclass
class _Before:
    """What is known of the layer before the one that the sweep is at."""

    junction: Junction
    gram: Tensor
    scales: list[Tensor | None]


class _Costs:
    """Collects each layer's moments on the way through the dense model, and what going without parts of it costs."""

    def __init__(
        self,
        runner: LayerRunner,
        rows: list[slice],
        states: ActivationStore,
        inputs: ActivationStore | None,
        ranks: Ranks,
        measure: Measure,
        what: Weighing,
        progress: tqdm,
    ):
        self._runner, self._rows, self._states, self._ranks = runner, rows, states, ranks
        self._inputs, self._measure, self._what, self._progress = inputs, measure, what, progress
        self._kept = set(what.kept)
        self._counts = runner.source.family.counts(runner.source.model.config, runner.source.layers[0])
        tokens = torch.tensor([float(sum(each.stop - each.start for each in rows) * states.shape[1])])
        ranks.sum_(tokens)
        self.tokens = float(tokens)
        self.costs: list[LayerCosts] = []
        # Of the layer at hand.
        self._gram, self._weight = torch.empty(0), torch.empty(0)
        self._attention: tuple[Tensor, Tensor] | None = None
        self._bridge: _Bridge | None = None
        self._now: _Before | None = None
        self._before: _Before | None = None

    def visit(self, index: int, layer: nn.Module) -> None:
        source, what = self._runner.source, self._what
        axis, device = source.family.ffn, source.device
        junction = Junction(source.family, source.model.config, axis, layer)
        weight = axis.consumer.matrix(layer).detach().clone()
        hidden_size, width = weight.shape
        solving = solve_dtype(width)
        gram = GramAccumulator(width, device=device, dtype=solving)
        kept_scales: list[Tensor | None] = []
        before = self._before
        self._bridge = None
        if self._inputs is not None:
            has_norm = before is not None and before.junction.norm is not None
            self._bridge = _Bridge(hidden_size, width, device, solving, has_norm=has_norm)
        self._attention = self._attention_moments(index, layer) if index in self._kept and what.attention else None
        tap = Tap(axis.consumer, layer, with_bias=junction.norm is None)
        for number, rows in enumerate(self._rows):
            hidden = self._states.read(rows, device, source.compute_dtype)
            with replaced(layer, axis.consumer.path, tap):
                residual = self._runner.run(index, hidden)
            assert tap.inputs is not None
            seen = tap.inputs.to(residual.dtype)
            with self._runner.products():
                output = nn.functional.linear(seen, weight).to(seen.dtype)
            behind = residual + junction.contribution(output).view_as(residual)
            scales = junction.token_scales(output)
            if index in self._kept:
                gram.update(seen, None if scales is None else scales.square())
            if self._bridge is not None and self._inputs is not None:
                if before is not None:
                    there = self._inputs.read(rows, device, source.compute_dtype)
                    self._bridge.update(before.junction, behind - hidden, there, before.scales[number])
                else:
                    self._bridge.update(junction, behind - hidden, torch.zeros_like(seen), None)
                self._inputs.write(rows, seen)
                kept_scales.append(scales)
            self._states.write(rows, behind)
        self._gram, self._weight = gram.value(), junction.multiplier * junction.gained(weight)
        if self._inputs is not None:
            self._now = _Before(junction, self._gram, kept_scales)

    def _attention_moments(self, index: int, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Second moments of what attention's consumer reads, and its weight as the residual stream sees it."""
        source = self._runner.source
        axis = _attention_axis(self._runner)
        junction = Junction(source.family, source.model.config, axis, layer)
        weight = axis.consumer.matrix(layer).detach().clone()
        gram = GramAccumulator(weight.shape[1], device=source.device, dtype=solve_dtype(weight.shape[1]))
        for rows in self._rows:
            hidden = self._states.read(rows, source.device, source.compute_dtype)
            seen = self._runner.inputs_of(index, axis.consumer, hidden)
            scales = None
            if junction.norm is not None:
                with self._runner.products():
                    scales = junction.token_scales(nn.functional.linear(seen, weight).to(seen.dtype))
            gram.update(seen, None if scales is None else scales.square())
        return gram.value(), junction.multiplier * junction.gained(weight)

    def leave(self, index: int) -> None:
        if index in self._kept:
            sums = [self._gram, *(() if self._bridge is None else self._bridge.tensors())]
            self._ranks.sum_(*sums, None if self._attention is None else self._attention[0])
            if self._ranks.is_first:
                self.costs.append(self._of_layer(index))
        self._before, self._now = self._now, None
        self._gram, self._weight = torch.empty(0), torch.empty(0)
        self._attention = self._bridge = None
        self._progress.update()

    def _of_layer(self, index: int) -> LayerCosts:
        what = self._what
        measured = self._measure(index)
        if measured is None:
            return LayerCosts([0.0] * len(what.sizes), [0.0] * len(what.attention), 0.0 if what.layers else torch.inf)
        root, price = measured
        price /= self.tokens
        # What moments that can't be inverted would have to tell isn't known, and so is kept.
        costs = LayerCosts([], [0.0] * len(what.attention))
        if self._bridge is not None:
            with contextlib.suppress(torch.linalg.LinAlgError):
                if what.is_bridged and self._before is not None:
                    left = self._bridge.error(root, self._before.junction, self._before.gram, what.ridge)
                else:
                    left = self._bridge.error(root)
                costs.gone = price * left
        if self._attention is not None:
            gram, weight = self._attention
            problem = self._problem(weight, gram, root)
            groups, heads = (self._units(name, weight.shape[1], gram.device) for name in (KV, HEADS))
            keeps = [(groups_left, heads_left // groups_left) for groups_left, heads_left in what.attention]
            try:
                costs.attention = [price * cost for cost in units_removal_costs(problem, groups, heads, keeps)]
            except torch.linalg.LinAlgError:
                everything = self._counts[KV], self._counts[HEADS]
                costs.attention = [0.0 if kept == everything else torch.inf for kept in what.attention]
        # The next layer's bridge asks for this matrix once more.
        gram = self._gram.clone() if what.layers else self._gram
        try:
            found = removal_costs(self._problem(self._weight, gram, root), what.sizes)
        except torch.linalg.LinAlgError as error:
            path = f"{self._runner.source.family.layers}.{index}.{self._runner.source.family.ffn.consumer.path}"
            raise ValueError(f"{path}: its moments can't be inverted; raise the ridge. ({error})") from error
        costs.sizes = [price * cost for cost in found]
        return costs

    def _problem(self, weight: Tensor, gram: Tensor, root: Tensor) -> Problem:
        form, ridge = self._what.form, self._what.ridge
        return problem_of(form, weight.to(gram), gram, ridge, root=root.to(gram), overwrite=True)

    def _units(self, axis: str, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
        units = units_of(axis, self._counts, channels).to(device)
        return units.channels, units.classes


def _attention_axis(runner: LayerRunner) -> Axis:
    return next(axis for axis in runner.source.family.axes if axis.name in (KV, HEADS))


def weigh(
    runner: LayerRunner,
    batches: list[Tensor],
    states: ActivationStore,
    ranks: Ranks,
    measure: Measure,
    what: Weighing,
    inputs: ActivationStore | None = None,
) -> list[LayerCosts]:
    """What going without parts of each layer costs, each by itself.

    The loss that an error behind a layer adds is told to second order (see `core.fisher`), so all are on one scale:
    what neurons or heads cost where the others are re-fitted, and what a whole layer does where the layer before it is
    fitted anew to stand in for it. Losses of several layers are taken to add up.

    Args:
        runner: of the dense model.
        batches: this process's samples, of which as many are looked at as it takes.
        states: a store of hidden states that may be overwritten.
        ranks: the processes that share the samples.
        measure: how errors behind a layer are measured.
        what: is to be weighed.
        inputs: room for what a feed-forward consumer reads of these samples; needed where whole layers may go.

    Returns:
        Of each layer in `what.kept`, the same in all processes.
    """
    tokens = ranks.size * sum(batch.numel() for batch in batches)
    # Spread over all of them, so that every source has its part.
    batches = batches[:: max(1, tokens // (_TOKENS_PER_CHANNEL * what.sizes[0]))]
    rows = rows_of(batches)
    runner.embed_all(batches, states)
    last = max(what.kept)
    disable = progress_disabled() or not ranks.is_first
    with tqdm(total=last + 1, desc="Weighing what goes", unit="layer", disable=disable) as progress:
        visitor = _Costs(runner, rows, states, inputs if what.layers else None, ranks, measure, what, progress)
        sweep(runner.source, range(last + 1), visitor)
    shared = ranks.from_first(visitor.costs)
    assert shared is not None
    return shared
