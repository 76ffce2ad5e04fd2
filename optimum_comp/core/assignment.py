"""Which of several precisions each group of weights gets: the order in which more bytes buy the most quality."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """A precision that a group of weights can have.

    Attributes:
        size: bytes.
        loss: what it costs in quality, in any unit that adds up over groups.
    """

    size: float
    loss: float


class Step(NamedTuple):
    """One group gets a better precision.

    Attributes:
        group: its name.
        choice: index of the new precision in the group's list.
        size: bytes of all groups afterwards.
        loss: of all groups afterwards.
    """

    group: str
    choice: int
    size: float
    loss: float


def upgrades(choices: Mapping[str, Sequence[Choice]]) -> list[Step]:
    """Steps from the cheapest precision of every group to the best one of each, the best bargain first.

    Each step takes the group whose next precision saves the most loss for a byte. Where losses add up and each group's
    bargains get worse (its losses are convex in its sizes), every prefix of the steps loses least among all
    assignments of its size: the greedy solution of a knapsack with divisible, concave items. A precision that isn't
    on a group's lower convex hull is never worth it and is left out, which makes them convex.

    Args:
        choices: group -> its precisions, by growing size.
    """
    hulls = {group: _hull(options) for group, options in choices.items()}
    size = sum(choices[group][hull[0]].size for group, hull in hulls.items())
    loss = sum(choices[group][hull[0]].loss for group, hull in hulls.items())
    waiting = [(-_bargain(choices[group], hull, 1), group, 1) for group, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(waiting)
    steps = []
    while waiting:
        _, group, place = heapq.heappop(waiting)
        hull, options = hulls[group], choices[group]
        size += options[hull[place]].size - options[hull[place - 1]].size
        loss += options[hull[place]].loss - options[hull[place - 1]].loss
        steps.append(Step(group, hull[place], size, loss))
        if place + 1 < len(hull):
            heapq.heappush(waiting, (-_bargain(options, hull, place + 1), group, place + 1))
    return steps


def _bargain(options: Sequence[Choice], hull: Sequence[int], place: int) -> float:
    """Loss saved for a byte by going to `hull[place]`."""
    cheap, dear = options[hull[place - 1]], options[hull[place]]
    return (cheap.loss - dear.loss) / (dear.size - cheap.size)


def _hull(options: Sequence[Choice]) -> list[int]:
    """Indices of the precisions on the lower convex hull of loss over size; the first is the smallest."""
    hull = [0]
    for index in range(1, len(options)):
        if options[index].size <= options[hull[-1]].size or options[index].loss >= options[hull[-1]].loss:
            continue
        hull.append(index)
        while len(hull) > 2 and _bargain(options, hull, len(hull) - 2) <= _bargain(options, hull, len(hull) - 1):
            del hull[-2]
    return hull
