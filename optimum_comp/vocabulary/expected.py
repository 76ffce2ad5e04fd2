"""Which tokens a model expects in texts, whether they have them or not."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optimum_comp.checkpoint.source import ModelSource
from optimum_comp.sweep.loop import read_through
from optimum_comp.utils import progress_disabled


@torch.no_grad()
def expected_tokens(source: ModelSource, samples: Tensor, given: int = 0) -> Tensor:
    """How often each token is to be expected where some samples have one.

    A text of some megabytes lacks half of the words that the next one has. The model has read far more, and says at
    each place what else might have stood there: the mean of its predictions is the frequency of tokens in all texts
    that go on like these, of which the text itself is one.

    Args:
        source: the model, one decoder layer of which is at hand at a time.
        samples: `[samples, length]`.
        given: tokens that each begins with and that aren't predicted.

    Returns:
        `[vocabulary]`, float64, with sum 1.
    """
    each = samples.to(source.device).split(1)
    layers = range(len(source.layers))
    shown = tqdm(layers, desc="Reading", unit="layer", disable=progress_disabled())
    runner, states_of = read_through(source, each, shown)
    found = torch.zeros(int(source.model.config.vocab_size), dtype=torch.float64)
    step, first = runner.positions_at_a_time, max(0, given - 1)
    with source.outside(head=True):
        pairs = list(zip(each, states_of, strict=True))
        for sample, states in tqdm(pairs, desc="Predicting", unit="sample", disable=progress_disabled()):
            for start in range(first, samples.shape[1], step):
                part = slice(start, start + step)
                logits = runner.logits(sample[:, part], states[:, part])
                found += torch.softmax(logits[0].float(), -1).sum(0, dtype=torch.float64).cpu()
    return found / found.sum()
