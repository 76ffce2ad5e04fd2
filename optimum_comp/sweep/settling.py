"""What goes from where, where that is left open: what is expected to cost least, tried on samples held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from optimum_comp.configuration import CompConfig
from optimum_comp.core.allocation import Allocation, Choice, Knapsack, sizes_to_try, steps_of
from optimum_comp.core.surgery import Counts
from optimum_comp.families import HEADS, KV
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.weighing import LayerCosts, Weighing
from optimum_comp.utils import get_logger


logger = get_logger(__name__)

TRIAL_TOKENS_PER_CHANNEL = 8
"""That a trial prunes with, if there are twice as many: as few as tell one split from another."""
TRIAL_SAMPLES = 32
"""That a trial measures on, at most."""


@dataclasses.dataclass
class Settled:
    """What goes from where.

    Attributes:
        chosen: which of the splits.
        removed: whole layers that go.
        layer_scores: of every layer; empty if none had to go.
        widths: neurons of each layer that stays.
        costs: what each width is expected to cost, in nats a token; `None` where all are alike.
        weighed: what each split is expected to cost; `None` for one that can't be; empty where there was only one.
        tried: the divergence from the dense model that each was measured at; `None` for one that wasn't tried; empty
            if none was.
    """

    chosen: int
    removed: list[int]
    layer_scores: list[float]
    widths: list[int]
    costs: list[float] | None = None
    weighed: list[float | None] = dataclasses.field(default_factory=list)
    tried: list[float | None] = dataclasses.field(default_factory=list)

    @property
    def is_uneven(self) -> bool:
        """Whether layers have different widths."""
        return len(set(self.widths)) > 1

    def entries(self) -> dict[str, Any]:
        """For a journal."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Settled | None:
        """What a journal's entries say; `None` where nothing is settled."""
        if "widths" not in state:
            return None
        return cls(**{each.name: state[each.name] for each in dataclasses.fields(cls)})

    def fits(self, plans: Sequence[Allocation], depth: int, neurons: int) -> bool:
        """Whether a model of so many layers and neurons, and these splits, can have led to it."""
        if self.chosen >= len(plans) or {len(self.weighed), len(self.tried)} - {0, len(plans)}:
            return False
        gone = set(self.removed)
        return (
            len(gone) == len(self.removed) == plans[self.chosen].layers
            and max(gone, default=0) < depth
            and len(self.widths) == depth - len(gone)
            and max(self.widths) <= neurons
        )


class Settling:
    """Finds out what goes.

    Args:
        config: how to prune.
        plans: splits of the budget to choose from.
        counts: units of each kind of a dense layer.
        neurons: of its feed-forward layer.
        kept: layers that may stay.
        protected: layers that may not go.
        ranks: the processes that share the work.
    """

    def __init__(
        self,
        config: CompConfig,
        plans: Sequence[Allocation],
        counts: Counts,
        neurons: int,
        kept: Sequence[int],
        protected: set[int],
        ranks: Ranks,
    ):
        self._plans, self._counts, self._neurons = plans, counts, neurons
        self._protected, self._ranks = protected, ranks
        is_uneven = config.allocation == "adaptive" and plans[0].width < neurons and len(kept) > 1
        self.has_to_weigh = len(plans) > 1 or is_uneven
        # A block at a time, as neurons go, but not less finely than in some thirty steps.
        block = min(config.elimination_block or neurons, neurons // 32)
        self._step = config.round_to * max(1, block // config.round_to)
        self._sizes = sizes_to_try(neurons, min(plan.width for plan in plans) // 2, self._step)
        attention = list(dict.fromkeys(map(self._attention_left, plans)))
        self.what = Weighing(
            form=config.resolved_neuron_metric,
            ridge=config.ridge,
            kept=kept,
            sizes=self._sizes,
            attention=attention if len(attention) > 1 else (),
            layers=len({plan.layers for plan in plans}) > 1,
            is_bridged=config.bridge,
        )

    def choose(
        self,
        costs: list[LayerCosts],
        removed: list[int],
        scores: list[float],
        measure: Callable[[Settled], float] | None,
    ) -> Settled:
        """The split that costs least.

        What is expected is to second order, of each part by itself: about right for neurons, too little where several
        layers go or attention does. So if anything else promises to be cheaper than what takes fewest layers
        and least attention, the best of each kind is tried beside that, and what is measured decides.

        Args:
            costs: of each layer in `what.kept`.
            removed: layers that go in any case.
            scores: every layer's, if some went by them.
            measure: tries a split, and returns how far it leads from the dense model, in nats a token; `None` if there
                are too few samples for that: then nothing else is believed.
        """
        choices = self._ranks.from_first(self._choices(costs) if self._ranks.is_first else None)
        assert choices is not None
        weighed = [None if choice is None else choice.cost for choice in choices]
        shortlist = self._shortlist(weighed) if measure is not None else self._shortlist(weighed)[:1]
        found = {number: self._settled(number, choices[number], costs, removed, scores) for number in shortlist}
        tried: list[float | None] = []
        chosen = shortlist[0]
        if measure is not None and len(shortlist) > 1:
            measured = {number: measure(found[number]) for number in shortlist}
            tried = [measured.get(number) for number in range(len(weighed))]
            chosen = min(shortlist, key=measured.__getitem__)
        is_open = len(self._plans) > 1
        return dataclasses.replace(found[chosen], weighed=weighed if is_open else [], tried=tried)

    def say(self, found: Settled) -> None:
        """Tell what was found."""
        if found.weighed:
            groups, heads = self._attention_left(self._plans[found.chosen])
            layers = f" ({', '.join(map(str, found.removed))})" if found.removed else ""
            trials = sum(each is not None for each in found.tried)
            logger.info(
                f"Of {len(found.weighed)} splits{f' ({trials} tried)' if trials else ''}, the one that removes "
                f"{len(found.removed)} whole layers{layers} and leaves {groups} groups of {heads // groups} heads in "
                f"each other costs least; {found.weighed[found.chosen] or 0.0:.4f} nats a token are expected."
            )
        if found.costs is not None:
            logger.info("Widths by what they cost: %s.", ", ".join(map(str, found.widths)))

    def _attention_left(self, plan: Allocation) -> tuple[int, int]:
        """Groups and heads that a split leaves in a layer."""
        every = self._counts.get(KV, 1)
        groups = plan.units.get(KV, every)
        return groups, plan.units.get(HEADS, self._counts.get(HEADS, 1) // every * groups)

    def _choices(self, costs: list[LayerCosts]) -> list[Choice | None]:
        """The cheapest way to each split."""
        what, step = self.what, self._step
        most = max(plan.layers for plan in self._plans) if what.layers else 0
        gone = [torch.inf if index in self._protected else of.gone for index, of in zip(what.kept, costs, strict=True)]
        # One program serves every number of layers.
        knapsacks: dict[tuple[int, int], Knapsack] = {}
        choices = []
        for plan in self._plans:
            left, count = self._attention_left(plan), plan.layers if what.layers else 0
            if left not in knapsacks:
                more = [of.attention[what.attention.index(left)] if what.attention else 0.0 for of in costs]
                sized = [[cost + extra for cost in of.sizes] for of, extra in zip(costs, more, strict=True)]
                room = len(costs) * (self._neurons // step)
                knapsacks[left] = Knapsack(steps_of(self._sizes, step), sized, gone, most, room)
            choices.append(knapsacks[left].cheapest(count, plan.width * (len(costs) - count) // step))
        return choices

    def _shortlist(self, weighed: Sequence[float | None]) -> list[int]:
        """Splits to try: the plainest, and the best of each kind that promises to be cheaper."""
        possible = {number: cost for number, cost in enumerate(weighed) if cost is not None}
        plainest = next(iter(possible))
        best: dict[str, int] = {}
        for number, cost in sorted(possible.items(), key=lambda each: each[1]):
            plan = self._plans[number]
            if cost >= possible[plainest]:
                break
            if plan.units.keys() & {KV, HEADS}:
                best.setdefault("attention", number)
            else:
                first = self._plans[best.setdefault("layers", number)]
                # Layers cost more together than each by itself.
                if 0 < plan.layers <= first.layers // 2:
                    best.setdefault("fewer layers", number)
        return [plainest, *best.values()]

    def _settled(
        self,
        number: int,
        choice: Choice | None,
        costs: list[LayerCosts],
        removed: list[int],
        scores: list[float],
    ) -> Settled:
        assert choice is not None
        what = self.what
        return Settled(
            number,
            [what.kept[place] for place in choice.removed] if what.layers else removed,
            [of.gone for of in costs] if what.layers else scores,
            [self._sizes[size] for size in choice.numbers],
            list(choice.costs),
        )
