"""Of a large vocabulary, the tokens over which predictions are compared in a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


_DRAWN = 2**13
"""Tokens that no text has and that a step looks at all the same."""
_MOST = 0.5
"""Share of the vocabulary from which on leaving the others out saves too little."""


class Candidates:
    """All tokens that are trained on, and others drawn anew for each step.

    Of a quarter of a million tokens, a text of some megabytes has a tenth, and the head's products are most of a
    step. What a teacher expects of all others together is little, and those that are drawn stand for them: each counts
    as so many as there are for one that is drawn, as in a sampled softmax (Jean et al., arXiv 1412.2007).

    Args:
        texts: token ids that are trained on.
        vocabulary: how many tokens there are.
        seed: of what is drawn.
    """

    def __init__(self, texts: Sequence[Tensor], vocabulary: int, seed: int):
        is_there = torch.zeros(vocabulary, dtype=torch.bool)
        for text in texts:
            is_there[text.flatten()] = True
        self._there, self._others = is_there.nonzero().flatten(), (~is_there).nonzero().flatten()
        self._places = is_there.cumsum(0) - 1
        self._seed = seed

    def __len__(self) -> int:
        """Tokens of a step."""
        return len(self._there) + min(_DRAWN, len(self._others))

    @property
    def pay(self) -> bool:
        """Whether there are few enough of them."""
        return len(self) <= _MOST * len(self._places)

    @property
    def offsets(self) -> Tensor:
        """Logarithm of how many tokens each of a step's stands for, `[len(self)]`."""
        drawn = len(self) - len(self._there)
        found = torch.zeros(len(self))
        if drawn:
            found[-drawn:] = math.log(len(self._others) / drawn)
        return found

    def of_step(self, step: int) -> Tensor:
        """Token ids of a step, `[len(self)]`; the same again for the same step."""
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + step)
        drawn = torch.randperm(len(self._others), generator=generator)[: len(self) - len(self._there)]
        return torch.cat([self._there, self._others[drawn]])

    def places(self, tokens: Tensor) -> Tensor:
        """Where tokens that are trained on stand among those of any step, in the shape that is given.

        What is negative stays so.
        """
        return torch.where(tokens < 0, tokens, self._places.to(tokens.device)[tokens.clamp(min=0)])


class _Partial(nn.Module):
    """A head that says of some tokens alone how likely they are.

    Args:
        head: the whole head, which isn't a part of this.
        tokens: their ids.
    """

    def __init__(self, head: nn.Linear, tokens: Tensor):
        super().__init__()
        self._head, self._tokens = (head,), tokens

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits `[..., tokens]`."""
        (head,) = self._head
        tokens = self._tokens.to(hidden.device)
        bias = None if head.bias is None else head.bias[tokens]
        return functional.linear(hidden, head.weight.index_select(0, tokens), bias)


@contextlib.contextmanager
def predicting(*chosen: tuple[Any, Tensor]) -> Iterator[None]:
    """Have models predict some tokens alone meanwhile.

    Args:
        chosen: models with heads that are `nn.Linear`, and for each the tokens' ids; its logits are in this order.
    """
    heads = [model.get_output_embeddings() for model, _ in chosen]
    try:
        for (model, tokens), head in zip(chosen, heads, strict=True):
            model.set_output_embeddings(_Partial(head, tokens))
        yield
    finally:
        for (model, _), head in zip(chosen, heads, strict=True):
            model.set_output_embeddings(head)
