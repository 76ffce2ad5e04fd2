"""How much a whole decoder layer does: the coarse step's scores, and which layers go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class CosineDistance:
    """Streamed sum over tokens of `1 − cos(layer input, layer output)`; small for a layer that hardly acts.

    Attributes:
        sum: of the distances.
        tokens: how many.
    """

    def __init__(self) -> None:
        self.sum = 0.0
        self.tokens = 0

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add a batch of hidden states, both `[..., d]`."""
        similarity = torch.nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1)
        self.sum += float((1.0 - similarity).sum())
        self.tokens += similarity.numel()


def next_token_loss(logits: Tensor, tokens: Tensor) -> tuple[float, int]:
    """Summed cross entropy (nats) of the next token and the number of predictions.

    Args:
        logits: `[batch, length, vocabulary]`.
        tokens: `[batch, length]`.
    """
    flat = logits[:, :-1].float().reshape(-1, logits.shape[-1])
    labels = tokens[:, 1:].reshape(-1)
    return float(torch.nn.functional.cross_entropy(flat, labels, reduction="sum")), labels.numel()


def least_important(scores: Sequence[float], count: int, protected: Iterable[int]) -> list[int]:
    """Indices, ascending, of the `count` layers with the lowest scores outside `protected`.

    Raises:
        ValueError: fewer than `count` layers are unprotected.
    """
    guarded = set(protected)
    candidates = sorted((score, index) for index, score in enumerate(scores) if index not in guarded)
    if len(candidates) < count:
        raise ValueError(f"{count} layers are to go, but only {len(candidates)} of {len(scores)} are not protected.")
    return sorted(index for _, index in candidates[:count])
