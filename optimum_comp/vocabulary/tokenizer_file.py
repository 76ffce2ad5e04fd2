"""`tokenizer.json`: what it says of tokens, and the same file with fewer of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from optimum_comp.vocabulary.selection import BYTE_CHARACTERS, BYTES, IN_TEXT, SPACE, Merges, Needs, content


_KINDS = "byte-pair encodings of bytes, or with bytes for what they don't know, and Unigram"
# What SentencePiece calls a control symbol, and isn't declared as a special token everywhere.
_MARKER = re.compile(r"<\|?[A-Za-z_][\w/-]*\|?>|\[[A-Z_]+\]")
_UNUSED = re.compile(r"unused|reserved", re.IGNORECASE)


class TokenizerFile:
    """What a `tokenizer.json` holds.

    Args:
        data: the file's content; stays as it is.
        name: the tokenizer's, for errors.

    Raises:
        ValueError: it is of a kind that can't be cut; says of which.
    """

    def __init__(self, data: Mapping[str, Any], name: str):
        self.data, self.name = data, name
        model = data.get("model")
        if not isinstance(model, Mapping) or "vocab" not in model:
            raise self._refused("has no model with a vocabulary")
        self.model = model
        self.kind = str(model.get("type") or _kind_of(model))
        if self.kind not in ("BPE", "Unigram"):
            raise self._refused(f"is a {self.kind}")
        self.falls_back = bool(model.get("byte_fallback"))
        self.of_bytes = any(_holds(data.get(part), "ByteLevel") for part in ("pre_tokenizer", "normalizer"))
        if self.kind == "BPE":
            self._require_bytes()
        elif self.of_bytes:
            raise self._refused("is a Unigram of bytes")
        # Where a byte is missing, characters are lost as if there were none.
        self.falls_back = self.falls_back and all(BYTES[value] in self.ids for value in IN_TEXT)
        if self.kind == "Unigram" and not self.falls_back:
            self._require_characters()

    def _require_bytes(self) -> None:
        for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if self.model.get(field):
                raise self._refused(f"is a BPE with {field}={self.model[field]!r}")
        if self.of_bytes:
            # A byte that has no token is lost with all tokens as well, since merges begin with those of single bytes.
            return
        if not self.falls_back:
            raise self._refused("is a BPE of characters, which has nothing for those that it doesn't know")
        missing = [f"0x{value:02X}" for value in IN_TEXT if BYTES[value] not in self.ids]
        if missing:
            raise self._refused(f"is a BPE without tokens for the bytes {', '.join(missing[:3])}")

    def _require_characters(self) -> None:
        for token, piece in self.pieces.items():
            if token in self.declared or token == self.model.get("unk_id"):
                continue
            missing = next((character for character in piece if character not in self.ids), None)
            if missing is not None:
                raise self._refused(f"is a Unigram without bytes in which {missing!r} alone is no token")

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"the tokenizer of {self.name} {why}; what can be cut are {_KINDS}.")

    @cached_property
    def ids(self) -> dict[str, int]:
        """Piece -> id, of the tokens that the model makes."""
        vocabulary = self.model["vocab"]
        if self.kind == "Unigram":
            return {piece: token for token, (piece, _) in enumerate(vocabulary)}
        return {str(piece): int(token) for piece, token in vocabulary.items()}

    @cached_property
    def pieces(self) -> dict[int, str]:
        """Id -> piece, of the tokens that the model makes."""
        if self.kind == "Unigram":
            return {token: piece for token, (piece, _) in enumerate(self.model["vocab"])}
        return {token: piece for piece, token in self.ids.items()}

    @cached_property
    def declared(self) -> dict[int, str]:
        """Id -> text, of the tokens that are looked for in a text before the model sees it."""
        return {int(each["id"]): str(each["content"]) for each in self.data.get("added_tokens") or []}

    @property
    def tokens(self) -> dict[str, int]:
        """Every token -> its id, as the file has it."""
        return {**self.ids, **{text: token for token, text in self.declared.items()}}

    @cached_property
    def merges(self) -> Merges | None:
        """A byte-pair encoding's."""
        if self.kind != "BPE":
            return None
        return Merges([_pair(each) for each in self.model["merges"]], self.ids, falls_back=self.falls_back)

    @cached_property
    def needs(self) -> Needs:
        """What each token needs to stay in use."""
        return Needs(self.pieces, self.merges, whole=bool(self.model.get("ignore_merges")))

    def text(self, token: int) -> bytes:
        """What a token stands for."""
        return content(self.pieces.get(token, self.declared.get(token, "")), of_bytes=self.of_bytes)

    @cached_property
    def bytes_(self) -> set[int]:
        """Tokens that stand for single bytes."""
        return {self.ids[piece] for piece in (BYTE_CHARACTERS if self.of_bytes else BYTES) if piece in self.ids}

    @cached_property
    def always(self) -> set[int]:
        """Tokens that have to stay: special and declared ones, bytes, and what the file's other parts speak of."""
        found = {*self.declared, *self.bytes_, *_ids_of_parts(self.data)}
        if not self.of_bytes:
            # A character of ASCII alone costs next to nothing, and without it there would be a byte.
            found |= {self.ids[each] for each in (SPACE, *map(chr, range(128))) if each in self.ids}
        if self.model.get("ignore_merges"):
            # A word that is a token, but has a character that is none, comes about in no other way.
            found |= {token for piece, token in self.ids.items() if any(each not in self.ids for each in piece)}
        if self.model.get("unk_token") in self.ids:
            found.add(self.ids[self.model["unk_token"]])
        if self.kind == "Unigram":
            found |= self._always_of_unigram()
        else:
            found |= {
                token
                for piece, token in self.ids.items()
                if _MARKER.fullmatch(piece) and not _UNUSED.search(piece) and self.needs.of(token) is None
            }
        return found

    def _always_of_unigram(self) -> set[int]:
        vocabulary = self.model["vocab"]
        # The price of what isn't known follows from the lowest score.
        found = {min(range(len(vocabulary)), key=lambda token: vocabulary[token][1])}
        if self.model.get("unk_id") is not None:
            found.add(int(self.model["unk_id"]))
        if not self.falls_back:
            # Without bytes, a text that was known would be known no longer.
            found |= {token for token, (piece, _) in enumerate(vocabulary) if len(piece) == 1}
        return found

    def cut(self, kept: Sequence[int]) -> dict[str, Any]:
        """The file's content with some tokens only.

        Args:
            kept: their ids, ascending; each gets its place among them for a new one.
        """
        new = {token: place for place, token in enumerate(kept)}
        model = dict(self.model)
        if self.kind == "Unigram":
            model["vocab"] = [each for token, each in enumerate(model["vocab"]) if token in new]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
        else:
            assert self.merges is not None
            # In the order of the new ids, as such files have it.
            model["vocab"] = {self.pieces[token]: new[token] for token in kept if token in self.pieces}
            model["merges"] = [model["merges"][place] for place in self.merges.among(model["vocab"])]
        declared = [{**each, "id": new[each["id"]]} for each in self.data.get("added_tokens") or []]
        found = {**self.data, "added_tokens": declared, "model": model}
        if found.get("padding"):
            found["padding"] = {**found["padding"], "pad_id": new[found["padding"]["pad_id"]]}
        if found.get("post_processor"):
            found["post_processor"] = _processor(found["post_processor"], lambda token: new[token])
        return found


def _kind_of(model: Mapping[str, Any]) -> str:
    """The kind of a model whose file doesn't say it, as old ones don't."""
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece or WordLevel"


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return str(first), str(second)


def _holds(part: Any, kind: str) -> bool:
    """Whether a normalizer or pre-tokenizer is of a kind, or a sequence with one that is."""
    if isinstance(part, list):
        return any(_holds(each, kind) for each in part)
    if not isinstance(part, Mapping):
        return False
    return part.get("type") == kind or any(_holds(each, kind) for each in part.values())


def _processor(part: Any, new: Callable[[int], int]) -> Any:
    """A post-processor with new ids: `{"id": "<s>", "ids": [1], ...}` of templates, `["</s>", 2]` of BERT's kind."""
    if isinstance(part, list):
        return [_processor(each, new) for each in part]
    if not isinstance(part, Mapping):
        return part
    found = {}
    for name, value in part.items():
        if name == "ids":
            found[name] = [new(int(token)) for token in value]
        elif name in ("sep", "cls") and isinstance(value, list):
            found[name] = [value[0], new(int(value[1]))]
        else:
            found[name] = _processor(value, new)
    return found


def _ids_of_parts(data: Mapping[str, Any]) -> set[int]:
    """Ids that post-processor and padding put around a text."""
    found: set[int] = set()

    def seen(token: int) -> int:
        found.add(token)
        return token

    _processor(data.get("post_processor"), seen)
    if data.get("padding"):
        found.add(int(data["padding"]["pad_id"]))
    return found
