"""What a text begins with: what the tokenizer itself puts in front of one, unless the model does as well without.

Some models are lost where a text doesn't begin with their begin-of-text token, since they have never seen one that
doesn't; most don't care.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_comp.checkpoint.source import ModelSource
from optimum_comp.configuration import require_begin
from optimum_comp.core.layer_scores import next_token_loss
from optimum_comp.sweep.loop import read_through
from optimum_comp.sweep.runner import LayerRunner
from optimum_comp.utils import get_logger


logger = get_logger(__name__)

_PIECES = 4
LONGEST = 512
"""The decision looks at so many pieces of the text, of so many tokens each at most."""
_MARGIN = 0.01
"""Share of the loss below which a difference is noise: SmolLM2's changes its sign from text to text there, and pruned
on blocks with its start token, it is better on two texts and worse on one. Each takes a token's place."""

Span = tuple[int, int]
Losses = Callable[[list[Tensor], list[Span]], list[float]]
"""Samples `[1, length]` of one length, and of each the first and the last-plus-one position that is predicted -> the
mean next-token loss (nats) of each."""


@dataclass(frozen=True)
class Beginning:
    """What blocks and windows begin with.

    Attributes:
        tokens: ids; empty for nothing.
        start: the tokenizer's start tokens as text, whether they are taken or not.
        loss_with: mean next-token loss with them; `None` if not measured.
        loss_without: the same without, of the very same tokens.
    """

    tokens: tuple[int, ...] = ()
    start: str = ""
    loss_with: float | None = None
    loss_without: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; only `begins_with` where the tokenizer has no start tokens."""
        data: dict[str, Any] = {"begins_with": list(self.tokens)}
        if self.start:
            data["start"] = self.start
        if self.loss_with is not None:
            data |= {"loss_with_start": self.loss_with, "loss_without_start": self.loss_without}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Beginning | None:
        """What `to_dict` gave, among other things; `None` if it isn't there."""
        if "begins_with" not in data:
            return None
        losses = data.get("loss_with_start"), data.get("loss_without_start")
        return cls(tuple(data["begins_with"]), data.get("start", ""), *losses)

    def sentence(self, what: str) -> str:
        """What was decided, and why.

        Args:
            what: what begins so: `"Blocks"`, `"Windows"`.
        """
        verb = "begin" if self.tokens else "don't begin"
        why = ""
        if self.loss_with is not None and self.loss_without is not None:
            why = f": loss {self.loss_with:.3f} with it, {self.loss_without:.3f} without"
        return f"{what} {verb} with {self.start!r}{why}."


def start_tokens(tokenizer: Any) -> list[int]:
    """Ids of what a tokenizer puts in front of a text: one begin-of-text token as a rule, or none."""
    whole = list(tokenizer("x")["input_ids"])
    text = list(tokenizer("x", add_special_tokens=False)["input_ids"])
    for place in range(len(whole) - len(text) + 1):
        if whole[place : place + len(text)] == text:
            return whole[:place]
    return []


def spread(tokens: Tensor, length: int) -> Tensor:
    """A few pieces of a text to decide by.

    Args:
        tokens: the text, `[n]`; or texts, `[samples, n]`, of which the first are taken.
        length: of a sample or window; pieces are no longer.

    Returns:
        `[pieces, length or less]`; of one text, spread evenly over it and apart from each other.
    """
    if tokens.dim() == 2:
        return tokens[:_PIECES, : min(length, LONGEST)]
    length = min(length, LONGEST, tokens.numel())
    pieces = min(_PIECES, tokens.numel() // length) if length else 0
    starts = torch.linspace(0, tokens.numel() - length, pieces).long().tolist()
    return torch.stack([tokens[start : start + length] for start in starts]) if pieces else tokens.new_empty(0, 0)


def decide(begin: str, tokenizer: Any, pieces: Tensor, losses: Losses, what: str) -> Beginning:
    """What texts are to begin with; said in the log where there is a choice.

    Start tokens are taken where the same tokens of text are predicted better behind them, by more than noise. For
    that, each piece is read twice: as it is, and with start tokens in front and as many tokens fewer at its end; its
    first token isn't predicted in either.

    Args:
        begin: `"auto"`, `"always"` or `"never"`. `"always"` is nothing with a tokenizer that has no start tokens.
        tokenizer: whose start tokens they are; `None` has none.
        pieces: of the text, `[pieces, length]`; see `spread`.
        losses: runs the model. Not called where there is nothing to choose from.
        what: what begins so, for the log: `"Blocks"`, `"Windows"`.

    Raises:
        ValueError: `begin` is none of them.
    """
    require_begin(begin)
    start = [] if tokenizer is None else start_tokens(tokenizer)
    if not start:
        return Beginning()
    text, count = str(tokenizer.decode(start)), len(start)
    if begin == "never":
        found = Beginning((), text)
    elif begin == "always" or pieces.numel() == 0 or pieces.shape[1] < count + 2:
        found = Beginning(tuple(start), text)
    else:
        length = pieces.shape[1]
        without = list(pieces.split(1))
        behind = [in_front(start, piece[:, : length - count]) for piece in without]
        spans = [(count + 1, length)] * len(behind) + [(1, length - count)] * len(without)
        each = losses(behind + without, spans)
        # All pieces have as many predictions, so that the mean of their means is that of all.
        loss_with, loss_without = (sum(part) / len(part) for part in (each[: len(behind)], each[len(behind) :]))
        helps = loss_with < (1 - _MARGIN) * loss_without
        found = Beginning(tuple(start) if helps else (), text, loss_with, loss_without)
    logger.info(found.sentence(what))
    return found


def losses_of_model(model: Any) -> Losses:
    """By a model that is loaded as a whole.

    Args:
        model: a causal language model of transformers or `ORTModelForCausalLM`.
    """

    @torch.no_grad()
    def losses(samples: list[Tensor], spans: list[Span]) -> list[float]:
        found = []
        for sample, (first, last) in zip(samples, spans, strict=True):
            given = sample.to(model.device)
            logits = model(input_ids=given, attention_mask=torch.ones_like(given)).logits
            total, count = next_token_loss(logits[:, first - 1 : last], given[:, first - 1 : last])
            found.append(total / count)
        return found

    return losses


def losses_of_source(source: ModelSource) -> Losses:
    """By a model one decoder layer of which is at hand at a time; each is read once for all samples.

    In the dtype that the source computes in, so that no processor decides otherwise than another.
    """

    @torch.no_grad()
    def losses(samples: list[Tensor], spans: list[Span]) -> list[float]:
        samples = [sample.to(source.device) for sample in samples]
        runner, states = read_through(source, samples)
        found = []
        with source.outside(head=True):
            for sample, each, span in zip(samples, states, spans, strict=True):
                found.append(_head_loss(runner, sample, each, span))
        return found

    return losses


def _head_loss(runner: LayerRunner, sample: Tensor, states: Tensor, span: Span) -> float:
    """Mean loss of a span of a sample from what leaves the last decoder layer, some positions at a time."""
    step = runner.positions_at_a_time
    total, count = 0.0, 0
    for first in range(span[0] - 1, span[1] - 1, step):
        # One position more than is predicted from: what it makes is left aside.
        part = slice(first, min(first + step, span[1] - 1) + 1)
        loss, predictions = next_token_loss(runner.logits(sample[:, part], states[:, part]), sample[:, part])
        total, count = total + loss, count + predictions
    return total / count


def in_front(start: Sequence[int], tokens: Tensor) -> Tensor:
    """Start tokens in front of each sample: `[samples, n]` -> `[samples, len(start) + n]`."""
    if not len(start):
        return tokens
    front = torch.tensor([list(start)], dtype=tokens.dtype, device=tokens.device)
    return torch.cat([front.expand(tokens.shape[0], -1), tokens], dim=1)
