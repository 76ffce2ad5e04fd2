"""Scripts, as the characters that texts in them are made of."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache


Ranges = tuple[tuple[int, int], ...]
"""First and last code point of each."""

ASCII = "ascii"
_ASCII: Ranges = ((0x00, 0x7F),)

# What texts in all scripts have: digits, punctuation, accents that combine, signs of currencies and units.
_COMMON: Ranges = (
    (0x00, 0x40),
    (0x5B, 0x60),
    (0x7B, 0x7F),
    (0xA0, 0xBF),
    (0xD7, 0xD7),
    (0xF7, 0xF7),
    (0x300, 0x36F),
    (0x2000, 0x214F),
)
_WIDE: Ranges = ((0x3000, 0x303F), (0x3200, 0x33FF), (0xFE30, 0xFE4F), (0xFF00, 0xFFEF))
"""What Han, Kana and Hangul share: their punctuation, letters in circles, forms of full and half width."""

SCRIPTS: dict[str, Ranges] = {
    ASCII: _ASCII,
    "latin": (
        (0x41, 0x5A),
        (0x61, 0x7A),
        (0xC0, 0x2FF),
        (0x1D00, 0x1DBF),
        (0x1E00, 0x1EFF),
        (0x2C60, 0x2C7F),
        (0xA720, 0xA7FF),
        (0xAB30, 0xAB6F),
        (0xFB00, 0xFB06),
    ),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "armenian": ((0x530, 0x58F), (0xFB13, 0xFB17)),
    "georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF), (0x2D00, 0x2D2F)),
    "hebrew": ((0x590, 0x5FF), (0xFB1D, 0xFB4F)),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x870, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "devanagari": ((0x900, 0x97F), (0x1CD0, 0x1CFF), (0xA8E0, 0xA8FF)),
    "bengali": ((0x964, 0x965), (0x980, 0x9FF)),
    "gurmukhi": ((0x964, 0x965), (0xA00, 0xA7F)),
    "gujarati": ((0x964, 0x965), (0xA80, 0xAFF)),
    "oriya": ((0x964, 0x965), (0xB00, 0xB7F)),
    "tamil": ((0x964, 0x965), (0xB80, 0xBFF)),
    "telugu": ((0x964, 0x965), (0xC00, 0xC7F)),
    "kannada": ((0x964, 0x965), (0xC80, 0xCFF)),
    "malayalam": ((0x964, 0x965), (0xD00, 0xD7F)),
    "sinhala": ((0x964, 0x965), (0xD80, 0xDFF)),
    "thai": ((0xE00, 0xE7F),),
    "lao": ((0xE80, 0xEFF),),
    "tibetan": ((0xF00, 0xFFF),),
    "myanmar": ((0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)),
    "khmer": ((0x1780, 0x17FF), (0x19E0, 0x19FF)),
    "ethiopic": ((0x1200, 0x139F), (0x2D80, 0x2DDF), (0xAB00, 0xAB2F)),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF), *_WIDE),
    "kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0x1B000, 0x1B16F), *_WIDE),
    "han": (
        (0x2E80, 0x2FDF),
        (0x3100, 0x312F),
        (0x31A0, 0x31EF),
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
        (0xF900, 0xFAFF),
        (0x20000, 0x323AF),
        *_WIDE,
    ),
    "symbols": ((0x2150, 0x25FF), (0x27C0, 0x2BFF), (0x1D400, 0x1D7FF)),
    "emoji": (
        (0x200D, 0x200D),
        (0x20E3, 0x20E3),
        (0x2600, 0x27BF),
        (0x2B00, 0x2BFF),
        (0xFE0E, 0xFE0F),
        (0x1F000, 0x1FAFF),
        (0xE0020, 0xE007F),
    ),
}
"""By blocks of Unicode; `ascii` is just that, all others come with what is common to all scripts."""

_COMMON_NAME, _OTHERS, _SEVERAL = "digits and signs", "other scripts", "several scripts"


def characters_of(scripts: Iterable[str]) -> frozenset[str]:
    """The characters of texts in these scripts.

    Raises:
        KeyError: there is no such script.
    """
    found: set[str] = set()
    for name in scripts:
        for first, last in (*SCRIPTS[name], *(() if name == ASCII else _COMMON)):
            found.update(map(chr, range(first, last + 1)))
    return frozenset(found)


@lru_cache(maxsize=2**16)
def _script_of(character: str) -> str:
    """`latin`, ...; of what texts in all scripts have, `digits and signs`."""
    code = ord(character)
    if any(first <= code <= last for first, last in _COMMON):
        return _COMMON_NAME
    return next(
        (
            name
            for name, ranges in SCRIPTS.items()
            if name != ASCII and any(first <= code <= last for first, last in ranges)
        ),
        _OTHERS,
    )


def script_of(text: str) -> str:
    """The script of a text's letters, for a table: a script's name, `digits and signs`, or one for what is mixed."""
    found = {_script_of(character) for character in text} - {_COMMON_NAME}
    return _COMMON_NAME if not found else found.pop() if len(found) == 1 else _SEVERAL
