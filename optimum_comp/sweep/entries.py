"""What the files of an unfinished run may hold: they may come from anybody, and nothing else in them is believed.

They say what to do, never what is allowed: they grant no permission, and name no path but that of the model, which is
read.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from optimum_comp.configuration import AXES, FIELDS, CompConfig
from optimum_comp.files import JOURNAL, LOCK


WORK = "comp_work"
"""Subfolder with the pruned layers, the hidden states and the calibration tokens of an unfinished run."""

OURS = (JOURNAL, WORK, LOCK)
"""What of an unfinished run is in the output folder itself."""

LAYERS, FINISHING = "layers", "finishing"

PERMISSIONS = {"trust_remote_code": "--trust-remote-code"}
"""What a run may have been allowed, by the argument's name -> the option. It is kept only to be asked for again."""

Check = Callable[[Any], bool]


def require(data: Mapping[str, Any], checks: Mapping[str, Check], optional: Collection[str] = ()) -> None:
    """Refuse an object that isn't made as it should be.

    Args:
        data: the object.
        checks: for every key, what its value has to be.
        optional: keys that may be missing.

    Raises:
        ValueError: names a key that is unknown, missing or has a bad value.
    """
    unknown = set(data) - set(checks)
    if unknown:
        raise ValueError(f"{reprlib.repr(min(unknown))} is no entry of it")
    for name, check in checks.items():
        if name not in data:
            if name not in optional:
                raise ValueError(f"{name} is missing")
        elif not check(data[name]):
            raise ValueError(f"{name} can't be {reprlib.repr(data[name])}")


def is_plain_name(name: Any) -> bool:
    """Whether this is the name of a file or folder in the output folder, on any system, that isn't ours."""
    if not isinstance(name, str) or set(name) & set("/\\:\0"):
        return False
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    # Windows ignores dots and spaces at the end; it and macOS don't tell capitals from small letters.
    bare = name.rstrip(". ").casefold()
    return bool(bare) and size <= 255 and bare not in OURS


def _integer(low: int) -> Check:
    # True is an int too.
    return lambda value: type(value) is int and low <= value < 2**31


def _is_real(value: Any) -> bool:
    return type(value) in (int, float)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _one_of(*choices: str) -> Check:
    return lambda value: isinstance(value, str) and value in choices


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _object(checks: Mapping[str, Check], optional: Collection[str] = ()) -> Check:
    def check(value: Any) -> bool:
        try:
            require(value, checks, optional)
        except ValueError:
            return False
        return True

    return lambda value: isinstance(value, dict) and check(value)


def _is_config(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != set(FIELDS):
        return False
    try:
        CompConfig(**value)
    except ValueError:
        return False
    return True


ARGUMENTS: dict[str, Check] = {"revision": _is_text, "dtype": _is_dtype, "subfolder": _is_text}
"""Arguments of `from_pretrained` that a run is gone on with if none are given: those that do no harm."""

_CALIBRATION: dict[str, Check] = {
    "source": _is_text,
    "num_samples": _integer(1),
    "sequence_length": _integer(1),
    "tokens": _integer(1),
    "sha256": _is_text,
    "begins_with": _list_of(_integer(0)),
    "start": _is_text,
    "loss_with_start": _or_none(_is_real),
    "loss_without_start": _or_none(_is_real),
}
_OF_A_BEGINNING = ("begins_with", "start", "loss_with_start", "loss_without_start")

_RUN: dict[str, Check] = {
    "source": lambda value: _is_text(value) and value != "",
    "arguments": _object(ARGUMENTS, optional=ARGUMENTS),
    "permissions": _list_of(_one_of(*PERMISSIONS)),
    "config": _is_config,
    "weights": _is_text,
    "calibration": _object(_CALIBRATION, optional=_OF_A_BEGINNING),
    "batch_size": _integer(1),
    "matmul_dtype": _is_dtype,
    "processes": _integer(1),
    "device": _one_of("cpu", "cuda"),
    "dtype": _is_text,
    "versions": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "record": _or_none(_is_object),
}

_STATE: dict[str, Check] = {
    "format": _integer(1),
    "stage": _one_of(LAYERS, FINISHING),
    "finished": _integer(0),
    "run": lambda value: value == {} or _is_object(value),
    "removed": _list_of(_integer(0)),
    "layer_scores": _list_of(_is_real),
    "widths": _list_of(_integer(1)),
    "costs": _or_none(_list_of(_is_real)),
    "chosen": _integer(0),
    "weighed": _list_of(_or_none(_is_real)),
    "tried": _list_of(_or_none(_is_real)),
    "files": _list_of(is_plain_name),
    "stale": _list_of(is_plain_name),
}
_OF_SETTLING = ("widths", "costs", "chosen", "weighed", "tried")
_OF_REMOVAL, _OF_FINISHING = ("removed", "layer_scores", *_OF_SETTLING), ("files", "stale")

_DECISION: dict[str, Check] = {
    "axis": _one_of(*AXES),
    "kept": _list_of(_integer(0)),
    "scores": _list_of(_is_real),
    "relative_error": _is_real,
    "unrepaired_error": _or_none(_is_real),
}
_REPORT: dict[str, Check] = {
    "index": _integer(0),
    "decisions": _list_of(_object(_DECISION)),
    "bridged": _is_flag,
}


def require_state(state: Mapping[str, Any]) -> None:
    """Refuse a journal that no run can have written.

    Raises:
        ValueError: names an entry that is unknown, missing or has a bad value.
    """
    finishing = state.get("stage") == FINISHING
    require(state, _STATE, optional=_OF_REMOVAL if finishing else (*_OF_REMOVAL, *_OF_FINISHING))
    settled = [name for name in (*_OF_SETTLING, "removed", "layer_scores") if name in state]
    if set(settled) & set(_OF_SETTLING) and len(settled) < len(_OF_REMOVAL):
        raise ValueError(f"{next(name for name in _OF_REMOVAL if name not in state)} is missing")
    if state["run"] or state["finished"] or finishing:
        require(state["run"], _RUN)
    if finishing and not state["files"]:
        raise ValueError("files can't be []")


def require_report(report: Mapping[str, Any]) -> None:
    """Refuse a layer's report that no run can have written.

    Raises:
        ValueError: names an entry that is unknown, missing or has a bad value.
    """
    require(report, _REPORT)
