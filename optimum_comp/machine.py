"""How much memory this process may still take: what the machine has free, and what its container allows."""

from __future__ import annotations

from pathlib import Path

import psutil


_UNLIMITED = 2**60
"""Version 1 of control groups says no limit by the largest multiple of a page."""


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can still be taken before something has to give way.

    Args:
        root: where the file system begins.
    """
    available = int(psutil.virtual_memory().available)
    allowed = container_headroom(root)
    return available if allowed is None else min(available, allowed)


def container_headroom(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups of this process leave it, the least of all that it is in; `None` if none limits.

    Both versions are looked at; a group's limit holds for the groups in it, so all are that the process' own lies in.
    In a container, the groups that are outside it can't be seen, and the path may be named as they are: what isn't
    there is passed over.

    Args:
        root: where the file system begins.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = []
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            # Beside version 1, version 2 is mounted below it, and has no say over memory.
            top, names, totals = mounted, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            top, names, totals = mounted / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            continue
        group = top / path.strip("/")
        while True:
            found.append(_headroom(group, *names, totals))
            if group == top:
                break
            group = group.parent
    limits = [each for each in found if each is not None]
    return min(limits, default=None)


def _headroom(group: Path, limit_name: str, usage_name: str, totals: str) -> int | None:
    """What one group leaves; `None` if it has no limit, or isn't there."""
    limit, usage = _number(group / limit_name), _number(group / usage_name)
    if limit is None or usage is None or limit >= _UNLIMITED:
        return None
    return max(0, limit - usage + _cached(group / "memory.stat", totals))


def _number(path: Path) -> int | None:
    """The number in a file; `None` if there is none (`max`), or no such file."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _cached(path: Path, totals: str) -> int:
    """Bytes of copies of files."""
    try:
        entries = dict(line.split() for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return 0
    return sum(int(entries.get(f"{totals}{name}", 0)) for name in ("inactive_file", "active_file"))
