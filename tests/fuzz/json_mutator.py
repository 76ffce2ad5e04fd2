"""Changes JSON to other JSON, mostly, so that what comes behind the parser is reached."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any


_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", ".", "..", "../victim", "..\\victim", "/etc/passwd", "C:victim", "a/b", "a\0b", "\ud800", "x" * 300),
    *([], {}, [[]], [{}], [1, 2], ["a", "b"], {"a": 1}),
]
_BYTES = 0.1
"""Share of inputs that are changed as bytes instead."""


def mutate_json(data: bytes, most: int, seed: int, mutate_bytes: Callable[[bytes, int], bytes]) -> bytes:
    """One to four changes of a JSON text.

    Args:
        data: the text; what isn't JSON is changed as bytes.
        most: bytes that the result may have.
        seed: chooses the changes.
        mutate_bytes: changes bytes.
    """
    chance = random.Random(seed)
    try:
        value = json.loads(data)
        if chance.random() < _BYTES:
            raise ValueError
        for _ in range(chance.randint(1, 4)):
            value = _changed(value, chance)
        changed = json.dumps(value).encode()
    except (ValueError, RecursionError):
        return mutate_bytes(data, most)
    return changed if len(changed) <= most else mutate_bytes(data, most)


def _changed(value: Any, chance: random.Random) -> Any:
    nodes = list(_nodes(value, ()))
    path = chance.choice(nodes)
    if not path:
        return _other(value, chance)
    place = value
    for key in path[:-1]:
        place = place[key]
    key = path[-1]
    kind = chance.randrange(5)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[chance.choice([*place, "x"])] = place.pop(key)
    elif kind == 1:
        place.append(place[key])
    elif kind == 2:
        place[key] = json.loads(json.dumps(_at(value, chance.choice(nodes))))
    else:
        place[key] = _other(place[key], chance)
    return value


def _other(value: Any, chance: random.Random) -> Any:
    if isinstance(value, str) and value and chance.random() < 0.5:
        cut = chance.randrange(len(value) + 1)
        return value[:cut] + chance.choice(["", "/", "\\", ".", "..", "\0", " ", ":", "é"]) + value[cut:]
    if type(value) in (int, float) and chance.random() < 0.5:
        return value * chance.choice([-1, 2, 10]) + chance.choice([-1, 0, 1])
    return json.loads(json.dumps(chance.choice(_VALUES)))


def _nodes(value: Any, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(node for key, each in inside for node in _nodes(each, (*path, key)))]


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value
