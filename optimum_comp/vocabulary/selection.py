"""Which tokens stay: pure functions of a vocabulary and its merges, without a tokenizer's library.

A token is an id; what it stands for is its piece: text, or bytes written as text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property


SPACE = "\u2581"
"""What SentencePiece writes for a space."""
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
"""Pieces that stand for single bytes where the vocabulary is of characters."""
IN_TEXT = tuple(value for value in range(256) if value not in (0xC0, 0xC1) and value < 0xF5)
"""Bytes that UTF-8 is made of."""


def _byte_characters() -> tuple[str, ...]:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return tuple(chr(value) if value in plain else chr(next(others)) for value in range(256))


BYTE_CHARACTERS = _byte_characters()
"""The character that stands for each byte where the vocabulary is of bytes (GPT-2's)."""
_VALUES = {character: value for value, character in enumerate(BYTE_CHARACTERS)}


def content(piece: str, *, of_bytes: bool) -> bytes:
    """What a piece stands for.

    Args:
        piece: as the vocabulary has it.
        of_bytes: whether its characters are bytes.
    """
    if of_bytes and all(character in _VALUES for character in piece):
        return bytes(_VALUES[character] for character in piece)
    return piece.replace(SPACE, " ").encode("utf-8", "surrogatepass")


class Characters:
    """Says which bytes can be a part of a text that is made of some characters.

    Args:
        characters: the characters.
    """

    def __init__(self, characters: Collection[str]):
        self._characters = characters
        self._heads: set[bytes] = set()
        self._tails: set[bytes] = set()
        self._middles: set[bytes] = set()
        for character in characters:
            encoded = character.encode("utf-8", "surrogatepass")
            length = len(encoded)
            self._heads.update(encoded[:end] for end in range(1, length))
            self._tails.update(encoded[start:] for start in range(1, length))
            self._middles.update(encoded[start:end] for start in range(1, length) for end in range(start + 1, length))

    def make(self, part: bytes) -> bool:
        """Whether a text can hold this part: whole characters, and at its ends pieces of some."""
        try:
            return all(character in self._characters for character in part.decode("utf-8"))
        except UnicodeDecodeError:
            pass
        start = 0
        while start < len(part) and 0x80 <= part[start] < 0xC0:
            start += 1
        if start == len(part):
            return part in self._tails or part in self._middles
        # The last character's lead byte, at most three bytes before the end.
        end = next(place for place in range(len(part) - 1, start - 1, -1) if not 0x80 <= part[place] < 0xC0)
        try:
            part[end:].decode("utf-8")
            end = len(part)
        except UnicodeDecodeError:
            pass
        if start and part[:start] not in self._tails:
            return False
        if end < len(part) and part[end:] not in self._heads:
            return False
        try:
            return all(character in self._characters for character in part[start:end].decode("utf-8"))
        except UnicodeDecodeError:
            return False


class Merges:
    """The merges of a byte-pair encoding, and what of them a token needs.

    Args:
        pairs: parts of each merge, the one that is made first first.
        known: all pieces.
        falls_back: characters that aren't known become the pieces of their bytes.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], known: Collection[str], *, falls_back: bool = False):
        self.pairs = pairs
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._known, self._falls_back = known, falls_back

    def parts(self, piece: str) -> set[str] | None:
        """The pieces that a token is made of, step by step, itself included; `None` if no text is ever made it.

        Within a token nothing but its own characters is merged, in an order that nothing around it changes: so it
        comes about in every text as it does by itself.
        """
        symbols = list(self._letters(piece))
        found = set(symbols)
        ranks = self._ranks
        while len(symbols) > 1:
            best, place = None, -1
            for index in range(len(symbols) - 1):
                rank = ranks.get((symbols[index], symbols[index + 1]))
                if rank is not None and (best is None or rank < best):
                    best, place = rank, index
            if best is None:
                return None
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            found.add(symbols[place])
        return found if symbols == [piece] and piece in self._known else None

    def _letters(self, piece: str) -> Iterator[str]:
        for character in piece:
            encoded = [BYTES[value] for value in character.encode("utf-8", "surrogatepass")]
            if character not in self._known and self._falls_back and all(each in self._known for each in encoded):
                yield from encoded
            else:
                yield character

    def among(self, kept: Collection[str]) -> list[int]:
        """Places of the merges that stay: both parts do, and what they make."""
        return [
            rank
            for rank, (first, second) in enumerate(self.pairs)
            if first in kept and second in kept and first + second in kept
        ]


class Needs:
    """What each token needs to stay in use.

    Args:
        pieces: id -> piece, of the tokens that the tokenizer's model makes.
        merges: of a byte-pair encoding; `None` where each token stands for itself.
        whole: tokens can come about without merges, too: a word that is one is taken as it is.
    """

    def __init__(self, pieces: Mapping[int, str], merges: Merges | None, *, whole: bool = False):
        self._pieces, self._merges, self._whole = pieces, merges, whole
        self._found: dict[int, tuple[int, ...] | None] = {}

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: token for token, piece in self._pieces.items()}

    def of(self, token: int) -> tuple[int, ...] | None:
        """Ids that have to stay if a token does, itself included; `None` if no text is ever made it."""
        if self._merges is None or token not in self._pieces:
            return (token,)
        if token not in self._found:
            parts = self._merges.parts(self._pieces[token])
            if parts is not None:
                self._found[token] = tuple(self._ids[part] for part in parts)
            else:
                self._found[token] = (token,) if self._whole else None
        return self._found[token]

    def closed(self, tokens: Iterable[int]) -> set[int]:
        """The tokens and all that they need."""
        found: set[int] = set()
        for token in tokens:
            found.update(self.of(token) or (token,))
        return found


def choose(
    always: Iterable[int],
    ranked: Sequence[int],
    needs: Needs,
    *,
    limit: int | None = None,
    multiple: int = 1,
    spare: Sequence[int] = (),
) -> set[int]:
    """The tokens that stay.

    Args:
        always: they stay, and what they need.
        ranked: tokens that are wanted, the most wanted first; those that no text is made are passed over.
        needs: what each needs.
        limit: how many stay at most; all that are wanted if `None`.
        multiple: of which their number is to be one: more stay, of the rest of `ranked` and then of `spare`, or, where
            a limit forbids it, fewer.
        spare: tokens that may stay though they aren't wanted, the best first.

    Raises:
        ValueError: what always stays is more than the limit, or there aren't enough tokens for the multiple.
    """
    kept = needs.closed(always)
    least = len(kept)
    if limit is not None:
        limit = limit // multiple * multiple
        if least > limit:
            raise ValueError(
                f"max_tokens={limit} is not valid: special tokens, bytes and what they need are {least:,} already."
            )
    _fill(kept, ranked, needs, limit)
    if len(kept) % multiple:
        stay = len(kept)
        aim = -(-stay // multiple) * multiple
        rest = [token for token in (*ranked, *spare) if token not in kept]
        while len(kept) < aim and _fill(kept, rest, needs, aim):
            pass
        if len(kept) < aim:
            raise ValueError(
                f"round_to={multiple} is not valid: {stay:,} tokens stay, and there are too few others to make "
                f"their number {aim:,}."
            )
    return kept


def _fill(kept: set[int], ranked: Iterable[int], needs: Needs, limit: int | None) -> bool:
    """Add those that fit; returns whether any was added."""
    before = len(kept)
    for token in ranked:
        if limit is not None and len(kept) >= limit:
            break
        if token in kept:
            continue
        needed = needs.of(token)
        if needed is not None and (limit is None or len(kept) + len(set(needed) - kept) <= limit):
            kept.update(needed)
    return len(kept) > before
