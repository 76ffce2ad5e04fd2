"""JSON that somebody else may have written: what isn't plain JSON of a sensible size is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


_MOST_BYTES = 2**26
_MOST = 2**63
_DEEPEST = 32


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: it is too large, not UTF-8, not JSON (NaN and infinity aren't), nested too deeply, no object, or
            holds a number that doesn't fit into 64 bits.
        OSError: it can't be read.
    """
    with path.open("rb") as stream:
        return parse_object(stream.read(_MOST_BYTES + 1))


def parse_object(data: bytes) -> dict[str, Any]:
    """The same for what was read already.

    Raises:
        ValueError: see `read_object`.
    """
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES // 2**20} MiB")
    try:
        found = json.loads(data.decode("utf-8"), parse_int=_integer, parse_float=_real, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__} where an object is wanted")
    _require_shallow(found)
    return found


def plain_object(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object as it will be read from its file.

    Args:
        given: its entries.
        name: what it is called, for errors.

    Raises:
        ValueError: it can't be written, or not read again.
    """
    try:
        return parse_object(json.dumps(dict(given)).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name}={given!r} is not valid: it must be a dictionary that JSON can hold ({error})."
        ) from error


def _require_shallow(found: Any) -> None:
    # Less than Python's limit for reading: writing it again has another one.
    level = [found]
    for _ in range(_DEEPEST):
        inside = (child for each in level for child in (each.values() if isinstance(each, dict) else each))
        level = [child for child in inside if isinstance(child, (dict, list))]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _integer(text: str) -> int:
    # Python itself refuses, with a ValueError, those of thousands of digits.
    value = int(text)
    return value if -_MOST <= value < _MOST else _refuse(text)


def _real(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"the number {text[:20]} is out of range")
