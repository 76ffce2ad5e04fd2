"""Temporary folders with room for what is to be in them, which aren't in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from optimum_comp.utils import format_bytes, get_logger


logger = get_logger(__name__)

_CHOICES = ("TMPDIR", "TEMP", "TMP")
"""Variables by which a user chooses where temporary files go."""

_IN_MEMORY = ("tmpfs", "ramfs")


def make_scratch(
    needed: int, what: str, *, announced: bool = True, remedy: str = "Set TMPDIR to a folder with the room."
) -> TemporaryDirectory[str]:
    """Make a temporary folder, which is removed when the object that is returned is.

    It is where the user wants temporary files (`TMPDIR`); else where the system has them, if that isn't in memory and
    has the room; else in the working folder, hidden.

    Args:
        needed: bytes that are going to be written there.
        what: waits there.
        announced: say which folder it is.
        remedy: what to do where there is no room.

    Raises:
        OSError: there is no room in any of them.
    """
    usual = Path(tempfile.gettempdir())
    chosen = any(os.environ.get(name) for name in _CHOICES)
    places = [usual] if chosen else [usual, Path.cwd()]
    free = {place: shutil.disk_usage(place).free for place in places}
    fitting = [place for place in places if free[place] >= needed and (chosen or not _is_in_memory(place))]
    fitting = [place for place in fitting if os.access(place, os.W_OK)]
    if not fitting:
        known = "; ".join(_describe(place, free[place]) for place in places)
        raise OSError(f"{what} wait in a temporary folder, which needs {format_bytes(needed)}: {known}. {remedy}")
    place = fitting[0]
    scratch = TemporaryDirectory(prefix="optimum-comp-" if place == usual else ".optimum-comp-", dir=place)
    if announced:
        logger.info(
            f"{what.capitalize()} wait in {scratch.name} ({format_bytes(needed)} needed, {format_bytes(free[place])} "
            "free)."
        )
    return scratch


def _describe(place: Path, free: int) -> str:
    what = " of memory" if _is_in_memory(place) else ""
    return f"{place} has {format_bytes(free)}{what} free" if os.access(place, os.W_OK) else f"{place} can't be written"


def _is_in_memory(folder: Path) -> bool:
    """Whether files there are kept in memory, as systems say of which mounts can be listed."""
    folder = folder.resolve()
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[each] in _IN_MEMORY for each in (folder, *folder.parents) if each in mounts), False)
