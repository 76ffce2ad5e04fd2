"""What is trained on: blocks of several texts, some of each held out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from optimum_comp.beginning import Beginning, in_front, spread
from optimum_comp.calibration.mix import Part, shared, weighed
from optimum_comp.calibration.text import PYDOC, SELF, read_text, source_name, tokenize
from optimum_comp.distillation.settings import DistilSettings
from optimum_comp.utils import shown


_MOST_TOKENS = 2**22
"""Of one source: more than days of training on a processor take."""
_CHARACTERS_PER_TOKEN = 6
_PIECES = 64
_MOST_HELD_OUT = 16
"""Blocks of all texts that are held out at most, but one of each: each evaluation looks at all of them."""


@dataclass(frozen=True)
class TextBlocks:
    """One text, in blocks.

    Attributes:
        name: of the source.
        share: of the samples that are trained on.
        train: `[blocks, length]`, int64.
        held_out: the same of what isn't trained on.
    """

    name: str
    share: float
    train: Tensor
    held_out: Tensor


def sources_of(text: Sequence[str] | None) -> list[Part]:
    """The sources that are trained on, with shares that add up to 1.

    Args:
        text: as `DistilSettings.text` has it.

    Raises:
        ValueError: a mix isn't written as one, or a source is there twice.
    """
    found: list[Part] = []
    for each in (SELF, PYDOC) if text is None else text:
        found += weighed(each) or [Part(each, 1.0)]
    names = [part.source for part in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"text={list(text or ())!r:.80} is not valid: {shown(name)!r} is there twice.")
    return list(shared(found))


def read_tokens(source: str, column: str | None, tokenizer: Any) -> Tensor:
    """Tokens of a source, `[n]`; of a very long one, of pieces that are spread over it."""
    text, _ = read_text(source, column, needed=_MOST_TOKENS // 4)
    most = _MOST_TOKENS * _CHARACTERS_PER_TOKEN
    if len(text) > most:
        starts = torch.linspace(0, len(text) - most // _PIECES, _PIECES).long().tolist()
        text = "\n\n".join(text[start : start + most // _PIECES] for start in starts)
    return tokenize(tokenizer, text)


def names_of(parts: Sequence[Part]) -> list[str]:
    """What the sources are called; files of one name by all of their paths."""
    short = [source_name(part.source) for part in parts]
    return [part.source if short.count(name) > 1 else name for part, name in zip(parts, short, strict=True)]


def blocks_of(
    tokens: Tensor, name: str, share: float, settings: DistilSettings, beginning: Beginning, sources: int
) -> TextBlocks:
    """A text's blocks, with those that are held out spread over all of it.

    Args:
        tokens: `[n]`, or blocks that were written as such, `[blocks, length]`.
        name: of the source.
        share: of the samples.
        settings: length, and share that is held out.
        beginning: what each block begins with.
        sources: how many there are.

    Raises:
        ValueError: there aren't two blocks.
    """
    room = settings.sequence_length - len(beginning.tokens)
    if room < 2:
        raise ValueError(
            f"sequence_length={settings.sequence_length} leaves nothing to predict behind {beginning.start!r}; take "
            "more."
        )
    flat = tokens.flatten()
    count = require_blocks(flat.numel(), name, settings.sequence_length, beginning.tokens)
    blocks = in_front(beginning.tokens, flat[: count * room].view(count, room))
    held = min(max(1, _MOST_HELD_OUT // sources), max(1, round(settings.held_out * count)))
    # In the middle of equal parts.
    places = ((torch.arange(held) + 0.5) * count / held).long()
    is_held = torch.zeros(count, dtype=torch.bool)
    is_held[places] = True
    return TextBlocks(name, share, blocks[~is_held], blocks[is_held])


def require_blocks(tokens: int, name: str, sequence_length: int, start: Sequence[int]) -> int:
    """How many samples a text makes.

    Args:
        tokens: that it has.
        name: of the source.
        sequence_length: tokens of a sample.
        start: tokens that each begins with.

    Raises:
        ValueError: there aren't two, one to train on and one to hold out.
    """
    room = max(1, sequence_length - len(start))
    count = tokens // room
    if count < 2:
        raise ValueError(
            f"{shown(name)} is too short to train on: its {tokens:,} tokens make {count} samples of {room}, and one "
            "is held out. Give more text, or lower sequence_length."
        )
    return count


def pieces_of(texts: Sequence[Tensor], length: int) -> Tensor:
    """Some of each text, to decide by what blocks begin with, `[pieces, length]`."""
    pieces = [spread(tokens, length) for tokens in texts]
    shortest = min(piece.shape[1] for piece in pieces)
    return torch.cat([piece[:, :shortest] for piece in pieces])


class Stream(Dataset[dict[str, Tensor]]):
    """Samples in an order that doesn't end: each source as often as its share says, each of its blocks in turn.

    Which sample stands in which place follows from the seed alone, so that a run which is gone on with sees what an
    undisturbed one sees.

    Args:
        texts: the sources.
        samples: how many there are to be.
        seed: of the order.
    """

    def __init__(self, texts: Sequence[TextBlocks], samples: int, seed: int):
        self._texts, self._samples, self._seed = texts, samples, seed
        self._orders: dict[tuple[int, int], Tensor] = {}
        self._pattern = list(_interleaved([text.share for text in texts]))

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        round_, within = divmod(place, len(self._pattern))
        number = self._pattern[within]
        earlier = round_ * self._pattern.count(number) + self._pattern[:within].count(number)
        blocks = self._texts[number].train
        epoch, which = divmod(earlier, len(blocks))
        return {"input_ids": blocks[self._order(number, epoch)[which]]}

    def _order(self, number: int, epoch: int) -> Tensor:
        if (number, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != number}
            generator = torch.Generator().manual_seed((self._seed * 1009 + number) * 100_003 + epoch)
            self._orders[number, epoch] = torch.randperm(len(self._texts[number].train), generator=generator)
        return self._orders[number, epoch]


_PATTERN = 64
_LONGEST = 2**16
"""Samples after which the order of sources begins anew: at least, and at most."""


def _interleaved(shares: Sequence[float]) -> Iterator[int]:
    """Numbers of sources in an order in which each keeps up with its share; also the smallest comes twice."""
    given = [0] * len(shares)
    for place in range(min(_LONGEST, max(_PATTERN, math.ceil(2 / min(shares))))):
        number = max(range(len(shares)), key=lambda each: shares[each] * (place + 1) - given[each])
        given[number] += 1
        yield number
