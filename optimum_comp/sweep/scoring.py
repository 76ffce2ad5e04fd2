"""The coarse step on a real model: every decoder layer's score, with one layer at hand at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_comp.checkpoint.source import ModelSource
from optimum_comp.core.layer_scores import CosineDistance, next_token_loss
from optimum_comp.sweep.loop import sweep
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.runner import LayerRunner
from optimum_comp.sweep.states import ActivationStore, rows_of
from optimum_comp.utils import progress_disabled


LOSS_SAMPLES = 8
"""The loss metric carries a stream of hidden states for each layer that is skipped; of this many samples, to bound its
cost and its memory."""


class _Cosine:
    """Compares what goes into a layer with what comes out of it, on the way through all of them."""

    def __init__(self, runner: LayerRunner, rows: list[slice], states: ActivationStore, progress: tqdm):
        self._runner, self._rows, self._states, self._progress = runner, rows, states, progress
        self.sums: list[list[float]] = []

    def visit(self, index: int, layer: nn.Module) -> None:
        source, distance = self._runner.source, CosineDistance()
        for rows in self._rows:
            states = self._states.read(rows, source.device, source.compute_dtype)
            output = self._runner.run(index, states)
            distance.update(states, output)
            self._states.write(rows, output)
        self.sums.append([distance.sum, distance.tokens])

    def leave(self, index: int) -> None:
        self._progress.update()


def cosine_scores(
    runner: LayerRunner, tokens: Tensor, batches: list[Tensor], ranks: Ranks, scratch: ActivationStore
) -> list[float]:
    """`1 − cos(input, output)` of each layer, averaged over tokens, from one pass."""
    runner.embed_all(batches, scratch)
    with _progress(runner.source, ranks) as progress:
        visitor = _Cosine(runner, rows_of(batches), scratch, progress)
        sweep(runner.source, range(len(runner.source.layers)), visitor)
    return _means(torch.tensor(visitor.sums, dtype=torch.float64), ranks)


class _Skipping:
    """Takes the whole model's hidden states through a layer, and those with each layer before it skipped."""

    def __init__(self, runner: LayerRunner, whole: list[Tensor], progress: tqdm):
        self._runner, self._whole, self._progress = runner, whole, progress
        self.variants: list[list[Tensor]] = []

    def visit(self, index: int, layer: nn.Module) -> None:
        skipped = list(self._whole)
        self._whole = [self._runner.run(index, states) for states in self._whole]
        self.variants = [[self._runner.run(index, states) for states in variant] for variant in self.variants]
        self.variants.append(skipped)

    def leave(self, index: int) -> None:
        self._progress.update()


def loss_scores(
    runner: LayerRunner, tokens: Tensor, batches: list[Tensor], ranks: Ranks, scratch: ActivationStore
) -> list[float]:
    """Mean next-token loss (nats) with each layer skipped in turn.

    All variants go through a layer together: the whole model's own hidden states, and a copy for every layer before,
    which parted from them where that layer was skipped.
    """
    source = runner.source
    mine = tokens[:LOSS_SAMPLES][ranks.rank :: ranks.size].to(source.device)
    samples = [mine[number : number + 1] for number in range(mine.shape[0])]
    with source.outside():
        whole = [runner.embed(sample) for sample in samples]
    with _progress(source, ranks) as progress:
        visitor = _Skipping(runner, whole, progress)
        sweep(source, range(len(source.layers)), visitor)
    sums = torch.zeros(len(visitor.variants), 2, dtype=torch.float64)
    with source.outside(head=True):
        for index, variant in enumerate(visitor.variants):
            for sample, states in zip(samples, variant, strict=True):
                sums[index] += torch.tensor(next_token_loss(runner.logits(sample, states), sample))
    return _means(sums, ranks)


def _progress(source: ModelSource, ranks: Ranks) -> tqdm:
    disable = progress_disabled() or not ranks.is_first
    return tqdm(total=len(source.layers), desc="Scoring layers", unit="layer", disable=disable)


def _means(sums: Tensor, ranks: Ranks) -> list[float]:
    """A mean for each layer, from this process's sums and counts `[layers, 2]`."""
    ranks.sum_(sums)
    return (sums[:, 0] / sums[:, 1]).tolist()


LayerScore = Callable[[LayerRunner, Tensor, list[Tensor], Ranks, ActivationStore], list[float]]

LAYER_SCORES: dict[str, LayerScore] = {
    "cosine": cosine_scores,
    "loss": loss_scores,
}
"""Runner of the dense model, all samples `[samples, length]`, this process's batches of them, the processes, and a
store of hidden states of those batches that may be overwritten -> a score a layer; low ones go first."""
