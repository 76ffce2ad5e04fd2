"""The Fisher information of every layer's output, with one layer in memory at a time: forwards, then backwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_comp.sweep.loop import sweep
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.runner import LayerRunner
from optimum_comp.sweep.states import ActivationStore
from optimum_comp.utils import progress_disabled


FISHER_SAMPLES = 32
"""Calibration samples whose gradients are looked at, at most, to bound time and disk. With 8, which ones they are
makes more difference on text of another kind than anything else does."""
STATE_DTYPE = torch.bfloat16
"""Of the hidden states between layers while gradients are on their way back: second moments need no more digits."""


def fisher_rows(samples: int, ranks: Ranks) -> list[int]:
    """Which of so many calibration samples are looked at, spread over all, and by this process."""
    chosen = range(0, samples, max(1, samples // FISHER_SAMPLES))[:FISHER_SAMPLES]
    return list(chosen)[ranks.rank :: ranks.size]


class _Forwards:
    """Keeps what goes into each layer, and what comes out of the last one."""

    def __init__(self, runner: LayerRunner, states: ActivationStore, samples: int, progress: tqdm):
        self._runner, self._states, self._samples, self._progress = runner, states, samples, progress
        self.broken = torch.zeros(1)

    def visit(self, index: int, layer: nn.Module) -> None:
        source = self._runner.source
        for number in range(self._samples):
            there = index * self._samples + number
            hidden = self._states.read(slice(there, there + 1), source.device, source.compute_dtype)
            there += self._samples
            output = self._runner.run(index, hidden)
            self.broken += not torch.isfinite(output).all()
            self._states.write(slice(there, there + 1), output)

    def leave(self, index: int) -> None:
        self._progress.update()


class _Backwards:
    """Takes gradients from behind each layer to before it."""

    def __init__(
        self,
        runner: LayerRunner,
        states: ActivationStore,
        gradients: list[Tensor],
        moments: ActivationStore,
        ranks: Ranks,
        progress: tqdm,
    ):
        self._runner, self._states, self._gradients = runner, states, gradients
        self._moments, self._ranks, self._progress = moments, ranks, progress

    def visit(self, index: int, layer: nn.Module) -> None:
        source, count = self._runner.source, len(self._gradients)
        hidden = self._moments.shape[1]
        moment = torch.zeros(hidden, hidden, device=source.device)
        for number, behind in enumerate(self._gradients):
            flat = behind.view(-1, hidden).float()
            moment.addmm_(flat.T, flat)
            if index == 0:
                continue
            there = index * count + number
            entering = self._states.read(slice(there, there + 1), source.device, source.compute_dtype)
            with torch.enable_grad():
                entering.requires_grad_()
                # A copy: some families add to what they are given, which a leaf of the graph doesn't allow.
                leaving = self._runner.run(index, entering.clone())
                (self._gradients[number],) = torch.autograd.grad(leaving, entering, behind)
        self._ranks.sum_(moment)
        self._moments.write(slice(index, index + 1), moment)

    def leave(self, index: int) -> None:
        self._progress.update()


def output_moments(
    runner: LayerRunner, tokens: Tensor, ranks: Ranks, states: ActivationStore, moments: ActivationStore, seed: int
) -> bool:
    """Second moments of the loss's gradient behind every decoder layer, of the dense model.

    Next tokens are drawn from the model's own predictions, so that this is the Fisher information and not its
    imitation by the text's own tokens. Every process ends up with the sum over all of them.

    Args:
        runner: of the dense model.
        tokens: all calibration samples, `[samples, length]`.
        ranks: the processes that share them.
        states: room for the hidden states of this process's `fisher_rows`, `[(layers + 1) * rows, length, hidden]`.
        moments: where the result goes, `[layers, hidden, hidden]`.
        seed: of what is drawn.

    Returns:
        Whether there are any: not where hidden states are NaN or infinite.

    Raises:
        FloatingPointError: a prediction is NaN or infinite though no hidden state is.
    """
    source, rows = runner.source, fisher_rows(len(tokens), ranks)
    layers, count = range(len(source.layers)), len(rows)
    samples = [tokens[row : row + 1].to(source.device) for row in rows]
    with source.outside():
        for number, sample in enumerate(samples):
            states.write(slice(number, number + 1), runner.embed(sample))
    disable = progress_disabled() or not ranks.is_first
    with tqdm(total=2 * len(layers), desc="Looking for what matters", unit="layer", disable=disable) as progress:
        forwards = _Forwards(runner, states, count, progress)
        sweep(source, layers, forwards)
        ranks.sum_(forwards.broken)
        if forwards.broken:
            return False
        gradients = []
        with source.outside(head=True):
            for number, (row, sample) in enumerate(zip(rows, samples, strict=True)):
                there = len(layers) * count + number
                last = states.read(slice(there, there + 1), source.device, source.compute_dtype)
                generator = torch.Generator().manual_seed((1_000_003 * seed + row) % 2**63)
                gradients.append(_gradient_of_loss(runner, sample, last, generator))
        sweep(source, reversed(layers), _Backwards(runner, states, gradients, moments, ranks, progress))
    return True


def _gradient_of_loss(runner: LayerRunner, sample: Tensor, last: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient `[1, length, hidden]` of a sample's summed loss in what leaves the last layer; in parts.

    A position's logits depend on no other position's hidden state there, so their gradients don't either.
    """
    step = runner.positions_of_gradients
    parts = []
    for first in range(0, last.shape[1], step):
        part = slice(first, first + step)
        with torch.enable_grad():
            hidden = last[:, part].clone().requires_grad_()
            logits = runner.logits(sample[:, part], hidden * 1)[0].float()
            chances = torch.softmax(logits.detach(), -1)
            drawn = draw(chances, generator)
            # Of the cross-entropy in the logits; it takes what is there already, and its own code would make it anew.
            chances.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=chances.dtype))
            parts.append(torch.autograd.grad(logits, hidden, chances)[0])
    return torch.cat(parts, 1)


def draw(chances: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of chances `[rows, vocabulary]`, `[rows, 1]`.

    One random number a row, and not one for each of its tokens, as `torch.multinomial` takes.

    Raises:
        FloatingPointError: a chance is NaN or infinite.
    """
    # On the processor, so that every device draws the same.
    below = chances.cpu().cumsum(-1)
    total = below[:, -1:]
    if not torch.isfinite(total).all():
        raise FloatingPointError("NaN or infinity in the model's predictions.")
    wanted = torch.rand(len(below), 1, generator=generator) * total
    return torch.searchsorted(below, wanted, right=True).clamp_max_(below.shape[1] - 1).to(chances.device)
