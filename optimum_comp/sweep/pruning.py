"""The layer loop: per layer observe, decide, repair, pass on; one layer in memory at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from optimum_comp.atomic import durably
from optimum_comp.configuration import CompConfig
from optimum_comp.core.equalization import find_scales
from optimum_comp.core.gram import GramAccumulator, add_cross_moment
from optimum_comp.core.layer_scores import least_important
from optimum_comp.core.recovery import FORMS, refit
from optimum_comp.core.selection import Reduction, reduce_channels
from optimum_comp.families import Fold, apply_to_layer
from optimum_comp.report.run import LayerReport
from optimum_comp.sweep.folding import Factors, fold_factors, holding_folds, layer_factors, unseen, watching
from optimum_comp.sweep.journal import Journal
from optimum_comp.sweep.memory import MemoryPlan, solve_dtype
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.runner import LayerRunner, Tap, replaced
from optimum_comp.sweep.scoring import LAYER_SCORES
from optimum_comp.sweep.states import ActivationStore, rows_of
from optimum_comp.utils import keep_large_blocks_apart, progress_disabled, release_free_memory


class Stopwatch:
    """Wall time by kind of work, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Count the block's time as `kind`, and not as that of a block around it."""
        started, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            within = sum(self.seconds.values()) - before
            self.seconds[kind] += time.perf_counter() - started - within


@dataclasses.dataclass
class Pruned:
    """What the loop found.

    Attributes:
        removed: whole layers that went.
        layer_scores: every layer's score; empty if none had to go.
        layers: a report for each that stayed.
    """

    removed: list[int]
    layer_scores: list[float]
    layers: list[LayerReport]


@dataclasses.dataclass
class Moments:
    """What a layer's consumer saw on the calibration samples, summed over all processes.

    Attributes:
        gram: second moments of its inputs, `[width, width]`.
        cross: cross moment of what its output is to gain with its inputs, `[hidden, width]`, or `None`.
        own_share: how much of its own outputs `cross` holds (see `quadratic.share_own`).
        weight: its weight, `[hidden, width]`, with the effect of removed layers behind it fitted in where that has to
            come before the choice.
        factors: what evens out the inputs of the layer's other dense layers, by parameter.
        largest: largest absolute value of each of the consumer's inputs, `[width]`; `None` if nobody asks.
    """

    gram: Tensor
    cross: Tensor | None
    own_share: float
    weight: Tensor
    factors: Factors = dataclasses.field(default_factory=dict)
    largest: Tensor | None = None


class PruningRun:
    """One run over all layers of a model.

    Args:
        runner: runs the dense model's layers; its source takes the pruned ones.
        config: how to prune.
        width: neurons of a layer that stay.
        removable: how many whole layers go, and which may not.
        tokens: all calibration samples, `[samples, length]`.
        plan: how the work is cut.
        ranks: the processes that share it.
        folder: for files that the work needs; `None` if it needs none.
        journal: where finished layers are recorded, in the first process; `None` in the others, and for a run that
            can't be gone on with.
    """

    def __init__(
        self,
        runner: LayerRunner,
        config: CompConfig,
        width: int,
        removable: tuple[int, set[int]],
        tokens: Tensor,
        plan: MemoryPlan,
        ranks: Ranks,
        folder: Path | None,
        journal: Journal | None,
    ):
        self.source, self.config, self.width, self.ranks = runner.source, config, width, ranks
        self.spec = self.source.spec
        self.clock = Stopwatch()
        self._runner = runner
        self._removable = removable
        self._tokens = tokens
        self._batches = ranks.batches(tokens, plan.batch_size)
        self._rows = rows_of(self._batches)
        self._plan = plan
        self._folder = folder
        self._journal = journal
        self._is_recorded = ranks.from_first(journal is not None)
        self._stores: list[ActivationStore] = []
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None
        consumer = self.spec.get_consumer(self.source.layers[0])
        self._hidden, self._neurons = consumer.weight.shape
        self._solving = solve_dtype(self._neurons)
        # Where equalization scales go: behind what other dense layers read, and behind what the consumer reads.
        self._folds: list[Fold] = []
        self._consumer_fold: Fold | None = None

    def run(self) -> Pruned:
        """Prune every layer that stays, in order.

        Raises:
            FloatingPointError: activations that are NaN or infinite; names the layer.
            ValueError: moments that can't be inverted; names the layer.
            OSError: no space, or another trouble with files.
        """
        try:
            pruned = self._run()
            self._until_written()
            return pruned
        finally:
            # An interrupted run still gets its last finished layer onto the disk.
            self._writer.shutdown(wait=True)
            for store in self._stores:
                store.close()

    def _run(self) -> Pruned:
        keep_large_blocks_apart()
        own = self._store("own", self._hidden, self._plan.spill_states)
        done = self.ranks.from_first(0 if self._journal is None else self._journal.finished)
        removed, scores = self._coarse(own)
        kept_layers = [index for index in range(len(self.source.layers)) if index not in removed]
        with self.clock("forward"):
            self._runner.embed_all(self._batches, own)
        additive = self._adds_to_residual(kept_layers[0], own)
        if self.config.equalize:
            self._find_folds(kept_layers[0], own)
        aligned = additive and self.config.alignment > 0 and self.config.recovery != "none"
        # Two streams of hidden states: the pruned model's own, and the dense model's, which the repair leans on.
        dense = self._store("dense", self._hidden, self._plan.spill_states) if aligned else None
        inputs = self._store("inputs", self._neurons, self._plan.spill_inputs) if additive else None
        if done:
            self._restore(done, own, dense)
        elif dense is not None:
            self._advance(range(kept_layers[0]), own, dense)

        reports = [self._recorded(place) for place in range(done)] if self.ranks.is_first else []
        progress = tqdm(
            total=len(kept_layers),
            initial=done,
            desc="Pruning",
            unit="layer",
            disable=progress_disabled() or not self.ranks.is_first,
        )
        with progress:
            for place in range(done, len(kept_layers)):
                index, following = kept_layers[place], [*kept_layers[1:], len(self.source.layers)][place]
                gap = range(index + 1, following)
                bridged = bool(gap) and self.config.bridge and additive
                with _names_layer(f"{self.spec.layers}.{index}.{self.spec.consumer}"):
                    moments = self._observe(
                        index, gap if bridged else range(0), own, inputs, dense, is_first=index == 0
                    )
                    found, factors = self._decide(index, moments)
                del moments
                release_free_memory()
                if dense is not None and not bridged:
                    self._pass(gap, dense)
                self._commit(place, index, found, factors)
                energy = self._update(index, found, own, inputs)
                error = found.error / (found.error + energy) if found.error > 0 else 0.0
                report = LayerReport(index, found.kept.tolist(), found.scores.tolist(), error, bridged=bridged)
                reports.append(report)
                del found, factors
                release_free_memory()
                self._record(place, report, own, dense)
                progress.set_postfix(error=f"{report.relative_error:.1%}")
                progress.update()
        return Pruned(removed, scores, reports)

    def _store(self, name: str, channels: int, spill: bool) -> ActivationStore:
        file = None
        if spill and self._folder is not None:
            file = self._folder / f"spill-{name}-{self.ranks.rank}.bin"
        samples = sum(map(len, self._batches))
        store = ActivationStore(samples, self._tokens.shape[1], channels, self.source.state_dtype, file)
        self._stores.append(store)
        return store

    def _read(self, store: ActivationStore, rows: slice) -> Tensor:
        return store.read(rows, self.source.device, self.source.compute_dtype)

    def _consume(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """What a consumer with this weight makes of its inputs, without its bias."""
        with self._runner.products():
            return functional.linear(inputs, weight).to(inputs.dtype)

    def _coarse(self, scratch: ActivationStore) -> tuple[list[int], list[float]]:
        """Which layers go, and every layer's score (empty if none goes)."""
        count, protected = self._removable
        if count == 0:
            return [], []
        state = {} if self._journal is None else self._journal.state
        found = self.ranks.from_first((state["removed"], state["layer_scores"]) if "removed" in state else None)
        if found is None:
            with self.clock("forward"):
                score = LAYER_SCORES[self.config.layer_metric]
                scores = score(self._runner, self._tokens, self._batches, self.ranks, scratch)
            found = (least_important(scores, count, protected), scores)
            if self._journal is not None:
                self._journal.record(removed=found[0], layer_scores=found[1])
        return found

    def _advance(self, indices: range, own: ActivationStore, dense: ActivationStore) -> None:
        """Start the dense stream where the own one begins, and take it through removed layers at the very front."""
        for rows in self._rows:
            dense.write(rows, own.read(rows, torch.device("cpu"), own.dtype))
        self._pass(indices, dense)

    def _pass(self, indices: range, states: ActivationStore) -> None:
        """Take hidden states through several dense layers."""
        for index in indices:
            with self._layer(index), self.clock("forward"):
                for rows in self._rows:
                    states.write(rows, self._runner.run(index, self._read(states, rows)))

    @contextlib.contextmanager
    def _layer(self, index: int) -> Iterator[torch.nn.Module]:
        with contextlib.ExitStack() as stack:
            with self.clock("read"):
                layer = stack.enter_context(self.source.layer(index))
            yield layer

    def _adds_to_residual(self, index: int, own: ActivationStore) -> bool:
        """Whether the layer's output is the tapped layer's output plus the consumer's (no norm in between).

        Measured, not declared: OPT-350m differs from its siblings in this by one config field.
        """
        with self._layer(index) as layer:
            hidden = self._read(own, slice(0, 1))
            whole = self._runner.run(index, hidden, exact=True)
            consumer = self.spec.get_consumer(layer)
            tap = Tap(consumer)
            with replaced(layer, self.spec.consumer, tap):
                residual = self._runner.run(index, hidden, exact=True)
            assert tap.inputs is not None
            rebuilt = residual + functional.linear(tap.inputs, consumer.weight).view_as(residual)
        tolerance = 16 * torch.finfo(hidden.dtype).eps
        difference = float((rebuilt.float() - whole.float()).abs().max())
        return difference <= tolerance * float(whole.float().abs().max().clamp_min(1.0))

    def _find_folds(self, index: int, own: ActivationStore) -> None:
        with self._layer(index) as layer:
            hidden = self._read(own, slice(0, 1))
            held = holding_folds(layer, self.spec.folds, lambda: self._runner.run(index, hidden, exact=True))
        self._folds = [fold for fold in held if fold.consumers != (self.spec.consumer,)]
        self._consumer_fold = next((fold for fold in held if fold not in self._folds), None)

    def _observe(
        self,
        index: int,
        gap: range,
        own: ActivationStore,
        inputs: ActivationStore | None,
        dense: ActivationStore | None,
        *,
        is_first: bool,
    ) -> Moments:
        """Run a layer with its consumer tapped.

        Afterwards, where the layer adds its consumer's output to the residual stream (`inputs` isn't `None`), `own`
        holds the residual stream and `inputs` the consumer's inputs; `dense` holds the dense model's hidden states
        behind the layer and the gap.

        Args:
            index: the layer.
            gap: removed layers behind it that it is to stand in for.
            own: the pruned model's hidden states.
            inputs: where the consumer's inputs go.
            dense: the dense model's hidden states, or `None` if the repair doesn't lean on them.
            is_first: whether the layer is the dense model's first.
        """
        clock, shape = self.clock, (self._hidden, self._neurons)
        gram = GramAccumulator(self._neurons, device=self.source.device, dtype=self._solving)
        cross = None
        if dense is not None and not is_first and not gap:
            cross = torch.zeros(shape, dtype=self._solving, device=self.source.device)
        with self._layer(index) as layer:
            consumer = self.spec.get_consumer(layer)
            weight = consumer.weight.detach().clone()
            tap = Tap(consumer)
            ranges = unseen(layer, self._folds)
            largest = None if self._consumer_fold is None else weight.new_zeros(self._neurons, dtype=torch.float32)
            for rows in self._rows:
                with clock("forward"), replaced(layer, self.spec.consumer, tap), watching(layer, ranges):
                    residual = self._runner.run(index, self._read(own, rows))
                if tap.inputs is None:
                    raise RuntimeError(f"layer {index} never called its {self.spec.consumer}.")
                seen = tap.inputs.to(residual.dtype)
                with clock("gram"):
                    gram.update(seen)
                    if largest is not None:
                        largest = torch.maximum(largest, seen.reshape(-1, self._neurons).abs().amax(0).float())
                if inputs is not None:
                    inputs.write(rows, seen)
                    own.write(rows, residual)
                if dense is None:
                    continue
                with clock("forward"):
                    # Before anything is pruned, the dense model's hidden states are the pruned one's.
                    same = residual + self._consume(seen, weight).view_as(residual) if is_first else None
                    wanted = self._runner.run(index, self._read(dense, rows)) if same is None else same
                    dense.write(rows, wanted)
                if cross is not None:
                    with clock("gram"):
                        add_cross_moment(cross, wanted - residual, seen)
            self.ranks.max_(largest, *(seen.largest for seen in ranges.values()))
            self.ranks.sum_(*(seen.energy for seen in ranges.values()))
            with clock("solve"):
                factors = layer_factors(layer, ranges, self._tokens.numel())
            del layer, consumer, tap
        if gap and inputs is not None:
            moments = self._observe_gap(gap, own, inputs, dense, gram, weight)
        else:
            self.ranks.sum_(gram.sum, cross)
            share = self.config.alignment
            moments = Moments(gram.value(), None if cross is None else cross.mul_(share), share, weight)
        return dataclasses.replace(moments, factors=factors, largest=largest)

    def _observe_gap(
        self,
        gap: range,
        own: ActivationStore,
        inputs: ActivationStore,
        dense: ActivationStore | None,
        gram: GramAccumulator,
        weight: Tensor,
    ) -> Moments:
        """What a consumer's output lacks if it is to do the work of removed layers behind it, too."""
        over_gap = torch.zeros(weight.shape, dtype=self._solving, device=self.source.device)
        deviation = torch.zeros_like(over_gap) if dense is not None else None
        whole = self._store("whole", self._hidden, self._plan.spill_states)
        for rows in self._rows:
            whole.write(rows, self._read(own, rows) + self._consume(self._read(inputs, rows), weight))
        self._pass(gap, whole)
        if dense is not None:
            self._pass(gap, dense)
        with self.clock("gram"):
            for rows in self._rows:
                seen, wanted = self._read(inputs, rows), self._read(whole, rows)
                before = self._read(own, rows) + self._consume(seen, weight)
                add_cross_moment(over_gap, wanted - before, seen)
                if dense is not None and deviation is not None:
                    add_cross_moment(deviation, self._read(dense, rows) - wanted, seen)
        whole.close()
        self.ranks.sum_(gram.sum, over_gap, deviation)
        if deviation is not None:
            deviation.mul_(self.config.alignment)
        value = gram.value()
        if FORMS.get(self.config.resolved_neuron_metric) == self.config.recovery == "least_squares":
            # Both moments pull at the same optimum.
            return Moments(value, over_gap if deviation is None else over_gap.add_(deviation), 0.0, weight)
        with self.clock("solve"):
            return Moments(value, deviation, 0.0, refit(weight, value, over_gap, self.config.ridge))

    def _decide(self, index: int, moments: Moments) -> tuple[Reduction, Factors]:
        """Choose and repair in the first process; the others take over what it found."""
        found, factors = None, moments.factors
        if self.ranks.is_first:
            with self.clock("solve"):
                energy = None if moments.largest is None else moments.gram.diagonal().clone()
                found = reduce_channels(
                    moments.weight,
                    moments.gram,
                    self.width,
                    metric=self.config.resolved_neuron_metric,
                    recovery=self.config.recovery,
                    ridge=self.config.ridge,
                    block_size=self.config.elimination_block,
                    # Of the layer alone, so that a run that is gone on with draws what an undisturbed one draws.
                    generator=torch.Generator().manual_seed(1_000_003 * self.config.seed + index),
                    cross=moments.cross,
                    own_share=moments.own_share,
                    overwrite=True,
                )
                # Everything after this sees the weight as it is saved.
                weight = found.weight.to("cpu", self.source.state_dtype)
                found = Reduction(found.kept.cpu(), weight, found.scores.cpu(), found.error)
                factors = self._with_consumer(index, factors, moments.largest, energy, found)
        shared = self.ranks.from_first((found, factors))
        assert shared[0] is not None
        return shared[0], shared[1]

    def _with_consumer(
        self, index: int, factors: Factors, largest: Tensor | None, energy: Tensor | None, found: Reduction
    ) -> Factors:
        """The factors, with those that even out what the neurons that stay give to the consumer."""
        if self._consumer_fold is None or largest is None or energy is None:
            return factors
        kept = found.kept
        scales, _ = find_scales(largest.cpu()[kept], energy.cpu()[kept], self._tokens.numel(), found.weight)
        merged = {name: list(given) for name, given in factors.items()}
        for name, given in fold_factors(self.source.layers[index], self._consumer_fold, scales).items():
            merged.setdefault(name, []).extend(given)
        return merged

    def _commit(self, place: int, index: int, found: Reduction, factors: Factors) -> None:
        with self.clock("write"):
            if self.source.is_resident or self.ranks.is_first:
                self.source.commit(index, place, found.kept, found.weight, factors)

    def _update(
        self,
        index: int,
        found: Reduction,
        own: ActivationStore,
        inputs: ActivationStore | None,
    ) -> float:
        """Bring the hidden states behind the pruned layer; returns the repaired consumer's squared output."""
        energy = torch.zeros((), dtype=torch.float64, device=self.source.device)
        kept, weight = found.kept.to(self.source.device), found.weight.to(self.source.device)
        if inputs is not None:
            # Kept columns of the activations that are there already: no second pass through the layer.
            weight = weight.to(self.source.compute_dtype)
            with self.clock("forward"):
                for rows in self._rows:
                    new = self._consume(self._read(inputs, rows)[..., kept], weight)
                    energy += new.float().square().sum(dtype=torch.float64)
                    own.write(rows, self._read(own, rows) + new)
            self.ranks.sum_(energy)
            return float(energy)
        with self._layer(index) as layer, self.clock("forward"):
            if self.spec.get_consumer(layer).weight.shape[1] != len(kept):
                apply_to_layer(self.spec, layer, kept, weight)
            consumer = self.spec.get_consumer(layer)

            def add(module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> None:
                nonlocal energy
                new = output if consumer.bias is None else output - consumer.bias
                energy += new.float().square().sum(dtype=torch.float64)

            hook = consumer.register_forward_hook(add)
            for rows in self._rows:
                own.write(rows, self._runner.run(index, self._read(own, rows)))
            hook.remove()
        self.ranks.sum_(energy)
        return float(energy)

    def _record(self, place: int, report: LayerReport, own: ActivationStore, dense: ActivationStore | None) -> None:
        """Make the layer count as finished, if the run is recorded.

        One process alone writes a copy of hidden states that are in memory beside the next layer's work: the disk
        takes its time. Several have to agree that all have written.
        """
        if not self._is_recorded:
            return
        with self.clock("write"):
            self._until_written()
            states = {"own": own} if dense is None else {"own": own, "dense": dense}
            if self.ranks.size > 1 or self._plan.spill_states:
                self._write_state(place, report, states)
            else:
                copies = {name: store.copy() for name, store in states.items()}
                self._writing = self._writer.submit(self._write_state, place, report, copies)

    def _until_written(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write_state(self, place: int, report: LayerReport, states: dict[str, ActivationStore]) -> None:
        for name, store in states.items():
            store.save(self._state_file(name, place + 1))
        self.ranks.wait()
        if self._journal is not None:
            with durably(self._report_file(place)) as partial:
                partial.write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")
            self._journal.record(finished=place + 1)
        self.ranks.wait()
        for name in ("own", "dense"):
            self._state_file(name, place).unlink(missing_ok=True)

    def _restore(self, done: int, own: ActivationStore, dense: ActivationStore | None) -> None:
        with self.clock("read"):
            own.load(self._state_file("own", done))
            if dense is not None:
                dense.load(self._state_file("dense", done))

    def _recorded(self, place: int) -> LayerReport:
        return LayerReport(**json.loads(self._report_file(place).read_text(encoding="utf-8")))

    def _report_file(self, place: int) -> Path:
        assert self._folder is not None
        return self._folder / f"layer-{place:05d}.json"

    def _state_file(self, stream: str, finished: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{stream}-{self.ranks.rank}-{finished:05d}.bin"


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
