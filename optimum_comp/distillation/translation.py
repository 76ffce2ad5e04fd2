"""What a teacher's tokens are to a student whose vocabulary lacks some of them.

Where the teacher reads a word as one token, the student reads it in pieces. Both see the same text, so that the
student's prediction at the end of each of the teacher's tokens can be compared with the teacher's: a piece is as
likely as all the tokens together that begin with it. Within a token the teacher says nothing, and what comes next is
what the text says. Which of its tokens the text has is drawn from the text, so that both together are, on average
over texts, what the teacher and the text expect of the next piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """Samples as a student reads them.

    Attributes:
        tokens: its ids, `[samples, longest]`; behind a sample's end zeros, which nothing before them sees.
        row: of each piece, its sample, `[n]`.
        column: and its place in it, `[n]`.
        owner: the teacher's token that it is of, `[n]`, as a place among all of the samples' tokens.
        following: the piece that comes next, `[n]`; -1 where none is known.
        inside: a piece of the same token comes next, `[n]`.
    """

    tokens: Tensor
    row: Tensor
    column: Tensor
    owner: Tensor
    following: Tensor
    inside: Tensor


class Translation:
    """Says of each of a teacher's tokens which of a student's it is, or is made of.

    Args:
        pieces: the student's ids of each of the teacher's tokens, in the order of its ids: one for a token that the
            student has; none for a row of its embedding that no token has.
        back: the teacher's id of each of the student's tokens, in the order of its ids.
    """

    def __init__(self, pieces: Sequence[Sequence[int]], back: Sequence[int]):
        self._lengths = torch.tensor([len(each) for each in pieces])
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._flat = torch.tensor([piece for each in pieces for piece in each])
        self.back = torch.tensor(back)
        self._is_broken = self._lengths > 0
        self._is_broken[self.back] = False

    @classmethod
    def between(cls, teacher: Any, student: Any, rows: int, tokens: int) -> Translation:
        """What two tokenizers say.

        Args:
            teacher: its tokenizer.
            student: its tokenizer, which has to be a part of it (see `shrink_vocabulary`).
            rows: of the teacher's embedding.
            tokens: rows of the student's.

        Raises:
            ValueError: the student's vocabulary isn't a part of the teacher's.
        """
        theirs, ours = (
            {text: token for text, token in each.get_vocab().items() if token < limit}
            for each, limit in ((teacher, rows), (student, tokens))
        )
        backend = getattr(student, "backend_tokenizer", None)
        if backend is None or not ours.keys() <= theirs.keys() or sorted(ours.values()) != list(range(tokens)):
            raise ValueError(unlike(tokens, rows))
        pieces: list[list[int]] = [[] for _ in range(rows)]
        for text, token in theirs.items():
            # By the model alone: within a token nothing else splits.
            pieces[token] = [ours[text]] if text in ours else [each.id for each in backend.model.tokenize(text)]
        return cls(pieces, [theirs[text] for text in sorted(ours, key=ours.__getitem__)])

    def pieces_of(self, ids: Tensor, most: int | None = None) -> Pieces:
        """Samples in the student's tokens.

        Args:
            ids: the teacher's, `[samples, length]`.
            most: pieces of a sample that the student can read; all if `None`.
        """
        device, (samples, length) = ids.device, ids.shape
        flat, lengths = ids.flatten().cpu(), self._lengths[ids.cpu()]
        counts = lengths.flatten()
        owner = torch.repeat_interleave(torch.arange(len(flat)), counts)
        within = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
        totals = lengths.sum(1)
        row = owner // length
        column = torch.arange(len(owner)) - (totals.cumsum(0) - totals)[row]
        pieces = self._flat[self._starts[flat[owner]] + within]
        following = torch.full_like(pieces, -1)
        is_last = column == totals[row] - 1
        following[:-1] = torch.where(is_last[:-1], -1, pieces[1:])
        inside = within < counts[owner] - 1
        if most is not None:
            there = column < most
            owner, row, column, pieces = owner[there], row[there], column[there], pieces[there]
            following, inside = following[there], inside[there]
        tokens = torch.zeros(samples, int(column.max()) + 1, dtype=ids.dtype)
        tokens[row, column] = pieces
        found = (tokens, row, column, owner, following, inside)
        return Pieces(*(each.to(device) for each in found))

    def blocks_of(self, ids: Tensor) -> Tensor:
        """The beginnings of samples, of one length and full, `[samples, length]`."""
        return self.pieces_of(ids, ids.shape[1]).tokens

    def broken(self) -> Tensor:
        """The teacher's tokens that the student lacks, ascending, `[m]`."""
        return self._is_broken.nonzero().flatten()

    def likeliest(self, chances: Tensor, texts: Sequence[Tensor], most: int) -> Tensor:
        """Those of them that come up: `most` by a measure, and all that are in some texts, ascending, `[m]`.

        Args:
            chances: how likely each of the teacher's tokens is, `[tokens]`.
            texts: the teacher's ids.
            most: how many.
        """
        broken = self.broken()
        is_there = torch.zeros_like(self._is_broken)
        is_there[broken[chances[broken].topk(min(most, len(broken))).indices]] = True
        for text in texts:
            is_there[text.flatten()] = True
        return (is_there & self._is_broken).nonzero().flatten()

    def first(self, tokens: Tensor) -> Tensor:
        """The first piece of each of the teacher's tokens, in the shape that is given."""
        return self._flat[self._starts[tokens]]


def put_into(
    ids: Tensor, words: Tensor, likely: Tensor, count: int, generator: torch.Generator, least: float = 0.0
) -> Tensor:
    """Samples with some tokens replaced by words that could stand there as well.

    Places are drawn without repetition, each by how likely one of the words is there, and then a word for each.

    Args:
        ids: `[samples, length]`.
        words: ids of the words, `[words]`.
        likely: log-probability of each word in the place of each token but the first, `[samples, length - 1, words]`.
        count: places of a sample, at most.
        generator: of what is drawn, on the processor.
        least: how likely all words together have to be in a place; elsewhere the token stays.
    """
    together = likely.logsumexp(-1)
    # The largest of log-weights with Gumbel noise are drawn by these weights (arXiv 1903.06059).
    noise = -torch.empty_like(together).exponential_(generator=generator).log_()
    places = (together + noise).topk(min(count, together.shape[1]), -1).indices
    rows = torch.arange(len(ids))[:, None].expand_as(places)
    chances = torch.softmax(likely[rows, places], -1).flatten(0, 1)
    drawn = words[torch.multinomial(chances, 1, generator=generator).view_as(places)]
    fits = (together[rows, places].exp() >= least).to(ids.device)
    found = ids.clone()
    found[rows, places + 1] = torch.where(fits, drawn.to(ids.device), ids[rows, places + 1])
    return found


def unlike(tokens: int, rows: int) -> str:
    """Why two vocabularies can't be compared.

    Args:
        tokens: of the student.
        rows: tokens of the teacher.
    """
    return (
        f"the student knows {tokens:,} tokens and the teacher {rows:,}; distillation compares predictions, so both "
        "have to have one vocabulary, or the student a part of the teacher's (see comp vocabulary)."
    )
