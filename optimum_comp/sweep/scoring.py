"""The coarse step on a real model: every decoder layer's score, with one layer at hand at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optimum_comp.checkpoint.source import ModelSource
from optimum_comp.core.layer_scores import CosineDistance, next_token_loss
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.runner import LayerRunner
from optimum_comp.sweep.states import ActivationStore, rows_of
from optimum_comp.utils import progress_disabled


LOSS_SAMPLES = 8
"""The loss metric carries a stream of hidden states for each layer that is skipped; of this many samples, to bound its
cost and its memory."""


def cosine_scores(
    runner: LayerRunner, tokens: Tensor, batches: list[Tensor], ranks: Ranks, scratch: ActivationStore
) -> list[float]:
    """`1 − cos(input, output)` of each layer, averaged over tokens, from one pass."""
    source, rows = runner.source, rows_of(batches)
    runner.embed_all(batches, scratch)
    sums = torch.zeros(len(source.layers), 2, dtype=torch.float64)
    for index in _progress(source, ranks):
        distance = CosineDistance()
        with source.layer(index):
            for part in rows:
                states = scratch.read(part, source.device, source.compute_dtype)
                output = runner.run(index, states)
                distance.update(states, output)
                scratch.write(part, output)
        sums[index] = torch.tensor([distance.sum, distance.tokens])
    return _means(sums, ranks)


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
    variants: list[list[Tensor]] = []
    for index in _progress(source, ranks):
        skipped = list(whole)
        with source.layer(index):
            whole = [runner.run(index, states) for states in whole]
            variants = [[runner.run(index, states) for states in variant] for variant in variants]
        variants.append(skipped)
    sums = torch.zeros(len(variants), 2, dtype=torch.float64)
    with source.outside(head=True):
        for index, variant in enumerate(variants):
            for sample, states in zip(samples, variant, strict=True):
                sums[index] += torch.tensor(next_token_loss(runner.logits(sample, states), sample))
    return _means(sums, ranks)


def _progress(source: ModelSource, ranks: Ranks) -> Iterable[int]:
    disable = progress_disabled() or not ranks.is_first
    return tqdm(range(len(source.layers)), desc="Scoring layers", unit="layer", disable=disable)


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
