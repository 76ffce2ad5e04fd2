"""What a setting may be, what it means and what it is by default: said once, for code, documentation and command line.

A group of settings is a class under `settings_class` whose fields are made by `option`, or, where another library
prescribes the class, a table of `Option` beside it. Errors name the field, its value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any, Protocol, TypeVar

from typing_extensions import dataclass_transform


T = TypeVar("T")

AUTO = "auto"
"""In place of a value that is to be found out."""

_WIDTH = 119
_SHOWN = 80
_SIZE = r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([kmgt]?i?)b?\s*"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

_DURATION = r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*(s|sec|min|m|h|)\s*"
_SECONDS = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


class Kind(Protocol):
    """What values a setting takes."""

    @property
    def type(self) -> str:
        """For documentation."""
        ...

    def check(self, field: str, value: Any) -> Any:
        """The value in its own type.

        Raises:
            ValueError: it isn't allowed; names field and value, and says what is.
        """
        ...

    def parse(self, text: str) -> Any:
        """A value from the command line; nonsense is left to `check`."""
        ...


def shown(value: Any) -> str:
    """A value as an error names it: not too long."""
    try:
        text = repr(value)
    except ValueError:
        # Python writes no integer of more than some thousand digits.
        text = f"a {type(value).__name__} that is too long to be written"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def refuse(field: str, value: Any, allowed: str) -> ValueError:
    """The error that says what a field may be."""
    return ValueError(f"{field}={shown(value)} is not valid: {field} must be {allowed}.")


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number in an interval like `(0, 1]`; `inf` is no end."""

    interval: str

    @property
    def type(self) -> str:
        """See `Kind`."""
        return f"float in {self.interval}"

    def check(self, field: str, value: Any) -> float:
        """See `Kind`."""
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        allowed = f"a number in {self.interval}" if math.isfinite(high) else f"a number above {low:g}"
        if isinstance(value, bool) or not isinstance(value, Real):
            raise refuse(field, value, allowed)
        try:
            number = float(value)
        except OverflowError:
            raise refuse(field, value, allowed) from None
        too_low = number <= low if self.interval[0] == "(" else number < low
        too_high = number >= high if self.interval[-1] == ")" else number > high
        if math.isnan(number) or too_low or too_high:
            raise refuse(field, value, allowed)
        return number

    def parse(self, text: str) -> Any:
        """See `Kind`."""
        return _number(float, text)


@dataclasses.dataclass(frozen=True)
class NumberOrAuto(Number):
    """A number, or `auto`."""

    @property
    def type(self) -> str:
        """See `Kind`."""
        return f"{super().type}, or auto"

    def check(self, field: str, value: Any) -> Any:
        """See `Kind`."""
        if isinstance(value, str) and value == AUTO:
            return AUTO
        try:
            return super().check(field, value)
        except ValueError:
            raise refuse(field, value, f"a number in {self.interval}, or {AUTO}") from None


@dataclasses.dataclass(frozen=True)
class Share(Number):
    """A number, or a percentage as text."""

    @property
    def type(self) -> str:
        """See `Kind`."""
        return "float or str"

    def check(self, field: str, value: Any) -> float:
        """See `Kind`."""
        try:
            return super().check(field, self.parse(value) if isinstance(value, str) else value)
        except ValueError:
            raise refuse(field, value, "a share above 0, like 2%") from None

    def parse(self, text: str) -> Any:
        """See `Kind`."""
        percent = text.endswith("%")
        value = _number(float, text[:-1] if percent else text)
        return value / 100 if percent and isinstance(value, float) else value


@dataclasses.dataclass(frozen=True)
class Shares:
    """A list of different shares in an interval."""

    interval: str
    type = "list[float]"

    def check(self, field: str, value: Any) -> list[float]:
        """See `Kind`."""
        if not isinstance(value, (list, tuple)):
            raise refuse(field, value, f"a list of numbers in {self.interval}")
        found = [Number(self.interval).check(field, each) for each in value]
        if len(set(found)) != len(found):
            raise refuse(field, value, "a list of different numbers")
        return found

    def parse(self, text: str) -> Any:
        """See `Kind`."""
        return [Share(self.interval).parse(part) for part in _parts(text)]


@dataclasses.dataclass(frozen=True)
class Integer:
    """An integer that isn't less than something."""

    low: int

    @property
    def type(self) -> str:
        """See `Kind`."""
        return f"int >= {self.low}"

    def check(self, field: str, value: Any) -> int:
        """See `Kind`."""
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < self.low:
            raise refuse(field, value, f"an integer >= {self.low}")
        if int(value) >= 2**63:
            raise refuse(field, value, f"an integer >= {self.low} and below 2**63")
        return int(value)

    def parse(self, text: str) -> Any:
        """See `Kind`."""
        return _number(int, text)


@dataclasses.dataclass(frozen=True)
class Boolean:
    """True or false."""

    type = "bool"

    def check(self, field: str, value: Any) -> bool:
        """See `Kind`."""
        if not isinstance(value, bool):
            raise refuse(field, value, "true or false")
        return value

    def parse(self, text: str) -> Any:
        """See `Kind`; on the command line it is a flag."""
        return text


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several words."""

    choices: tuple[str, ...]
    type = "str"

    def check(self, field: str, value: Any) -> str:
        """See `Kind`."""
        if not isinstance(value, str) or value not in self.choices:
            raise refuse(field, value, f"one of {', '.join(self.choices)}")
        return value

    def parse(self, text: str) -> Any:
        """See `Kind`."""
        return text


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some of several words, each once; comes back in their order."""

    choices: tuple[str, ...]
    type = "list[str]"

    def check(self, field: str, value: Any) -> list[str]:
        """See `Kind`."""
        allowed = f"a list of some of {', '.join(self.choices)}, each once"
        if not isinstance(value, (list, tuple)) or not value or len(set(map(str, value))) != len(value):
            raise refuse(field, value, allowed)
        if not all(word in self.choices for word in value):
            raise refuse(field, value, allowed)
        return [word for word in self.choices if word in value]

    def parse(self, text: str) -> Any:
        """See `Kind`."""
        return _parts(text)


@dataclasses.dataclass(frozen=True)
class Integers:
    """A list of integers."""

    allowed: str
    type = "list[int]"

    def check(self, field: str, value: Any) -> list[int]:
        """See `Kind`."""
        if not isinstance(value, (list, tuple)):
            raise refuse(field, value, self.allowed)
        if not all(isinstance(each, Integral) and not isinstance(each, bool) for each in value):
            raise refuse(field, value, self.allowed)
        return [int(each) for each in value]

    def parse(self, text: str) -> Any:
        """See `Kind`."""
        return [_number(int, part) for part in _parts(text)]


@dataclasses.dataclass(frozen=True)
class Text:
    """Words that aren't empty, or a path."""

    allowed: str = "text"
    type = "str"

    def check(self, field: str, value: Any) -> str:
        """See `Kind`."""
        if not isinstance(value, (str, PathLike)) or not str(value).strip():
            raise refuse(field, value, self.allowed)
        return str(value)

    def parse(self, text: str) -> Any:
        """See `Kind`."""
        return text


@dataclasses.dataclass(frozen=True)
class Texts:
    """A list of texts; on the command line, the option is given several times."""

    allowed: str = "a list of str"
    type = "list[str]"

    def check(self, field: str, value: Any) -> list[str]:
        """See `Kind`."""
        if (
            isinstance(value, str)
            or not isinstance(value, Sequence)
            or not all(isinstance(each, str) for each in value)
        ):
            raise refuse(field, value, self.allowed)
        return list(value)

    def parse(self, text: str) -> Any:
        """See `Kind`; of one of them."""
        return text


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes as a number or as text: `4GB`, `1.5GiB`, `800 MB`; comes back as bytes."""

    type = "int or str"

    def check(self, field: str, value: Any) -> int:
        """See `Kind`."""
        is_known = isinstance(value, (str, Integral)) and not isinstance(value, bool)
        text = value if isinstance(value, str) else shown(value)
        found = re.fullmatch(_SIZE, text.lower()) if is_known else None
        if not found or found[2] not in _UNITS or int(float(found[1]) * _UNITS[found[2]]) < 1:
            raise ValueError(f"{field}={shown(value)} is not valid: give a size like 4GB or 1.5GiB.")
        return int(float(found[1]) * _UNITS[found[2]])

    def parse(self, text: str) -> Any:
        """See `Kind`."""
        return text


@dataclasses.dataclass(frozen=True)
class Duration:
    """Seconds as a number or as text: `90s`, `30min`, `1.5h`; comes back as seconds."""

    type = "float or str"

    def check(self, field: str, value: Any) -> float:
        """See `Kind`."""
        seconds = 0.0
        if isinstance(value, (int, float)) and not isinstance(value, bool) and -(2**63) < value < 2**63:
            seconds = float(value)
        elif isinstance(value, str) and (found := re.fullmatch(_DURATION, value.lower())):
            seconds = float(found[1]) * _SECONDS[found[2]]
        if not seconds > 0:
            raise ValueError(f"{field}={shown(value)} is not valid: give a time like 30min, 90s or 1.5h.")
        return seconds

    def parse(self, text: str) -> Any:
        """See `Kind`."""
        return text


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        kind: what it may be.
        help: what it means, in sentences.
        optional: it may be `None`, too.
        metavar: what stands for the value on the command line.
        default_text: what the command line says of the default, where that isn't the value itself.
        flag: how it is spelled on the command line, where that isn't its name.
    """

    kind: Kind
    help: str
    optional: bool = False
    metavar: str | None = None
    default_text: str | None = None
    flag: str | None = None

    def check(self, field: str, value: Any) -> Any:
        """The value in its own type.

        Raises:
            ValueError: it isn't allowed; names field and value, and says what is.
        """
        return None if value is None and self.optional else self.kind.check(field, value)

    def described(self, default: Any) -> str:
        """The help with what holds if nothing is given."""
        shown = self.default_text or _shown(default)
        return f"{self.help.rstrip('.')} [{shown}]." if shown else self.help


def option(kind: Kind, help: str, *, default: Any, **more: Any) -> Any:
    """A field of a class under `settings_class`; `more` as for `Option`."""
    made = Option(kind, help, **{"optional": default is None, **more})
    if isinstance(default, (list, tuple)):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"option": made})
    return dataclasses.field(default=default, metadata={"option": made})


def column_option() -> Any:
    """A field for the column of a dataset that holds text."""
    return option(
        Text("the name of a column"), "Column of a dataset that holds text.", default=None, default_text="text"
    )


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def settings_class(cls: type[T]) -> type[T]:
    """Make a frozen dataclass whose fields are checked when one is made, and listed in its docstring.

    A method `_require` of the class looks at what concerns several fields.
    """
    finish: Callable[[Any], None] | None = cls.__dict__.get("_require")

    def check(self: Any) -> None:
        for name, each in options_of(type(self)).items():
            object.__setattr__(self, name, each.check(name, getattr(self, name)))
        if finish is not None:
            finish(self)

    cls.__post_init__ = check  # type: ignore[attr-defined]
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    describe(made, options_of(made), defaults_of(made), "Attributes")
    return made


def options_of(cls: Any) -> dict[str, Option]:
    """The options of a class under `settings_class`, by name."""
    return {each.name: each.metadata["option"] for each in dataclasses.fields(cls) if "option" in each.metadata}


def defaults_of(cls: Any) -> dict[str, Any]:
    """What its fields are if nothing is given."""
    found = {}
    for each in dataclasses.fields(cls):
        if each.default is not dataclasses.MISSING:
            found[each.name] = each.default
        elif each.default_factory is not dataclasses.MISSING:
            found[each.name] = each.default_factory()
    return found


def from_mapping(cls: Callable[..., T], given: Any, what: str, known: Iterable[str]) -> T:
    """An object from what a file holds.

    Args:
        cls: takes the settings by name.
        given: what the file holds there.
        what: where that is, for errors; empty for nowhere.
        known: names that may be there.

    Raises:
        ValueError: it is no mapping, a name isn't known, or a value isn't allowed.
    """
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must hold settings by name, not {shown(given)}.")
    require_known(given, known, what)
    try:
        return cls(**given)
    except ValueError as error:
        raise ValueError(f"{what}: {error}" if what else str(error)) from error


def require_known(given: Iterable[Any], known: Iterable[str], what: str) -> None:
    """Refuse a name that isn't among those known.

    Raises:
        ValueError: names it, the nearest one that is, and all of them.
    """
    names = list(known)
    for name in given:
        if name not in names:
            guess = difflib.get_close_matches(shown(name).strip("'"), names, n=1)
            hint = f" Did you mean {guess[0]!r}?" if guess else ""
            raise ValueError(f"{what} has no field {shown(name)}.{hint} Fields: {', '.join(names)}.")


def signature_defaults(function: Callable[..., Any], names: Iterable[str]) -> dict[str, Any]:
    """Defaults of a function's parameters."""
    parameters = inspect.signature(function).parameters
    return {name: parameters[name].default for name in names}


def describe(cls: type, known: Mapping[str, Option], defaults: Mapping[str, Any], heading: str) -> None:
    """Add a list of the options to a class's docstring, under a heading, behind its first part."""
    lines = [f"{heading}:"]
    for name, each in known.items():
        lines.append(f"    {name} (`{each.kind.type}`, defaults to `{defaults[name]!r}`):")
        lines += textwrap.wrap(each.help, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    first, *rest = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    cls.__doc__ = "\n\n".join([first, "\n".join(lines), *rest])


def parse_bytes(text: str | int, name: str = "max_memory") -> int:
    """Bytes from `"4GB"`, `"1.5GiB"`, `"800 MB"` or a number.

    Raises:
        ValueError: anything else, or nothing.
    """
    return Size().check(name, text)


def _number(kind: Callable[[str], Any], text: str) -> Any:
    """What the text says; the text itself where that is no number, for `check` to refuse."""
    try:
        return kind(text)
    except ValueError:
        return text


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _shown(default: Any) -> str:
    if default is None or default == [] or isinstance(default, bool):
        return ""
    if isinstance(default, (list, tuple)):
        return ",".join(map(str, default))
    return str(default)
