"""A budget in place of a recipe: which weights get 4 bits, 8 bits or float, by what each was measured to cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optimum_comp.core.assignment import Choice, Step, upgrades
from optimum_comp.core.rounding import Blocks, rounding_error
from optimum_comp.evaluation import perplexity
from optimum_comp.onnx.blocks import round_weight
from optimum_comp.onnx.calibration import opened, second_moments
from optimum_comp.onnx.folders import MODEL_NAME, graph_bytes
from optimum_comp.onnx.graph import DenseNode, dense_nodes, load_float_graph, weight_of
from optimum_comp.onnx.noise import without_noise
from optimum_comp.onnx.quantization import Plan, check_onnx_folder, quantize_onnx
from optimum_comp.onnx.recipes import BUDGET, EIGHT, FOUR, Format
from optimum_comp.onnx.runtime import load_onnx
from optimum_comp.options import Share, parse_bytes
from optimum_comp.scratch import make_scratch
from optimum_comp.utils import format_bytes, get_logger, progress_disabled


logger = get_logger(__name__)

_PROBE = (2, 256)
"""Samples and tokens of each on which a group's sensitivity is measured."""

_OPTIONS: tuple[Format | None, ...] = (FOUR, EIGHT, None)
"""What a group of weights can be stored as, by growing size; `None` is float."""


class BudgetError(ValueError):
    """A budget that can't be kept; says what comes nearest."""


@dataclass(frozen=True)
class Budget:
    """What the quantized model may cost; at least one of both.

    Attributes:
        perplexity_increase: relative to the float model, 0.02 for 2 %.
        size: bytes of graph and weights.
    """

    perplexity_increase: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        """Refuse a budget that is none."""
        if self.perplexity_increase is None and self.size is None:
            raise ValueError("a budget needs a largest increase of perplexity, a largest size, or both.")
        if self.perplexity_increase is not None:
            increase = Share("(0, inf)").check("max_perplexity_increase", self.perplexity_increase)
            object.__setattr__(self, "perplexity_increase", increase)
        if self.size is not None:
            object.__setattr__(self, "size", parse_bytes(self.size, "max_size"))

    @property
    def names(self) -> list[str]:
        """The limits, as parts of a folder's name."""
        size = [] if self.size is None else [f"{self.size / 1e6:.10g}MB"]
        return size + [f"{100 * each:.10g}percent" for each in (self.perplexity_increase,) if each is not None]


@dataclass(frozen=True)
class Trial:
    """A model that was made and measured on the way.

    Attributes:
        step: how many groups had a better precision than the least.
        size: bytes.
        increase: of perplexity, relative to the float model, on the held-out samples.
    """

    step: int
    size: int
    increase: float


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        plan: for `quantize_onnx`.
        size: bytes.
        increase: of perplexity on the held-out samples, relative to the float model; `None` if only size was asked.
        trials: what was measured, in order.
        sensitivities: group -> divergence from the float model's predictions with this group alone at 4 bits, in nats.
    """

    plan: Plan
    size: int
    increase: float | None
    trials: tuple[Trial, ...]
    sensitivities: Mapping[str, float]


def search(onnx_dir: str | Path, budget: Budget, tokens: Tensor, held_out: Tensor, *, target: str = "any") -> Found:
    """Find the smallest mix of precisions that keeps a budget of perplexity, or the best one of a size.

    Dense layers that read the same activation are a group. Each group's sensitivity is the Kullback-Leibler divergence
    of the model's predictions from the float model's with this group alone at 4 bits; what 8 bits would cost is that,
    times the ratio of both errors at the layer's output. `core.assignment.upgrades` puts the steps from everything in
    4 bits to everything in float in order, and models along it are made and measured, halving what is left each time.

    Args:
        onnx_dir: a float32 folder with `model.onnx`.
        budget: what is allowed.
        tokens: calibration samples, `[samples, length]`.
        held_out: samples on which perplexity is measured, `[samples, length]`; others than `tokens`.
        target: a key of `TARGETS`.

    Raises:
        BudgetError: it can't be kept; says what comes nearest.
    """
    source = Path(onnx_dir)
    check_onnx_folder(source)
    with without_noise():
        model = load_float_graph(source / MODEL_NAME)
        groups = _groups(dense_nodes(model.graph))
        logger.info("Searching over %d groups of weights in 4 bits, 8 bits or float ...", len(groups))
        rounded, errors = _round_all(model, groups, tokens)
        sensitivities = _sensitivities(model, groups, rounded[FOUR], tokens[: _PROBE[0], : _PROBE[1]])
        steps = upgrades(_choices(groups, errors, sensitivities))
        lookups = _tied_lookups(model.graph)
        del model
    # The float graph is larger than what is made of it.
    with make_scratch(graph_bytes(source), "models that are tried", announced=False) as scratch:
        maker = _Maker(source, Path(scratch), groups, rounded, lookups, steps, held_out, target)
        step, trials = _walk(budget, steps, maker)
        size = maker.size(step)
    increase = next((trial.increase for trial in trials if trial.step == step), None)
    return Found(maker.plan(step), size, increase, tuple(trials), sensitivities)


class _Maker:
    """Makes and measures the model behind each step."""

    def __init__(
        self,
        source: Path,
        scratch: Path,
        groups: Mapping[str, list[DenseNode]],
        rounded: Mapping[Format, Mapping[str, Blocks]],
        lookups: Sequence[str],
        steps: Sequence[Step],
        held_out: Tensor,
        target: str,
    ):
        self._source, self._scratch, self._groups, self._rounded = source, scratch, groups, rounded
        self._lookups, self._steps, self._held_out, self._target = lookups, steps, held_out, target
        self._float: float | None = None

    def plan(self, step: int) -> Plan:
        """The precisions after so many steps."""
        chosen = dict.fromkeys(self._groups, 0)
        for upgrade in self._steps[:step]:
            chosen[upgrade.group] = upgrade.choice
        assignment: dict[str, Format] = {}
        rounded, left = {}, []
        for group, nodes in self._groups.items():
            form = _OPTIONS[chosen[group]]
            for node in nodes:
                if form is None:
                    # A tied embedding that stays in float is stored once, as both.
                    left += [node.name, *(self._lookups if node.is_tied else ())]
                else:
                    assignment[node.name] = form
                    rounded[node.name] = self._rounded[form][node.name]
        return Plan(assignment, rounded, left)

    def size(self, step: int) -> int:
        """Bytes of the model after so many steps."""
        return self._make(step)[1]

    def measure(self, step: int) -> Trial:
        """The model after so many steps, measured."""
        if self._float is None:
            self._float = self._perplexity(self._source)
        folder, size = self._make(step)
        trial = Trial(step, size, self._perplexity(folder) / self._float - 1)
        logger.info("%s: perplexity %+.2f %%.", format_bytes(size), 100 * trial.increase)
        return trial

    def _make(self, step: int) -> tuple[Path, int]:
        folder = self._scratch / "model"
        # Its perplexity is measured; the one that is chosen is made again, and checked.
        quantize_onnx(
            self._source,
            folder,
            recipe=BUDGET,
            target=self._target,
            plan=self.plan(step),
            overwrite=True,
            check=False,
        )
        return folder, graph_bytes(folder)

    def _perplexity(self, folder: Path) -> float:
        return perplexity(load_onnx(folder), self._held_out.flatten(), self._held_out.shape[1])[0]


def _walk(budget: Budget, steps: Sequence[Step], maker: _Maker) -> tuple[int, list[Trial]]:
    """The step that keeps the budget, and what was measured; nothing, if a size is all that is asked."""
    trials: list[Trial] = []

    def try_out(step: int) -> Trial:
        trials.append(maker.measure(step))
        return trials[-1]

    last = len(steps)
    if budget.size is not None:
        last = _last(lambda step: maker.size(step) <= int(budget.size or 0), len(steps))
        if last < 0:
            raise BudgetError(
                f"max_size={format_bytes(budget.size)} can't be kept: with every weight in 4 bits the model takes "
                f"{format_bytes(maker.size(0))}. Prune more of it, or allow more."
            )
    if budget.perplexity_increase is None:
        return last, trials
    allowed = budget.perplexity_increase
    best = try_out(last)
    if best.increase > allowed:
        limit = "" if budget.size is None else f" within {format_bytes(budget.size)}"
        raise BudgetError(
            f"max_perplexity_increase={allowed:.2%} can't be kept{limit}: the nearest is {best.increase:+.2%} at "
            f"{format_bytes(best.size)}."
        )
    low, high = -1, last
    while high - low > 1:
        trial = try_out((low + high) // 2)
        if trial.increase <= allowed:
            best, high = trial, trial.step
        else:
            low = trial.step
    return best.step, trials


def _last(holds: Callable[[int], bool], count: int) -> int:
    """The last number up to `count` for which something holds that holds up to some number; −1 if for none."""
    low, high = -1, count + 1
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _groups(nodes: Sequence[DenseNode]) -> dict[str, list[DenseNode]]:
    """Dense layers by the activation that they read."""
    groups = defaultdict(list)
    for node in nodes:
        groups[node.inputs].append(node)
    return dict(groups)


def _tied_lookups(graph: Any) -> list[str]:
    """Look-ups in a table that a dense layer multiplies by, too."""
    tied = {node.weight for node in dense_nodes(graph) if node.is_tied}
    return [node.name for node in graph.node if node.op_type == "Gather" and node.input[0] in tied]


Rounded = dict[Format, dict[str, Blocks]]
Errors = dict[Format, dict[str, float]]
"""Squared change of each dense node's output, or of its weight where its inputs aren't known."""


def _round_all(model: Any, groups: Mapping[str, list[DenseNode]], tokens: Tensor) -> tuple[Rounded, Errors]:
    """Every weight in 4 bits, made good for, and in 8 bits, to the nearest; and what that changes."""
    rounded: Rounded = {FOUR: {}, EIGHT: {}}
    errors: Errors = {FOUR: {}, EIGHT: {}}
    nodes = [node for group in groups.values() for node in group]
    with tqdm(total=len(nodes), desc="Rounding", unit="matrix", disable=progress_disabled()) as progress:

        def round_some(some: Sequence[DenseNode], moments: Mapping[str, Tensor]) -> None:
            for node in some:
                weight, moment = torch.from_numpy(weight_of(model.graph, node).copy()), moments.get(node.inputs)
                for form, used in (FOUR, moment), (EIGHT, None):
                    blocks = rounded[form][node.name] = round_weight(model.graph, node, form, used)
                    stored = blocks.weight()
                    if moment is None:
                        errors[form][node.name] = float((stored - weight).square().sum())
                    else:
                        errors[form][node.name] = rounding_error(weight, stored, moment)
                progress.update()

        for moments in second_moments(model, [node for node in nodes if not node.is_head], tokens):
            round_some([node for node in nodes if node.inputs in moments], moments)
        round_some([node for node in nodes if node.name not in rounded[FOUR]], {})
    return rounded, errors


def _sensitivities(
    model: Any, groups: Mapping[str, list[DenseNode]], rounded: Mapping[str, Blocks], tokens: Tensor
) -> dict[str, float]:
    """What each group alone changes in the model's predictions if it is rounded, in nats a token."""
    weights = sorted({node.weight for group in groups.values() for node in group})
    result = model.graph.output[0].name
    found = {}
    with opened(model, weights=weights) as runner:

        def predict(changed: Sequence[DenseNode]) -> Tensor:
            given = {}
            for node in changed:
                values = rounded[node.name].weight().float()
                given[node.weight] = (values if node.is_tied else values.T).contiguous().numpy()
            (logits,) = runner.run(tokens.numpy(), [result], given)
            return torch.from_numpy(logits).log_softmax(-1)

        reference = predict([])
        for name, nodes in tqdm(groups.items(), desc="Sensitivity", unit="group", disable=progress_disabled()):
            difference = torch.nn.functional.kl_div(predict(nodes), reference, log_target=True, reduction="sum")
            found[name] = max(float(difference) / tokens.numel(), 0.0)
    return found


def _choices(
    groups: Mapping[str, list[DenseNode]], errors: Errors, sensitivities: Mapping[str, float]
) -> dict[str, list[Choice]]:
    choices = {}
    for name, nodes in groups.items():
        changed = {form: sum(found[node.name] for node in nodes) for form, found in errors.items()}
        share = changed[EIGHT] / changed[FOUR] if changed[FOUR] > 0 else 0.0
        sizes = {form: float(sum(form.matrix_bytes(node.shape) for node in nodes)) for form in errors}
        whole = float(sum(4 * node.shape[0] * node.shape[1] for node in nodes))
        choices[name] = [
            Choice(sizes[FOUR], sensitivities[name]),
            Choice(sizes[EIGHT], sensitivities[name] * share),
            Choice(whole, 0.0),
        ]
    return choices
