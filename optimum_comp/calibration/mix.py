"""A mix of texts: several sources, each with its share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from optimum_comp.utils import is_there, shown


IN_MEMORY = "given in memory: "
"""In a written recipe, stands before the digest of calibration samples that no file holds."""

_HOW = "write a mix as SOURCE:SHARE,SOURCE:SHARE, like a.txt:0.5,self:0.5"


@dataclass(frozen=True)
class Part:
    """One source of a mix.

    Attributes:
        source: as a source by itself is written.
        share: of the samples, in (0, 1]; the shares of a mix add up to 1.
    """

    source: str
    share: float


def parts_of(source: object) -> tuple[Part, ...]:
    """The parts of a mix, as `a.txt:0.5,b.jsonl:0.3,self:0.2`; nothing if it is one source.

    Shares are relative to each other; a part without one counts like a share of 1, so `a.txt,b.txt` is half of each.
    What is the name of a file is that file, whatever is in its name.

    Args:
        source: a calibration source.

    Raises:
        ValueError: a share isn't a number above 0, a source is empty, or one is there twice.
    """
    return shared(weighed(source)) if isinstance(source, str) else ()


def weighed(source: str) -> tuple[Part, ...]:
    """The same with shares as they are written, for those that are to be shared out among more sources.

    Raises:
        ValueError: see `parts_of`.
    """
    if is_there(source) or source.startswith(IN_MEMORY):
        return ()
    pieces = list(_pieces(source))
    if len(pieces) == 1:
        name, share = _split(pieces[0])
        # A number beyond a share is part of a name, as in name:config.
        return (Part(name, share),) if name and share is not None and 0 < share <= 1 else ()
    found = []
    for piece in pieces:
        name, share = _split(piece)
        if not name:
            raise ValueError(f"calibration={shown(source)!r} names an empty source; {_HOW}.")
        if share is not None and not (math.isfinite(share) and share > 0):
            raise ValueError(
                f"calibration={shown(source)!r} gives {shown(name)!r} the share {share:g}; it must be above 0: {_HOW}."
            )
        found.append(Part(name, 1.0 if share is None else share))
    _require_different(found, source)
    return tuple(found)


def shared(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Parts with shares that add up to 1."""
    whole = sum(part.share for part in parts)
    return tuple(Part(part.source, part.share / whole) for part in parts)


def sources_in(source: str) -> list[str]:
    """The sources of a mix as they are written; of what is no mix, itself."""
    return [part.source for part in parts_of(source)] or [source]


def with_another(source: str, other: str, share: float) -> list[str]:
    """The parts, as they are written, of a mix in which another source has a share beside what there was.

    Args:
        source: one source, or a mix.
        other: what isn't in it yet.
        share: of all samples, in (0, 1).
    """
    parts = parts_of(source) or (Part(source, 1.0),)
    left = (f"{part.source}:{(1 - share) * part.share:.6g}" for part in parts)
    return [*left, f"{other}:{share:.6g}"]


def _require_different(parts: Sequence[Part], source: object) -> None:
    names = [part.source for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"calibration={shown(source)!r} names {shown(name)!r} twice; {_HOW}.")


def _pieces(source: str) -> Iterator[str]:
    """What stands between commas, but for those in the names of files that are there."""
    left = source.split(",")
    while left:
        for count in range(len(left), 0, -1):
            piece = ",".join(left[:count]).strip()
            if count == 1 or is_there(piece) or is_there(_split(piece)[0]):
                yield piece
                left = left[count:]
                break


def counts_of(parts: Sequence[Part], samples: int) -> list[int]:
    """How many samples each part gives; the largest remainders are rounded up.

    Raises:
        ValueError: there are fewer samples than parts, so that one would give none.
    """
    exact = [part.share * samples for part in parts]
    found = [math.floor(each) for each in exact]
    order = sorted(range(len(parts)), key=lambda number: (found[number] - exact[number], number))
    for number in order[: samples - sum(found)]:
        found[number] += 1
    for part, count in zip(parts, found, strict=True):
        if count == 0:
            raise ValueError(
                f"of num_samples={samples}, a share of {part.share:.3g} leaves {shown(part.source)!r} none; take more "
                "samples, or leave it away."
            )
    return found


def _split(piece: str) -> tuple[str, float | None]:
    """Source and share; the share is a number behind the last colon, unless a file has that name."""
    name, colon, share = piece.rpartition(":")
    if not colon or is_there(piece):
        return piece, None
    try:
        return name.strip(), float(share)
    except ValueError:
        # As in a dataset's name:config:split.
        return piece, None
