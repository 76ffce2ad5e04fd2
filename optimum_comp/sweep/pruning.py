"""The pruning visitor: per layer observe, decide, repair, pass on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from optimum_comp.configuration import CompConfig
from optimum_comp.core.allocation import Allocation
from optimum_comp.core.equalization import find_scales, room_of
from optimum_comp.core.fisher import root_of
from optimum_comp.core.gram import GramAccumulator, add_cross_moment
from optimum_comp.core.layer_scores import least_important
from optimum_comp.core.recovery import FORMS, energy, refit
from optimum_comp.core.selection import Reduction, Units, reduce_channels
from optimum_comp.core.surgery import Counts, Kept
from optimum_comp.families import FFN, HEADS, KV, Axis, Fold
from optimum_comp.families.cutting import Cut, cut_meanwhile, groups_kept
from optimum_comp.report.run import Decision, LayerReport
from optimum_comp.sweep.fisher import FISHER_SAMPLES, STATE_DTYPE, fisher_rows, output_moments
from optimum_comp.sweep.folding import (
    Factors,
    fold_factors,
    holding_folds,
    layer_factors,
    meeting,
    producers_room,
    unseen,
    watching,
)
from optimum_comp.sweep.journal import DamagedRunError, Journal
from optimum_comp.sweep.junction import Junction
from optimum_comp.sweep.loop import Through, sweep
from optimum_comp.sweep.memory import MemoryPlan, solve_dtype
from optimum_comp.sweep.moments import Aim, Moments, Output, units_of
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.recording import Recorder
from optimum_comp.sweep.runner import LayerRunner, Tap, replaced
from optimum_comp.sweep.scoring import LAYER_SCORES
from optimum_comp.sweep.settling import Settled, Settling
from optimum_comp.sweep.states import ActivationStore, rows_of
from optimum_comp.sweep.stopwatch import Stopwatch
from optimum_comp.sweep.weighing import weigh
from optimum_comp.utils import get_logger, keep_large_blocks_apart, progress_disabled, release_free_memory


logger = get_logger(__name__)


@dataclasses.dataclass
class Pruned:
    """What the loop found.

    Attributes:
        settled: what went from where.
        layers: a report for each that stayed.
    """

    settled: Settled
    layers: list[LayerReport]


@dataclasses.dataclass
class LayerState:
    """The layer that the loop is at.

    Attributes:
        place: in the pruned model.
        gap: removed layers behind it.
        is_bridged: whether it stands in for them.
        cuts: what goes from it, as far as decided.
        decisions: why.
        moments: of its feed-forward layer's consumer.
    """

    place: int
    gap: range
    is_bridged: bool
    cuts: list[Cut] = dataclasses.field(default_factory=list)
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    moments: Moments | None = None


class Trying(Protocol):
    """Measures one way to split a budget after another."""

    can_be_made: bool
    """Whether there are samples to measure on."""

    def measure(self, settled: Settled) -> float:
        """How far what is left is from the dense model, in nats a token."""

    def close(self) -> None:
        """None is to come."""


class PruningRun:
    """One run over all layers of a model.

    Args:
        runner: runs the dense model's layers; its source takes the pruned ones.
        config: how to prune.
        plans: what may go in all; of several, the one that costs least.
        protected: layers that may not go as a whole.
        tokens: all calibration samples, `[samples, length]`.
        plan: how the work is cut.
        ranks: the processes that share it.
        folder: for files that the work needs; `None` if it needs none.
        journal: where finished layers are recorded, in the first process; `None` in the others, and for a run that
            can't be gone on with.
        start: positions at a sample's beginning that hold start tokens.
        trials: makes what tries one way to split the budget after another; `None` to go by what is expected.
    """

    def __init__(
        self,
        runner: LayerRunner,
        config: CompConfig,
        plans: Sequence[Allocation],
        protected: set[int],
        tokens: Tensor,
        plan: MemoryPlan,
        ranks: Ranks,
        folder: Path | None,
        journal: Journal | None,
        start: int = 0,
        trials: Callable[[PruningRun, Tensor, int], Trying] | None = None,
    ):
        self.source, self.config, self.ranks = runner.source, config, ranks
        self.family = self.source.family
        self.clock = Stopwatch()
        self._model_config = self.source.model.config
        self._runner = runner
        self._plans, self._protected = list(plans), protected
        # How many units of each axis stay in a layer.
        self.keep: Mapping[str, int] = plans[0].units
        self._weighs_layers = len({plan.layers for plan in plans}) > 1
        self._start, self._trials = start, trials
        self._tokens = tokens
        self._batches = ranks.batches(tokens, plan.batch_size)
        self._rows = rows_of(self._batches)
        self._plan = plan
        self._folder = folder
        self._journal = journal
        self._recorder = Recorder(journal, folder, ranks, beside=not plan.spill_states)
        self._stores: list[ActivationStore] = []
        first = self.source.layers[0]
        self._counts = self.family.counts(self._model_config, first)
        self._hidden, self._neurons = self.family.ffn.consumer.matrix(first).shape
        # Those that are pruned. Attention first: its repair is in what the feed-forward layer sees.
        self._attention: list[Axis] = []
        self._solving = solve_dtype(self._neurons)
        # Where equalization scales go: behind what other dense layers read, and behind what the consumer reads.
        self._folds: list[Fold] = []
        self._consumer_fold: Fold | None = None
        self._kept_layers: list[int] = []
        # Neurons that stay, of each layer that does.
        self._widths: list[int] = []
        self._reports: list[LayerReport] = []
        self._own = self._store("own", self._hidden, plan.spill_states)
        # Of the dense model, which the repair leans on.
        self._dense: ActivationStore | None = None
        # What the consumer reads, where the residual stream without its output can be had.
        self._inputs: ActivationStore | None = None
        # Of the loss's gradient behind each layer, `[layers, hidden, hidden]`.
        self._fisher: ActivationStore | None = None
        self._at: LayerState | None = None
        self._progress: tqdm | None = None
        self._doing = "Pruning"

    def run(self) -> Pruned:
        """Prune every layer that stays, in order.

        Raises:
            FloatingPointError: activations that are NaN or infinite; names the layer.
            ValueError: moments that can't be inverted; names the layer.
            OSError: no space, or another trouble with files.
        """
        try:
            pruned = self._run()
            self._recorder.wait()
            return pruned
        finally:
            self._recorder.close()
            for store in self._stores:
                store.close()

    def _run(self) -> Pruned:
        keep_large_blocks_apart()
        own = self._own
        done = self._recorder.finished
        settled = self.ranks.from_first(self._settled())
        removed: list[int] = []
        scores: list[float] = []
        if settled is not None:
            removed = settled.removed
        elif not self._weighs_layers:
            removed, scores = self._coarse(own, self._plans[0].layers)
        self._keep_all_but(removed)
        with self.clock("forward"):
            self._runner.embed_all(self._batches, own)
        additive = self._adds_to_residual(self._kept_layers[0], own)
        if additive and self._measures and done < len(self._kept_layers):
            self._find_fisher()
        elif self.ranks.is_first and not additive:
            logger.warning(
                "A norm follows the residual stream behind %s here, so each layer is repaired on its own: alignment, "
                "bridges and errors measured by their loss are off.",
                self.family.ffn.consumer.path,
            )
        if settled is None:
            settled = self._settle(own, removed, scores)
        self._keep_all_but(settled.removed)
        self.keep, self._widths = self._plans[settled.chosen].units, settled.widths
        self._attention = [axis for axis in self.family.axes if axis.name != FFN and axis.name in self.keep]
        first = self._kept_layers[0]
        if self.config.equalize:
            self._find_folds(first, own)
        if additive and self.config.alignment > 0 and self.config.recovery != "none":
            self._dense = self._store("dense", self._hidden, self._plan.spill_states)
        if additive:
            self._inputs = self._input_store("inputs")
        if done:
            with self.clock("read"):
                self._recorder.restore(done, self._streams)
        elif self._dense is not None:
            # The dense stream starts where the own one begins, and goes through removed layers at the very front.
            for rows in self._rows:
                self._dense.write(rows, own.read(rows, torch.device("cpu"), own.dtype))
            self._pass(range(first), self._dense)
        self._reports = self._recorder.reports()
        progress = tqdm(
            total=len(self._kept_layers),
            initial=done,
            desc=self._doing,
            unit="layer",
            disable=progress_disabled() or not self.ranks.is_first,
        )
        with progress:
            self._progress = progress
            sweep(self.source, self._kept_layers[done:], self, lambda: self.clock("read"))
        return Pruned(settled, self._reports)

    def visit(self, index: int, layer: nn.Module) -> None:
        """Prune the layer's attention, and observe its feed-forward layer behind that."""
        place = self._kept_layers.index(index)
        following = [*self._kept_layers, len(self.source.layers)][place + 1]
        gap = range(index + 1, following)
        at = LayerState(place, gap, bool(gap) and self.config.bridge and self._inputs is not None)
        self._at = at
        if self._attention:
            with self._names(index, self._attention[0].consumer.path):
                self._prune_attention(index, layer, at)
        with (
            self._names(index, self.family.ffn.consumer.path),
            cut_meanwhile(self.family, self._model_config, layer, at.cuts),
        ):
            at.moments = self._observe(index, layer, self._left(at), at)

    def leave(self, index: int) -> None:
        """Choose neurons, repair, and go on with what the pruned layer makes of the samples."""
        at = self._at
        assert at is not None and at.moments is not None
        with self._names(index, self.family.ffn.consumer.path):
            if at.is_bridged:
                at.moments = self._with_gap(at.gap, at.moments)
            junction = at.moments.junction
            found, factors = self._decide(index, at.moments)
        at.moments = None
        release_free_memory()
        if self._dense is not None and not at.is_bridged:
            self._pass(at.gap, self._dense)
        at.cuts.append(Cut(self.family.ffn, self._left(at), {FFN: found.kept}, found.weight))
        self._commit(index, at, factors)
        squares = self._update(index, at.cuts, found, junction)
        error, unrepaired = found.relative_error(squares), found.relative_unrepaired_error(squares)
        at.decisions.append(Decision(FFN, found.kept.tolist(), found.scores.tolist(), error, unrepaired))
        report = LayerReport(index, at.decisions, bridged=at.is_bridged)
        self._reports.append(report)
        del found, factors
        self._at = None
        release_free_memory()
        self._record(at.place, report)
        if self._progress is not None:
            self._progress.set_postfix(error=f"{error:.1%}")
            self._progress.update()

    def _left(self, at: LayerState) -> Counts:
        """Units of each kind that the layer has after the cuts so far."""
        return at.cuts[-1].after if at.cuts else self._counts

    def _commit(self, index: int, at: LayerState, factors: Factors) -> None:
        with self.clock("write"):
            if self.source.is_resident or self.ranks.is_first:
                self.source.commit(index, at.place, at.cuts, factors, {FFN: max(self._widths)})

    def _record(self, place: int, report: LayerReport) -> None:
        with self.clock("write"):
            self._recorder.record(place, report, self._streams)

    @property
    def _streams(self) -> dict[str, ActivationStore]:
        return {"own": self._own} if self._dense is None else {"own": self._own, "dense": self._dense}

    def _store(self, name: str, channels: int, spill: bool, dtype: torch.dtype | None = None) -> ActivationStore:
        shape = sum(map(len, self._batches)), self._tokens.shape[1], channels
        return self._made(name, shape, dtype or self.source.state_dtype, self._folder if spill else None)

    def _made(
        self, name: str, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path | None
    ) -> ActivationStore:
        file = None if folder is None else folder / f"spill-{name}-{self.ranks.rank}.bin"
        store = ActivationStore(*shape, dtype, file)
        self._stores.append(store)
        return store

    def _read(self, store: ActivationStore, rows: slice) -> Tensor:
        return store.read(rows, self.source.device, self.source.compute_dtype)

    def _consume(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """What a consumer with this weight makes of its inputs, without its bias."""
        with self._runner.products():
            return functional.linear(inputs, weight).to(inputs.dtype)

    def _settled(self) -> Settled | None:
        """What goes from where, if an interrupted run has found that out.

        Raises:
            DamagedRunError: it tells of what the model doesn't have.
        """
        if self._journal is None:
            return None
        found = Settled.of(self._journal.state)
        if found is not None and not found.fits(self._plans, len(self.source.layers), self._neurons):
            assert self._folder is not None
            raise DamagedRunError(self._folder.parent, "it tells of layers or widths that the model doesn't have")
        return found

    def _keep_all_but(self, removed: Sequence[int]) -> None:
        self._kept_layers = [index for index in range(len(self.source.layers)) if index not in removed]

    def _coarse(self, scratch: ActivationStore, count: int) -> tuple[list[int], list[float]]:
        """Which layers go by `layer_metric`, and every layer's score (empty if none goes)."""
        if count == 0:
            return [], []
        state = {} if self._journal is None else self._journal.state
        found = self.ranks.from_first((state["removed"], state["layer_scores"]) if "removed" in state else None)
        if found is None:
            with self.clock("forward"):
                score = LAYER_SCORES[self.config.layer_metric]
                scores = score(self._runner, self._tokens, self._batches, self.ranks, scratch)
            found = (least_important(scores, count, self._protected), scores)
            if self._journal is not None:
                self._journal.record(removed=found[0], layer_scores=found[1])
        return found

    def _pass(self, indices: range, states: ActivationStore) -> None:
        """Take hidden states through several dense layers."""
        through = Through(self._runner, self._rows, states, self.clock)
        sweep(self.source, indices, through, lambda: self.clock("read"))

    def _adds_to_residual(self, index: int, own: ActivationStore) -> bool:
        """Whether the layer's output is the tapped layer's plus what the consumer contributes.

        Measured, not declared: OPT-350m differs from its siblings in this by one config field. In float32, since half
        precision would round away what a norm does.
        """
        axis = self.family.ffn
        with self.source.layer(index) as layer, self._runner.widened(index) as dtype:
            hidden = own.read(slice(0, 1), self.source.device, dtype)
            whole = self._runner.run(index, hidden, exact=True)
            junction = Junction(self.family, self._model_config, axis, layer)
            tap = Tap(axis.consumer, layer, with_bias=junction.norm is None)
            with replaced(layer, axis.consumer.path, tap):
                residual = self._runner.run(index, hidden, exact=True)
            assert tap.inputs is not None
            output = functional.linear(tap.inputs, axis.consumer.matrix(layer))
            rebuilt = residual + junction.contribution(output).view_as(residual)
        tolerance = 16 * torch.finfo(hidden.dtype).eps
        difference = float((rebuilt - whole).abs().max())
        return difference <= tolerance * float(whole.abs().max().clamp_min(1.0))

    @property
    def _measures(self) -> bool:
        """Whether something is chosen or repaired by what an error costs in loss."""
        plans = self._plans
        removes = len(plans) > 1 or len(plans[0].units) > 1 or plans[0].width < self._neurons
        return self.config.needs_fisher and removes

    def _find_fisher(self) -> None:
        """Worked out once more in a run that is gone on with, where it comes to the same."""
        layers, length = len(self.source.layers), self._tokens.shape[1]
        rows = len(fisher_rows(len(self._tokens), self.ranks))
        states = self._made("trace", ((layers + 1) * rows, length, self._hidden), STATE_DTYPE, self._folder)
        moments = self._made("fisher", (layers, self._hidden, self._hidden), torch.float32, self._folder)
        with self.clock("gradients"):
            found = output_moments(self._runner, self._tokens, self.ranks, states, moments, self.config.seed)
        states.close()
        # Where hidden states overflow, observing the layer that it comes from says so, and names it.
        self._fisher = moments if found else None

    def _settle(self, scratch: ActivationStore, removed: list[int], scores: list[float]) -> Settled:
        """Find out what goes from where.

        Args:
            scratch: holds what enters the first layer, and does again.
            removed: layers that go in any case.
            scores: every layer's, if some went by them.
        """
        plan = self._plans[0]
        settling = Settling(
            self.config, self._plans, self._counts, self._neurons, self._kept_layers, self._protected, self.ranks
        )
        if settling.has_to_weigh and self._fisher is not None:
            what = settling.what
            inputs = self._input_store("weighed") if what.layers else None
            with self.clock("weighing"):
                costs = weigh(self._runner, self._batches, scratch, self.ranks, self._price, what, inputs)
            if inputs is not None:
                inputs.close()
            trials = None if self._trials is None else self._trials(self, self._tokens, self._neurons)
            found = settling.choose(
                costs, removed, scores, trials.measure if trials is not None and trials.can_be_made else None
            )
            if trials is not None:
                trials.close()
            self._runner.embed_all(self._batches, scratch)
            if self._journal is not None:
                self._journal.record(**found.entries())
            if self.ranks.is_first:
                settling.say(found)
            return found
        if settling.has_to_weigh and self.ranks.is_first:
            logger.warning("Gradients of the loss can't be had, so all layers keep as many neurons as each other.")
        if self._weighs_layers and plan.layers:
            removed, scores = self._coarse(scratch, plan.layers)
            self._runner.embed_all(self._batches, scratch)
        return Settled(0, removed, scores, [plan.width] * (len(self.source.layers) - len(removed)))

    def _input_store(self, name: str) -> ActivationStore:
        # The consumer's product rounds them to this in any case.
        factor = min(self._runner.matmul_dtype, self.source.state_dtype, key=lambda dtype: dtype.itemsize)
        return self._store(name, self._neurons, self._plan.spill_inputs, factor)

    def _price(self, index: int) -> tuple[Tensor, float] | None:
        """By which errors behind a layer are measured, and what the square of one costs, in nats."""
        assert self._fisher is not None
        moment = self._fisher.read(slice(index, index + 1), self.source.device, torch.float64)[0]
        root = root_of(moment)
        if root is None:
            return None
        looked_at = min(FISHER_SAMPLES, len(self._tokens)) * self._tokens.shape[1]
        return root, float(moment.diagonal().mean()) / (2 * looked_at)

    def _root(self, index: int, like: Tensor) -> Tensor | None:
        """By which errors behind a layer are measured, in another tensor's dtype and place."""
        priced = None if self._fisher is None else self._price(index)
        return None if priced is None else priced[0].to(like)

    def _find_folds(self, index: int, own: ActivationStore) -> None:
        with self.source.layer(index) as layer, self._runner.widened(index) as dtype:
            hidden = own.read(slice(0, 1), self.source.device, dtype)
            there = [fold for fold in self.family.folds if fold.is_in(layer)]
            held = holding_folds(layer, self._counts, there, lambda: self._runner.run(index, hidden, exact=True))
        if self.ranks.is_first and len(held) < len(there):
            missing = "; ".join(str(fold) for fold in there if fold not in held)
            logger.warning("Not equalized, since this model's layers don't allow it: %s.", missing)
        consumer = self.family.ffn.consumer.path
        self._folds = [fold for fold in held if [slot.path for slot in fold.consumers] != [consumer]]
        self._consumer_fold = next((fold for fold in held if fold not in self._folds), None)

    def _prune_attention(self, index: int, layer: nn.Module, at: LayerState) -> None:
        """Choose what of the layer's attention goes, and repair what reads it.

        A head's output doesn't depend on the other heads, so the moments of all of them serve every axis.
        """
        moments = self._observe_attention(index, layer)
        counts: Counts = self._counts
        heads = torch.arange(counts[HEADS])
        shared: list[tuple[str, Kept, Tensor, Decision]] = []
        for axis in self._attention if self.ranks.is_first else ():
            with self.clock("solve"):
                units = units_of(axis.name, counts, moments.weight.shape[1])
                each = 1 if axis.name == KV else counts[KV]
                found = self._reduce(index, moments, self.keep[axis.name] // each, units)
                left = found.kept.to(moments.gram.device)
                gram = moments.gram[left][:, left]
                squares = energy(found.weight, gram)
                width = units.channels.shape[1]
                kept = (found.kept.view(-1, width)[:, 0] // width).cpu()
                kinds = groups_kept(kept, counts) if axis.name == KV else {HEADS: kept}
                heads = heads[kinds[HEADS]]
                numbers = kept if axis.name == KV else heads
                error, unrepaired = found.relative_error(squares), found.relative_unrepaired_error(squares)
                decision = Decision(axis.name, numbers.tolist(), found.scores.tolist(), error, unrepaired)
                weight = moments.junction.ungained(found.weight).to("cpu", self.source.state_dtype)
                shared.append((axis.name, kinds, weight, decision))
                # What goes next goes from what is left: its repair is aimed already.
                moments = dataclasses.replace(moments, gram=gram, cross=None, weight=found.weight)
                counts = {**counts, **{kind: len(there) for kind, there in kinds.items()}}
        for name, kept_units, weight, decision in self.ranks.from_first(shared):
            at.cuts.append(Cut(self.family.axis(name), self._left(at), kept_units, weight))
            at.decisions.append(decision)

    def _observe_attention(self, index: int, layer: nn.Module) -> Moments:
        """Run a layer up to what reads its heads; takes the dense model's hidden states through the layer."""
        slot = self._attention[0].consumer
        junction = Junction(self.family, self._model_config, self._attention[0], layer)
        weight = slot.matrix(layer).detach().clone()
        solving = solve_dtype(weight.shape[1])
        gram = GramAccumulator(weight.shape[1], device=self.source.device, dtype=solving)
        aim = None
        if self._dense is not None and index > 0:
            aim = self._aim(junction, weight.shape, solving)
        for rows in self._rows:
            with self.clock("forward"):
                hidden = self._read(self._own, rows)
                seen = self._runner.inputs_of(index, slot, hidden)
                own = self._own_output(junction, seen, weight)
            with self.clock("gram"):
                gram.update(seen, own.token_weights)
            if self._dense is None:
                continue
            with self.clock("forward"):
                before = self._read(self._dense, rows)
                behind, output = self._runner.run_and_watch(index, slot, before)
            if aim is not None:
                with self.clock("gram"):
                    aim.add(before + junction.contribution(output) - hidden, own, seen)
            self._dense.write(rows, behind)
        self.ranks.sum_(gram.sum, *(() if aim is None else aim.moments))
        return self._moments(gram.value(), aim, weight, junction)

    def _moments(self, gram: Tensor, aim: Aim | None, weight: Tensor, junction: Junction) -> Moments:
        with self.clock("solve"):
            cross, share = (None, 0.0) if aim is None else aim.result(gram, self.config.ridge)
        return Moments(gram, cross, share, junction.gained(weight), weight, junction)

    def _own_output(self, junction: Junction, inputs: Tensor, weight: Tensor) -> Output:
        """What the dense weight makes of the pruned model's activations; worked out only where a norm follows."""
        if junction.norm is None:
            return Output()
        output = self._consume(inputs, weight)
        return Output(output, junction.token_scales(output))

    def _aim(self, junction: Junction, shape: tuple[int, ...], solving: torch.dtype) -> Aim:
        halves = 1 if junction.norm is None else 2
        moments = [torch.zeros(shape, dtype=solving, device=self.source.device) for _ in range(halves)]
        return Aim(junction, self.config.alignment, self._start, moments)

    def _observe(self, index: int, layer: nn.Module, counts: Counts, at: LayerState) -> Moments:
        """Run a layer with its feed-forward consumer tapped.

        Afterwards, where the consumer's output is added to the residual stream (there is a store for `inputs`), `own`
        holds the residual stream and `inputs` the consumer's inputs; `dense` holds the dense model's hidden states
        behind the layer.

        Args:
            index: the layer.
            layer: without what of its attention goes.
            counts: its units of each kind.
            at: what is decided so far.
        """
        clock, consumer, own, dense = self.clock, self.family.ffn.consumer, self._own, self._dense
        # Before anything is pruned, the dense model's hidden states are the pruned one's; if attention was pruned,
        # they are behind the layer already.
        is_first, is_ahead = index == 0 and not at.cuts, bool(at.cuts)
        junction = Junction(self.family, self._model_config, self.family.ffn, layer)
        weight = consumer.matrix(layer).detach().clone()
        gram = GramAccumulator(self._neurons, device=self.source.device, dtype=self._solving)
        aim = None
        if dense is not None and not is_first and not at.is_bridged:
            aim = self._aim(junction, weight.shape, self._solving)
        tap = Tap(consumer, layer, with_bias=junction.norm is None)
        ranges = unseen(layer, self._folds)
        largest = None if self._consumer_fold is None else weight.new_zeros(self._neurons, dtype=torch.float32)
        for rows in self._rows:
            with clock("forward"), replaced(layer, consumer.path, tap), watching(layer, ranges):
                residual = self._runner.run(index, self._read(own, rows))
            if tap.inputs is None:
                raise RuntimeError(f"layer {index} never called its {consumer.path}.")
            seen = tap.inputs.to(residual.dtype)
            with clock("forward"):
                output = self._own_output(junction, seen, weight)
            with clock("gram"):
                gram.update(seen, output.token_weights)
                if largest is not None:
                    largest = torch.maximum(largest, seen.reshape(-1, self._neurons).abs().amax(0).float())
            if self._inputs is not None:
                self._inputs.write(rows, seen)
                own.write(rows, residual)
            if dense is None:
                continue
            with clock("forward"):
                if is_first:
                    wanted = residual + junction.contribution(self._consume(seen, weight)).view_as(residual)
                elif is_ahead:
                    wanted = self._read(dense, rows)
                else:
                    wanted = self._runner.run(index, self._read(dense, rows))
                if not is_ahead:
                    dense.write(rows, wanted)
            if aim is not None:
                with clock("gram"):
                    aim.add(wanted - residual, output, seen)
        self.ranks.max_(largest, *(seen.largest for seen in ranges.values()))
        self.ranks.sum_(gram.sum, *(() if aim is None else aim.moments), *(seen.energy for seen in ranges.values()))
        with clock("solve"):
            stored = self.source.state_dtype
            factors = layer_factors(layer, counts, ranges, self._tokens.numel(), stored)
            room = None
            if self._consumer_fold is not None:
                room = producers_room(layer, counts, self._consumer_fold, factors, stored)
        found = self._moments(gram.value(), aim, weight, junction)
        return dataclasses.replace(found, factors=factors, largest=largest, room=room)

    def _with_gap(self, gap: range, moments: Moments) -> Moments:
        """What a consumer's output lacks if it is to do the work of removed layers behind it, too.

        Takes the dense model's hidden states behind the gap.
        """
        own, dense, inputs = self._own, self._dense, self._inputs
        assert inputs is not None
        junction, plain = moments.junction, moments.plain
        over_gap = torch.zeros(plain.shape, dtype=self._solving, device=self.source.device)
        deviation = torch.zeros_like(over_gap) if dense is not None else None
        whole = self._store("whole", self._hidden, self._plan.spill_states)

        def own_output(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            seen = self._read(inputs, rows)
            output = self._consume(seen, plain)
            return seen, output, self._read(own, rows) + junction.contribution(output)

        def add(total: Tensor, lacking: Tensor, seen: Tensor, output: Tensor) -> None:
            add_cross_moment(total, junction.target(lacking, junction.token_scales(output)), seen)

        for rows in self._rows:
            whole.write(rows, own_output(rows)[2])
        self._pass(gap, whole)
        if dense is not None:
            self._pass(gap, dense)
        with self.clock("gram"):
            for rows in self._rows:
                (seen, output, before), behind = own_output(rows), self._read(whole, rows)
                add(over_gap, behind - before, seen, output)
                if dense is not None and deviation is not None:
                    add(deviation, self._read(dense, rows) - behind, seen, output)
        whole.close()
        self.ranks.sum_(over_gap, deviation)
        if deviation is not None:
            deviation.mul_(self.config.alignment)
        if FORMS.get(self.config.resolved_neuron_metric) == self.config.recovery == "least_squares":
            # Both moments pull at the same optimum.
            return dataclasses.replace(
                moments, cross=over_gap if deviation is None else over_gap.add_(deviation), own_share=0.0
            )
        with self.clock("solve"):
            weight = refit(moments.weight, moments.gram, over_gap, self.config.ridge)
            return dataclasses.replace(moments, cross=deviation, own_share=0.0, weight=weight)

    def _reduce(self, index: int, moments: Moments, keep: int, units: Units | None = None) -> Reduction:
        """Choose and repair; of single channels, in the memory of the moments."""
        return reduce_channels(
            moments.weight,
            moments.gram if units is None else moments.gram.clone(),
            keep,
            metric=self.config.resolved_neuron_metric,
            recovery=self.config.recovery,
            ridge=self.config.ridge,
            block_size=self.config.elimination_block,
            # Of the layer alone, so that a run that is gone on with draws what an undisturbed one draws.
            generator=torch.Generator().manual_seed((1_000_003 * self.config.seed + index) % 2**63),
            cross=moments.cross,
            own_share=moments.own_share,
            root=self._root(index, moments.gram),
            units=None if units is None else units.to(moments.gram.device),
        )

    def _decide(self, index: int, moments: Moments) -> tuple[Reduction, Factors]:
        """Choose and repair in the first process; the others take over what it found."""
        found, factors = None, moments.factors
        if self.ranks.is_first:
            with self.clock("solve"):
                squares = None if moments.largest is None else moments.gram.diagonal().clone()
                found = self._reduce(index, moments, self._widths[self._kept_layers.index(index)])
                # Everything after this sees the weight as it is saved.
                weight = moments.junction.ungained(found.weight).to("cpu", self.source.state_dtype)
                found = dataclasses.replace(found, kept=found.kept.cpu(), weight=weight, scores=found.scores.cpu())
                factors = self._with_consumer(index, moments, squares, found)
        shared = self.ranks.from_first((found, factors))
        assert shared[0] is not None
        return shared[0], shared[1]

    def _with_consumer(self, index: int, moments: Moments, squares: Tensor | None, found: Reduction) -> Factors:
        """The factors, with those that even out what the neurons that stay give to the consumer."""
        if self._consumer_fold is None or moments.largest is None or moments.room is None or squares is None:
            return moments.factors
        kept = found.kept
        least, most = (bound.cpu()[kept] for bound in moments.room)
        scales, _ = find_scales(
            moments.largest.cpu()[kept],
            squares.cpu()[kept],
            self._tokens.numel(),
            found.weight,
            room=meeting((least, most), room_of(found.weight.T)),
        )
        merged = {name: list(given) for name, given in moments.factors.items()}
        after = {FFN: len(kept)}
        for name, given in fold_factors(self.source.layers[index], after, self._consumer_fold, scales).items():
            merged.setdefault(name, []).extend(given)
        return merged

    def _update(self, index: int, cuts: list[Cut], found: Reduction, junction: Junction) -> float:
        """Bring the hidden states behind the pruned layer; returns the square of what its consumer makes."""
        own, inputs = self._own, self._inputs
        squares = torch.zeros((), dtype=torch.float64, device=self.source.device)
        kept, weight = found.kept.to(self.source.device), found.weight.to(self.source.device)
        if inputs is not None:
            # Kept columns of the activations that are there already: no second pass through the layer.
            weight = weight.to(self.source.compute_dtype)
            with self.clock("forward"):
                for rows in self._rows:
                    new = junction.contribution(self._consume(self._read(inputs, rows)[..., kept], weight))
                    squares += new.float().square().sum(dtype=torch.float64)
                    own.write(rows, self._read(own, rows) + new)
            self.ranks.sum_(squares)
            # Errors are told before it is scaled.
            return float(squares) / junction.multiplier**2
        # A model that is in memory is cut already.
        cuts = [] if self.source.is_resident else cuts
        with (
            self.source.layer(index) as layer,
            cut_meanwhile(self.family, self._model_config, layer, cuts),
            self.clock("forward"),
        ):
            for rows in self._rows:
                behind, new = self._runner.run_and_watch(index, self.family.ffn.consumer, self._read(own, rows))
                squares += new.float().square().sum(dtype=torch.float64)
                own.write(rows, behind)
        self.ranks.sum_(squares)
        return float(squares)

    def _names(self, index: int, path: str) -> contextlib.AbstractContextManager[None]:
        return _names_layer(f"{self.family.layers}.{index}.{path}")


@contextlib.contextmanager
def _names_layer(name: str) -> Iterator[None]:
    """Say in which dense layer the mathematics failed."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{name}: {error} The model's own activations overflow on this text; check the checkpoint and its dtype "
            "(float16 overflows where float32 and bfloat16 don't)."
        ) from error
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{name}: its moments can't be inverted; raise the ridge. ({error})") from error
