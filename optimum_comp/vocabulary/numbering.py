"""Ids of tokens in settings that are JSON: which are there, and the same with new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


_ENDINGS = ("_token_id", "_token_ids", "_token_index")
_DECODED = "added_tokens_decoder"
_FORCED = "forced_decoder_ids"
"""Pairs of a place and the token there."""
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_SEQUENCES = ("bad_words_ids", "force_words_ids", "sequence_bias")
"""Sequences of tokens, or lists of such."""
_DROPPED = object()

Renumber = Callable[[int], "int | None"]
"""A token's new id; `None` if it goes."""


def ids_needed(settings: Any) -> set[int]:
    """Ids that settings can't do without: of the tokens that a text begins, ends or is padded with, and the like."""
    return set(_needed(settings))


def _needed(settings: Any) -> Iterator[int]:
    if isinstance(settings, list):
        for each in settings:
            yield from _needed(each)
    if not isinstance(settings, Mapping):
        return
    for name, value in settings.items():
        if str(name).endswith(_ENDINGS):
            yield from _flat(value)
        elif name == _FORCED:
            yield from (pair[1] for pair in value or () if _is_id(pair[1]))
        else:
            yield from _needed(value)


def _flat(value: Any) -> Iterator[int]:
    for each in value if isinstance(value, list) else [value]:
        if _is_id(each):
            yield each


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def renumbered(settings: Any, new: Renumber) -> Any:
    """Settings with new ids.

    Where a list forbids or favours tokens, those that go are left out.

    Args:
        settings: what a JSON file holds; stays as it is.
        new: gives the new ids.
    """
    if isinstance(settings, list):
        return [renumbered(each, new) for each in settings]
    if not isinstance(settings, Mapping):
        return settings
    found = {}
    for name, value in settings.items():
        if str(name).endswith(_ENDINGS) or name in _LISTS:
            found[name] = _with_new(value, new)
        elif name == _DECODED and isinstance(value, Mapping):
            pairs = ((_new(int(token), new), each) for token, each in value.items())
            found[name] = {str(token): each for token, each in pairs if token is not _DROPPED}
        elif name == _FORCED and value:
            found[name] = [[place, _with_new(token, new)] for place, token in value]
        elif name in _SEQUENCES:
            found[name] = _sequences(value, new)
        else:
            found[name] = renumbered(value, new)
    return found


def _new(token: Any, new: Renumber) -> Any:
    if not _is_id(token):
        return token
    found = new(token)
    return _DROPPED if found is None else found


def _with_new(value: Any, new: Renumber) -> Any:
    if isinstance(value, list):
        return [found for each in value if (found := _new(each, new)) is not _DROPPED]
    found = _new(value, new)
    return None if found is _DROPPED else found


def _sequences(value: Any, new: Renumber) -> Any:
    """Lists of ids, one in another; a sequence of which a token goes can't come about and is left out."""
    if not isinstance(value, list):
        return value
    if value and all(_is_id(each) for each in value):
        found = [_new(each, new) for each in value]
        return _DROPPED if _DROPPED in found else found
    made = [_sequences(each, new) for each in value]
    # Of a sequence and its bias, the bias goes too.
    if len(value) == 2 and isinstance(value[1], float):
        return _DROPPED if made[0] is _DROPPED else made
    made = [each for each in made if each is not _DROPPED]
    return made if made or not value else _DROPPED
