"""What was decided and why, from what was recorded: plain data first, and the same in words."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimum_comp.configuration import CompConfig
from optimum_comp.core.recovery import FORMS
from optimum_comp.distillation.rounding import rounds_head
from optimum_comp.onnx.recipes import BUDGET, TARGETS
from optimum_comp.report.run import CompReport, Decision, LayerReport


_WIDTH = 100
_NEXT = 3
"""Layers above the threshold whose scores are shown."""
_SPLITS = 8
"""Splits of a budget that are shown, the cheapest first."""

_PLURAL = {"layers": "whole layers", "kv": "key-value groups", "heads": "query heads", "ffn": "neurons"}
_SINGLE = {"kv": "group", "heads": "head", "ffn": "neuron"}

_LAYER_METRICS = {
    "cosine": "1 - cosine similarity of what goes into the layer and what comes out; near 0, it hardly acts",
    "loss": "next-token loss of the calibration text with the layer skipped",
    "cost": "nats a token that going without the layer is expected to cost, bridged, to second order",
}
_METRICS = {
    "condition_gram": "the squared error that grows if the unit alone goes and all other columns are fitted anew",
    "condition_mask": "the squared error that grows if the unit alone goes and all others get new factors",
    "wanda": "squared weights times squared activations",
    "magnitude": "squared weights",
    "random": "drawn by chance",
}
_REPAIRS = {"least_squares": "by least squares", "mask": "by mask tuning", "none": "not at all"}
_ROUNDINGS = {
    "nearest": "each weight to the nearest code",
    "hqq": "by half-quadratic quantization, without text",
    "compensated": "with calibration text: each column makes good what those before it did wrong",
}


@dataclass(frozen=True)
class Run:
    """What is known of a pruning run, finished or not.

    Attributes:
        config: what was asked.
        source: name of the dense model.
        calibration: the text, as the report describes it.
        layers: a report for each layer that is done.
        removed: whole layers that went; `None` if that isn't decided yet.
        layer_scores: of every layer; empty if none had to go.
        report: of a finished run; `None` of one that isn't.
    """

    config: CompConfig
    source: str | None
    calibration: Mapping[str, Any]
    layers: Sequence[LayerReport]
    removed: Sequence[int] | None
    layer_scores: Sequence[float]
    report: CompReport | None = None

    @classmethod
    def finished(cls, report: CompReport, config: CompConfig) -> Run:
        """A run that has made a model."""
        found = report.layers, report.removed_layers, report.layer_scores
        return cls(config, report.source, report.calibration, *found, report)

    @classmethod
    def unfinished(cls, state: Mapping[str, Any], layers: Sequence[LayerReport]) -> Run:
        """A run that was interrupted.

        Args:
            state: what its journal holds.
            layers: reports on the layers that are done.
        """
        config = CompConfig(**state["run"]["config"])
        removed = state.get("removed", [] if config.layer_fraction == 0 or layers else None)
        about = state["run"]["source"], state["run"]["calibration"]
        return cls(config, *about, layers, removed, state.get("layer_scores", []))

    @property
    def depth(self) -> int | None:
        """Decoder layers of the dense model, as far as that is known."""
        if self.report is not None:
            return len(self.layers) + len(self.report.removed_layers)
        return len(self.layer_scores) or None


def explain_pruning(run: Run, layer: int | None = None) -> dict[str, Any]:
    """What a pruning run has decided, and why, for JSON.

    Args:
        run: the run.
        layer: one layer of the dense model; all if `None`.

    Raises:
        ValueError: the dense model has no such layer.
    """
    depth = run.depth
    if layer is not None and (layer < 0 or (depth is not None and layer >= depth)):
        known = "it must be at least 0" if depth is None else f"the dense model has layers 0 to {depth - 1}"
        raise ValueError(f"layer={layer} is not valid: {known}.")
    found: dict[str, Any] = {
        "kind": "pruning",
        "source": run.source,
        "finished": run.report is not None,
        "done": len(run.layers),
        "calibration": {key: run.calibration.get(key) for key in ("source", "num_samples", "sequence_length")},
        "settings": {
            "neuron_metric": run.config.resolved_neuron_metric,
            "error_norm": run.config.error_norm if run.config.needs_fisher else None,
            "recovery": run.config.recovery,
            "elimination_block": run.config.elimination_block,
            "alignment": run.config.alignment,
            # Where layers competed with all else, that was by what they cost.
            "layer_metric": "cost" if run.config.fixed_layer_fraction is None else run.config.layer_metric,
        },
        "budget": _budget(run),
        "whole_layers": _whole_layers(run),
        "layers": _layers(run),
    }
    if layer is not None:
        found["layers"] = [each for each in found["layers"] if each["layer"] == layer]
        found["only"] = layer
    return found


def _budget(run: Run) -> dict[str, Any]:
    report = run.report
    if report is None:
        return {"requested_sparsity": run.config.sparsity}
    removed = report.parameters_before - report.parameters_after
    total = round(removed / report.achieved_sparsity)
    requested = report.requested_sparsity * total
    return {
        "layers": run.depth,
        "parameters": total,
        "requested_sparsity": report.requested_sparsity,
        "requested_parameters": requested,
        "achieved_sparsity": report.achieved_sparsity,
        "removed_parameters": removed,
        "sizes": report.sizes(),
        "ledger": [
            {**dataclasses.asdict(entry), "share": entry.taken_parameters / requested} for entry in report.ledger
        ],
        "weighed": report.weighed,
        "units": {kind: after for kind, (_, after) in report.units.items()},
    }


def _whole_layers(run: Run) -> dict[str, Any]:
    if run.removed is None:
        return {"decided": False}
    scores = run.layer_scores
    protected = run.config.protected(len(scores)) if scores else set()
    left = sorted((score, index) for index, score in enumerate(scores) if index not in {*protected, *run.removed})
    return {
        "decided": True,
        "removed": [{"layer": index, "score": scores[index], **_bridge(run, index)} for index in run.removed],
        "next": [{"layer": index, "score": score} for score, index in left[:_NEXT]],
        "protected": [{"layer": index, "score": scores[index]} for index in sorted(protected)],
    }


def _bridge(run: Run, removed: int) -> dict[str, Any]:
    """Which layer stands in for a removed one, or why none does."""
    gone = set(run.removed or ())
    before = next((index for index in range(removed - 1, -1, -1) if index not in gone), None)
    if before is None:
        return {"bridged_by": None, "reason": "no layer is before it"}
    if not run.config.bridge:
        return {"bridged_by": None, "reason": "bridges are off"}
    done = {layer.index: layer.bridged for layer in run.layers}
    if before not in done:
        return {"bridged_by": None, "reason": f"layer {before} isn't done yet"}
    if not done[before]:
        return {"bridged_by": None, "reason": "a norm follows the residual stream in this model"}
    return {"bridged_by": before, "reason": None}


def _layers(run: Run) -> list[dict[str, Any]]:
    gone = set(run.removed or ())
    costs = None if run.report is None else run.report.expected_costs
    found: list[dict[str, Any]] = []
    for layer in run.layers:
        behind = layer.index + 1
        while behind in gone:
            behind += 1
        axes = [_decision(run, layer, decision) for decision in layer.decisions]
        bridges = list(range(layer.index + 1, behind)) if layer.bridged else []
        cost = None if costs is None else costs[len(found)]
        found.append({"layer": layer.index, "removed": False, "bridges": bridges, "expected_cost": cost, "axes": axes})
    ranked = sorted(gone, key=lambda index: run.layer_scores[index])
    for index in gone:
        about = {"score": run.layer_scores[index], "rank": ranked.index(index) + 1, **_bridge(run, index)}
        found.append({"layer": index, "removed": True, **about})
    return sorted(found, key=lambda each: each["layer"])


def _decision(run: Run, layer: LayerReport, decision: Decision) -> dict[str, Any]:
    there = _units_there(layer, decision)
    scores = dict(zip(there, decision.scores, strict=True))
    kept = set(decision.kept)
    removed = [unit for unit in there if unit not in kept]

    def scored(units: Sequence[int], best: Any) -> dict[str, Any] | None:
        unit = best(units, key=scores.__getitem__, default=None)
        return None if unit is None else {"unit": unit, "score": scores[unit]}

    return {
        "axis": decision.axis,
        "before": len(there),
        "after": len(kept),
        "highest_removed": scored(removed, max),
        "lowest_kept": scored(decision.kept, min),
        "swapped": _swapped(run, layer, decision, scores),
        "unrepaired_error": decision.unrepaired_error,
        "relative_error": decision.relative_error,
    }


def _units_there(layer: LayerReport, decision: Decision) -> list[int]:
    """The units that the scores are of, numbered as in the dense model: of heads, those of the groups that stay."""
    groups = next((each.kept for each in layer.decisions if each.axis == "kv"), None)
    if decision.axis != "heads" or groups is None:
        return list(range(len(decision.scores)))
    each = len(decision.scores) // len(groups)
    return [group * each + head for group in groups for head in range(each)]


def _swapped(run: Run, layer: LayerReport, decision: Decision, scores: Mapping[int, float]) -> int | None:
    """How many removed units a plain ranking by first scores would have kept; `None` if that can't be told."""
    classes = 1
    if decision.axis == "heads":
        groups = next((each.kept for each in layer.decisions if each.axis == "kv"), None)
        if groups is not None:
            classes = len(groups)
        elif run.report is not None:
            classes = run.report.units["kv"][1]
        else:
            # How many groups there are is written down at the end of a run.
            return None
    units, each = list(scores), len(scores) // classes
    ranked = set()
    for start in range(0, len(units), each):
        best = sorted(units[start : start + each], key=scores.__getitem__, reverse=True)
        ranked.update(best[: len(decision.kept) // classes])
    # Where scores are equal, either is a plain ranking's choice.
    kept = sorted(scores[unit] for unit in decision.kept)
    return 0 if kept == sorted(scores[unit] for unit in ranked) else len(ranked - set(decision.kept))


def explain_quantization(record: Mapping[str, Any]) -> dict[str, Any]:
    """How a quantized model's weights are stored, and why, for JSON.

    Args:
        record: what `ort_config.json` holds, with a `comp_recipe`.
    """
    recipe = record["comp_recipe"]
    weights: Counter[tuple[int, int, str]] = Counter()
    for node, form in recipe["nodes"].items():
        weights[form["bits"], form["block_size"], _weight_of(node)] += 1
    settings = record.get("quantization") or {}
    left = recipe.get("left_in_float")
    excluded = settings.get("nodes_to_exclude") or []
    target = TARGETS.get(recipe["target"])
    return {
        "kind": "quantization",
        "recipe": recipe["name"],
        "description": recipe["description"],
        "rounding": recipe["rounding"],
        "target": recipe["target"],
        "target_description": None if target is None else target.description,
        "reduce_range": settings.get("reduce_range"),
        "operators": recipe["operators"],
        "weights": [
            {"bits": bits, "block_size": block, "weight": weight, "count": count}
            for (bits, block, weight), count in sorted(weights.items())
        ],
        "left_in_float": None if left is None else dict(Counter(map(_weight_of, left))),
        "excluded": len(excluded) - len(left or []),
    }


def _weight_of(node: str) -> str:
    """`/model/layers.3/mlp/down_proj/MatMul` -> `mlp.down_proj`."""
    inside = re.sub(r"^.*?/(layers|h|blocks)\.\d+/", "", node)
    path = inside.strip("/").rpartition("/")[0] or inside.strip("/")
    return path.replace("/", ".")


def explanation_text(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Explanations in words, by the folder that each is of."""
    texts = []
    for name, part in parts.items():
        texts.append(_TEXTS[part["kind"]](name, part))
    return "\n\n".join(texts)


def pruning_text(name: str, found: Mapping[str, Any]) -> str:
    """What `explain_pruning` found, in words.

    Args:
        name: of the folder.
        found: what it found.
    """
    text = found["calibration"]
    lines = [
        f"{name}: {found['source'] or 'a model in memory'}, pruned; calibrated on {text['source']}, "
        f"{text['num_samples']} samples of {text['sequence_length']} tokens."
    ]
    if not found["finished"]:
        lines.append(
            f"The run isn't finished: {found['done']} layers are done. Go on with optimum-cli comp prune --resume."
        )
    if "only" in found:
        return "\n".join([*map(_filled, lines), "", *_one_layer(found)])
    return "\n".join(
        [
            *map(_filled, lines),
            "",
            *_budget_lines(found["budget"]),
            "",
            *_whole_layer_lines(found),
            "",
            *_table(found),
        ]
    )


def _budget_lines(budget: Mapping[str, Any]) -> list[str]:
    lines = ["Budget"]
    asked = f"{budget['requested_sparsity']:.2%} of the decoder layers' parameters"
    if "parameters" not in budget:
        return [*lines, _filled(f"{asked} are to go; how that is shared out is recorded at the end of the run.", 2)]
    requested, removed = budget["requested_parameters"], budget["removed_parameters"]
    lines.append(
        _filled(
            f"The dense model has {budget['parameters']:,} parameters in {budget['layers']} decoder layers. {asked} "
            f"were to go: {requested:,.0f}.",
            2,
        )
    )
    if budget["ledger"]:
        rows = [("", "wanted", "parameters", "taken", "parameters", "of the budget")]
        for entry in budget["ledger"]:
            wanted, taken = f"{entry['wanted_parameters']:,.0f}", f"{entry['taken_parameters']:,}"
            units = f"{entry['wanted_units']:.2f}", str(entry["taken_units"])
            rows.append((_PLURAL[entry["axis"]], units[0], wanted, units[1], taken, f"{entry['share']:.1%}"))
        lines += _aligned(rows)
        lines.append("  Units are of one layer, but for whole layers; parameters are of all layers.")
        for entry in budget["ledger"]:
            lines.append(_filled(f"- {_PLURAL[entry['axis']]}: {entry['reason']}", 2, 4))
    else:
        lines.append(
            _filled(f"How the budget was shared out isn't recorded here. What changed: {budget['sizes']}.", 2)
        )
    lines += _weighed_lines(budget)
    more = removed - requested
    lines.append(
        _filled(
            f"In all {removed:,} went, {budget['achieved_sparsity']:.2%}"
            + (f": rounding took {more:,.0f} more than was asked." if more >= 1 else ", just what was asked."),
            2,
        )
    )
    return lines


def _weighed_lines(budget: Mapping[str, Any]) -> list[str]:
    """The cheapest of the splits that were to choose from."""
    possible = [each for each in budget["weighed"] if each["cost"] is not None]
    if not possible:
        return []
    told = (
        "The cheapest of {} splits; what each was expected to cost, in nats a token, and, where it was tried, the "
        "divergence from the dense model that was measured on samples that weren't fitted:"
    )
    lines = [_filled(told.format(len(possible)), 2)]
    rows = [("whole layers", "key-value groups", "query heads", "cost", "divergence")]
    known = budget["units"]
    ranked = sorted(possible, key=lambda each: (each["divergence"] is None, each["divergence"] or each["cost"]))
    for each in ranked[:_SPLITS]:
        groups, heads = (str(each["units"].get(kind, "all")) if kind in known else "-" for kind in ("kv", "heads"))
        tried = "" if each["divergence"] is None else f"{each['divergence']:.4f}"
        rows.append((str(each["layers"]), groups, heads, f"{each['cost']:.4f}", tried))
    return lines + [f"    {line}" for line in _aligned(rows)]


def _whole_layer_lines(found: Mapping[str, Any]) -> list[str]:
    whole = found["whole_layers"]
    lines = ["Whole layers"]
    if not whole["decided"]:
        return [*lines, "  Which go isn't decided yet."]
    if not whole["removed"] and not whole["next"]:
        return [*lines, "  None went, so none was scored."]
    lines.append(_filled(f"Score: {_LAYER_METRICS[found['settings']['layer_metric']]}.", 2))
    if not whole["removed"]:
        lines.append("  None went: what else could go was cheaper.")
    for each in whole["removed"]:
        lines.append(_filled(f"Layer {each['layer']} went: score {_score(each['score'])}; {_stand_in(each)}.", 2))
    kept = ", ".join(f"{each['layer']} ({_score(each['score'])})" for each in whole["next"])
    lines.append(_filled(f"Next, and kept: {kept or 'none that may go is left'}.", 2))
    if whole["protected"]:
        kept = ", ".join(f"{each['layer']} ({_score(each['score'])})" for each in whole["protected"])
        lines.append(_filled(f"Protected, whatever their score: {kept}.", 2))
    return lines


def _stand_in(removed: Mapping[str, Any]) -> str:
    if removed["bridged_by"] is None:
        return f"no layer stands in for it ({removed['reason']})"
    return f"layer {removed['bridged_by']} was fitted anew to stand in for it"


def _table(found: Mapping[str, Any]) -> list[str]:
    """A row for each layer and axis, and what the columns mean."""
    rows = [("layer", "", "units", "removed up to", "kept from", "swapped", "unrepaired", "repaired")]
    for layer in found["layers"]:
        if layer["removed"]:
            rows.append((str(layer["layer"]), "whole layer", "removed", "", "", "", "", ""))
        for each in layer["axes"] if not layer["removed"] else ():
            highest, lowest = each["highest_removed"], each["lowest_kept"]
            rows.append(
                (
                    str(layer["layer"]),
                    _PLURAL[each["axis"]] + (" (bridge)" if layer["bridges"] and each["axis"] == "ffn" else ""),
                    f"{each['before']} -> {each['after']}",
                    "-" if highest is None else _score(highest["score"]),
                    _score(lowest["score"]),
                    "?" if each["swapped"] is None else str(each["swapped"]),
                    _share(each["unrepaired_error"]),
                    _share(each["relative_error"]),
                )
            )
    settings = found["settings"]
    lines = ["Layers"]
    if len(rows) == 1:
        return [*lines, "  None is done yet."]
    lines += _aligned(rows)
    if all(layer["removed"] for layer in found["layers"]):
        return lines
    notes = [
        "removed up to, kept from: the highest score of a removed unit and the lowest of a kept one, before any went. "
        f"Score: {_METRICS[settings['neuron_metric']]} ({settings['neuron_metric']}).{_measured(settings)}",
        f"swapped: removed units that a plain ranking by these scores would have kept. {_order(settings)}",
        f"unrepaired, repaired: the error that removing leaves as it is, and once the rest is repaired "
        f"{_REPAIRS[settings['recovery']]}: squared, over the square of what the dense layer is to give. "
        f"{_aim(settings)}",
    ]
    costs = [each["expected_cost"] for each in found["layers"] if not each["removed"]]
    if None not in costs:
        notes.append(
            f"units: neurons are shared out by what they cost in loss, to second order: {sum(costs):.3g} nats a token "
            "in all were expected."
        )
    if any(each["unrepaired_error"] is None for layer in found["layers"] for each in layer.get("axes", ())):
        notes.append('unrepaired "-": not recorded in this report.')
    if any(each["swapped"] is None for layer in found["layers"] for each in layer.get("axes", ())):
        notes.append('swapped "?": can be told once the run is finished.')
    return [*lines, *(_filled(f"- {note}", 2, 4) for note in notes)]


def _measured(settings: Mapping[str, Any]) -> str:
    """By what the metric's errors count, where it is asked for."""
    if settings["error_norm"] != "fisher" or settings["neuron_metric"] not in FORMS:
        return ""
    return " Errors count there by what they cost in loss (fisher)."


def _order(settings: Mapping[str, Any]) -> str:
    """Whether the first scores decide, and why not."""
    if settings["neuron_metric"] not in FORMS:
        return "Units were ranked once, so there are none."
    if settings["elimination_block"] == 0:
        return "Neurons were ranked once; groups and heads go one at a time, and the others are scored anew."
    return (
        "Units go a few at a time and the others are then scored anew: what could stand in for a unit may have gone, "
        "and a score from before doesn't know."
    )


def _aim(settings: Mapping[str, Any]) -> str:
    """What errors are compared with."""
    if settings["recovery"] == "none" or settings["alignment"] == 0:
        return "It is to give what it gave."
    return (
        f"It is to give what it gave and to make good {settings['alignment']:.4g} of what layers before it have lost, "
        "so some error is there even where nothing was removed."
    )


def _one_layer(found: Mapping[str, Any]) -> list[str]:
    number, settings = found["only"], found["settings"]
    if not found["layers"]:
        return [f"Layer {number}: not decided yet."]
    (layer,) = found["layers"]
    if layer["removed"]:
        whole = found["whole_layers"]
        count, above = len(whole["removed"]), whole["next"]
        line = (
            f"Layer {number} was removed as a whole: {count} had to go, and its score, {_score(layer['score'])}, is "
            f"number {layer['rank']} from below of those that may; {_stand_in(layer)}."
        )
        kept = (
            f" The lowest that stayed is {_score(above[0]['score'])}, of layer {above[0]['layer']}." if above else ""
        )
        return [_filled(line + kept), _filled(f"Score: {_LAYER_METRICS[settings['layer_metric']]}.")]
    lines = [f"Layer {number}"]
    reasons = {entry["axis"]: entry["reason"] for entry in found["budget"].get("ledger", [])}
    for each in layer["axes"]:
        plural, single = _PLURAL[each["axis"]], _SINGLE[each["axis"]]
        lines.append(f"  {plural}: {each['before']} -> {each['after']}")
        notes = []
        if each["before"] != each["after"]:
            cost = layer["expected_cost"] if each["axis"] == "ffn" else None
            shared = (
                "As many go from every layer."
                if cost is None
                else f"Widths were chosen by what they cost in loss: here {cost:.2g} nats a token were expected."
            )
            notes.append(shared + _sentence(reasons.get(each["axis"], "")))
            highest, lowest = each["highest_removed"], each["lowest_kept"]
            notes.append(
                f"Highest score of a removed one: {_score(highest['score'])} ({single} {highest['unit']}). Lowest of "
                f"a kept one: {_score(lowest['score'])} ({single} {lowest['unit']}). Score: "
                f"{_METRICS[settings['neuron_metric']]} ({settings['neuron_metric']})."
            )
            if each["swapped"] is not None:
                gone = each["before"] - each["after"]
                notes.append(
                    f"{each['swapped']} of the {gone} removed would have been kept by a plain ranking by these scores."
                    + (f" {_order(settings)}" if each["swapped"] else "")
                )
        elif each["axis"] in reasons:
            notes.append(f"None went.{_sentence(reasons[each['axis']])}")
        notes += _errors(each, settings)
        lines += [_filled(f"- {note}", 4, 6) for note in notes]
    if layer["bridges"]:
        gaps = ", ".join(map(str, layer["bridges"]))
        lines.append(
            _filled(f"It was fitted anew to stand in for removed layers ({gaps}), which is in its errors.", 2)
        )
    return lines


def _errors(each: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The errors of one decision, in sentences."""
    before, after = each["unrepaired_error"], each["relative_error"]
    of = "Squared error, over the square of what the dense layer is to give"
    if settings["recovery"] == "none":
        return [f"{of}: {_share(after)}; nothing was repaired. {_aim(settings)}"]
    left = "not recorded" if before is None else _share(before)
    repaired = f"once that is repaired {_REPAIRS[settings['recovery']]}, {_share(after)}"
    return [f"{of}: with what stays as it was, {left}; {repaired}. {_aim(settings)}"]


def quantization_text(name: str, found: Mapping[str, Any]) -> str:
    """What `explain_quantization` found, in words.

    Args:
        name: of the folder.
        found: what it found.
    """
    target = f" ({found['target_description']})" if found["target_description"] else ""
    lines = [_filled(f"{name}: quantized by recipe {found['recipe']}: {found['description']}.")]
    if found["recipe"] == BUDGET:
        lines.append(
            _filled(
                "A search gave each weight its bits by what it was measured to cost; the budget itself and the "
                "measurements aren't recorded.",
                2,
            )
        )
    else:
        lines.append(_filled(f"Rounded {_ROUNDINGS.get(found['rounding'], found['rounding'])}.", 2))
    narrow = (
        "; int8 weights that meet 8-bit activations are kept within 7 bits, since some of these processors add "
        "products in pairs in 16 bits"
        if found["reduce_range"]
        else ""
    )
    lines.append(_filled(f"Target: {found['target']}{target}{narrow}.", 2))
    forms: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for each in found["weights"]:
        forms.setdefault((each["bits"], each["block_size"]), []).append(each)
    for (bits, block), members in sorted(forms.items()):
        count = sum(each["count"] for each in members)
        which = ", ".join(f"{each['count']} {each['weight']}" for each in members)
        lines.append(_filled(f"{count} weight matrices in {bits} bits, blocks of up to {block}: {which}.", 2, 4))
    lines.append(
        _filled(
            f"Other weights that {' or '.join(found['operators'])} reads are int8, with a scale for each output "
            "channel; norms and biases are float.",
            2,
        )
    )
    if found["left_in_float"]:
        which = ", ".join(f"{count} {weight}" for weight, count in found["left_in_float"].items())
        lines.append(_filled(f"Left in float because 8 bits would cost too much: {which}.", 2, 4))
    # Without a list of the weights that were left, these may be among them.
    what = "and weights that were left out " if found["left_in_float"] is None else ""
    lines.append(
        _filled(
            f"{found['excluded']} products of two activations {what}stay in float: attention scores, attention output "
            "and rotary angles ruin the model if they are quantized with one scale a tensor.",
            2,
        )
    )
    return "\n".join(lines)


def explain_distillation(record: Mapping[str, Any]) -> dict[str, Any]:
    """On what a model was trained, and what it gained, for JSON.

    Args:
        record: what `comp_distil.json` holds.
    """
    before, after = record["before"], record["after"]
    return {
        "kind": "distillation",
        **{name: record[name] for name in ("teacher", "steps", "tokens", "seconds", "parameters")},
        "rounding": record["settings"].get("rounding"),
        "lora_rank": record.get("lora_rank"),
        "texts": {
            name: {**told, "before": before[name], "after": after[name]} for name, told in record["texts"].items()
        },
    }


def distillation_text(name: str, found: Mapping[str, Any]) -> str:
    """What `explain_distillation` found, in words.

    Args:
        name: of the folder.
        found: what it found.
    """
    what = "all weights" if rounds_head(found["rounding"]) else "all weights but embedding and head"
    if found["lora_rank"]:
        what = f"low-rank additions of rank {found['lora_rank']}"
    lines = [
        _filled(
            f"{name}: trained on the predictions of {found['teacher']}: {found['steps']:,} steps, {found['tokens']:,} "
            f"tokens, {found['seconds']:.0f} s; {found['parameters']:,} parameters ({what})."
        )
    ]
    if found["rounding"] is not None:
        lines.append(
            _filled(f"Weights were rounded meanwhile as recipe {found['rounding']} does, and lie on its grid.", 2)
        )
    lines.append(_filled("Divergence from the teacher on blocks that weren't trained on, in nats:", 2))
    rows = [("text", "share", "blocks", "held out", "before", "after")]
    for text, told in found["texts"].items():
        numbers = f"{told['samples']}", f"{told['held_out']}", f"{told['before']:.4f}", f"{told['after']:.4f}"
        rows.append((text, _share(told["share"]), *numbers))
    lines += [f"    {line}" for line in _aligned(rows)]
    lines.append(
        _filled("Text that calibrated the pruning begins lower than other text does: the repair has seen it.", 2)
    )
    return "\n".join(lines)


def explain_vocabulary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Which tokens went, for JSON.

    Args:
        record: what `comp_vocabulary.json` holds.
    """
    told = ("model", "chosen_by", "tokens_before", "tokens_after", "parameters_before", "parameters_after", "merges")
    return {
        "kind": "vocabulary",
        **{name: record[name] for name in told},
        "max_tokens": record["settings"].get("max_tokens"),
        "scripts": {name: {"before": before, "after": after} for name, (before, after) in record["scripts"].items()},
        "texts": {
            name: {each: text[each] for each in ("tokens", "distinct", "kept")}
            for name, text in record["texts"].items()
        },
    }


def vocabulary_text(name: str, found: Mapping[str, Any]) -> str:
    """What `explain_vocabulary` found, in words.

    Args:
        name: of the folder.
        found: what it found.
    """
    before, after = found["parameters_before"], found["parameters_after"]
    limit = "" if found["max_tokens"] is None else f", {found['max_tokens']:,} at most"
    lines = [
        _filled(
            f"{name}: {found['model']} with {found['tokens_after']:,} of its {found['tokens_before']:,} tokens, "
            f"chosen by {found['chosen_by']}{limit}; {before:,} -> {after:,} parameters "
            f"({_share(1 - after / before)} fewer)."
        )
    ]
    if found["merges"] is not None:
        merges = found["merges"]
        lines.append(
            _filled(f"Of {merges[0]:,} merges {merges[1]:,} stay: those whose parts and product are tokens still.", 2)
        )
    lines.append(_filled("Tokens by what they are of:", 2))
    rows = [("", "before", "after", "stay")]
    for kind, each in found["scripts"].items():
        rows.append((kind, f"{each['before']:,}", f"{each['after']:,}", _share(each["after"] / each["before"])))
    lines += [f"    {line}" for line in _aligned(rows)]
    for text, told in found["texts"].items():
        lines.append(
            _filled(
                f"Of {text}'s {told['tokens']:,} tokens, {told['distinct']:,} distinct ones, {_share(told['kept'])} "
                f"stay{'; the others fall to pieces' if told['kept'] < 1 else ''}.",
                2,
            )
        )
    lines.append(_filled("comp_vocabulary.json holds the ids that the tokens had.", 2))
    return "\n".join(lines)


_TEXTS = {
    "vocabulary": vocabulary_text,
    "pruning": pruning_text,
    "distillation": distillation_text,
    "quantization": quantization_text,
}


def _filled(text: str, indent: int = 0, hanging: int | None = None) -> str:
    rest = " " * (indent if hanging is None else hanging)
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns: numbers to the right; names, whose column has no heading, to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    names = [rows[0][column] == "" for column in range(len(rows[0]))]

    def cell(text: str, column: int) -> str:
        return text.ljust(widths[column]) if names[column] else text.rjust(widths[column])

    return ["  " + "  ".join(cell(text, column) for column, text in enumerate(row)).rstrip() for row in rows]


def _sentence(reason: str) -> str:
    return f" {reason[0].upper()}{reason[1:]}" if reason else ""


def _score(value: float) -> str:
    return f"{value:.3g}"


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.01 %" if 0 < value < 5e-5 else f"{100 * value:.2f} %"
