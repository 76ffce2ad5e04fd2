"""A family's spec against a model, and a result against its own config: nothing that can't be loaded is made."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimum_comp.checkpoint.reader import Checkpoint
from optimum_comp.checkpoint.source import ModelSource, empty_model, stored_names
from optimum_comp.configuration import CompConfig
from optimum_comp.core.allocation import Allocation, Shape
from optimum_comp.core.surgery import Counts, shape_after
from optimum_comp.families.cutting import apply_to_config, parameter_shapes
from optimum_comp.families.spec import FFN, HEADS, KV, LAYERS, Family


def check_family(family: Family, model: nn.Module) -> None:
    """Look whether a model is built as its family's spec says.

    Args:
        family: the spec.
        model: a causal language model; its weights may be on the meta device.

    Raises:
        ValueError: a part isn't where the spec says, isn't laid out so, or a config field is missing; names it.
    """

    def refuse(problem: str) -> ValueError:
        return ValueError(
            f"this model isn't built as the spec of {family.model_type!r} says: {problem}. Nothing was pruned."
        )

    config: Any = model.config
    try:
        layers = family.get_layers(model)
    except AttributeError as error:
        raise refuse(f"there is no {family.layers} ({error})") from error
    depth = getattr(config, family.depth_field, None)
    if depth != len(layers) or not depth:
        raise refuse(f"config.{family.depth_field} is {depth}, and there are {len(layers)} decoder layers")
    missing = [
        field
        for axis in family.axes
        for _, field in axis.fields
        if not hasattr(config, field) and family.refusal(axis.name, config) is None
    ]
    if missing:
        raise refuse(f"config.{missing[0]} is missing")
    shapes = parameter_shapes(layers[0])
    for index, layer in enumerate(layers):
        where = f"{family.layers}.{index}"
        for axis in family.axes:
            slots = [axis.consumer, *(slot for slot in axis.producers if not slot.optional)]
            absent = [slot.path for slot in slots if not slot.is_in(layer)]
            if absent:
                raise refuse(f"{where} has no {absent[0]}")
            if axis.norm and not hasattr(layer.get_submodule(axis.norm.rpartition(".")[0]), axis.norm.split(".")[-1]):
                raise refuse(f"{where} has no {axis.norm}")
        own = parameter_shapes(layer)
        if own != shapes:
            name = next(name for name in {**own, **shapes} if own.get(name) != shapes.get(name))
            raise refuse(f"{where}.{name} has shape {own.get(name)}, and in the first layer {shapes.get(name)}")
    counts = family.counts(config, layers[0])
    for name, layouts in family.layouts(layers[0]).items():
        for layout in layouts:
            try:
                layout.unit_width(shapes[name][layout.dim], counts)
            except ValueError as error:
                raise refuse(f"{name} of shape {list(shapes[name])}: {error}") from error


def shape_of(source: ModelSource, config: CompConfig) -> Shape:
    """What the allocation has to know of a model.

    Raises:
        ValueError: an axis is needed that the family can't be pruned along; says why, and what can be done.
    """
    family, layer, of = source.family, source.layers[0], source.model.config
    counts = family.counts(of, layer)
    whole = family.layer_parameters(of, layer, {})
    refused = {axis: family.refusal(axis, of) for axis in config.axes}
    able = [axis for axis, reason in refused.items() if reason is None]
    if config.fixed_attention_fraction and not {KV, HEADS} & set(able):
        reason = next(reason for axis, reason in refused.items() if axis != FFN and reason)
        raise ValueError(
            f"attention of {family.model_type} can't be pruned: {reason}; set attention_fraction=0 "
            "(--attention-fraction 0)."
        )
    if not able and config.fixed_layer_fraction != 1:
        why = next(iter(refused.values()))
        raise ValueError(
            f"{', '.join(config.axes)} of {family.model_type} can't be pruned: {why}. Whole layers can: set "
            "layer_fraction=1 (--layer-fraction 1)."
        )

    def saved(after: Counts) -> int:
        return whole - family.layer_parameters(of, layer, after)

    groups, heads = counts.get(KV, 1), counts.get(HEADS, 1)
    each = heads // groups
    return Shape(
        num_layers=len(source.layers),
        layer_parameters=whole,
        width=counts[FFN],
        neuron_parameters=saved({FFN: counts[FFN] - 1}) if FFN in able else 0,
        groups=groups,
        group_parameters=saved({KV: groups - 1, HEADS: heads - each}) if KV in able and groups > 1 else 0,
        group_heads=each,
        head_parameters=saved({HEADS: heads - 1}) if HEADS in able and each > 1 else 0,
    )


def units_after(counts: Counts, units: Mapping[str, int]) -> dict[str, int]:
    """Kind of unit -> how many stay, of the kinds that change.

    Args:
        counts: before.
        units: axis -> how many stay.
    """
    after = dict(units)
    if KV in units and HEADS not in units:
        after[HEADS] = units[KV] * (counts[HEADS] // counts[KV])
    return after


def check_plan(source: ModelSource, allocation: Allocation) -> None:
    """Look whether a config can say what the pruned model will be, before anything is pruned.

    The pruned config's model, built without weights, has to have just the shapes that cutting will leave.

    Raises:
        ValueError: it hasn't; names the first parameter that differs.
    """
    family, model = source.family, source.model
    layer = source.layers[0]
    counts = family.counts(model.config, layer)
    after = units_after(counts, allocation.units)
    config = copy.deepcopy(model.config)
    depth = len(source.layers) - allocation.layers
    apply_to_config(family, config, list(range(depth)), counts, after)
    pruned = empty_model(config, torch.float32, kind=type(model))
    layouts = family.layouts(layer)
    expected = {
        name: shape_after(shape, layouts.get(name, ()), counts, after)
        for name, shape in parameter_shapes(layer).items()
    }
    found = parameter_shapes(family.get_layers(pruned)[0])
    if found != expected or len(family.get_layers(pruned)) != depth:
        wrong = next((each for each in {**expected, **found} if expected.get(each) != found.get(each)), LAYERS)
        raise ValueError(
            f"a config of {family.model_type} can't say what the pruned model would be: {wrong} would have shape "
            f"{expected.get(wrong)}, and transformers builds {found.get(wrong)} from it. Nothing was pruned."
        )


def check_result(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Look whether a checkpoint holds just what its config describes.

    Args:
        folder: with config and safetensors files.
        trust_remote_code: run code that the config names.

    Raises:
        RuntimeError: a weight is missing, has another shape, or isn't the model's; names it.
    """
    from transformers import AutoConfig

    trust = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        model = empty_model(AutoConfig.from_pretrained(folder, **trust), torch.float32, **trust)
        checkpoint = Checkpoint.open(folder)
        names = stored_names(model, checkpoint)
    except ValueError as error:
        raise RuntimeError(f"the pruned model can't be loaded by its own config: {error}") from error
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    more = sorted(set(checkpoint.tensors) - set(names.values()) - aliases)
    if more:
        raise RuntimeError(f"the pruned model can't be loaded by its own config: {more[0]} isn't one of its weights.")
