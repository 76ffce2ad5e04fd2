"""Cutting a decoder layer: its modules in place, for a while or for good, or its tensors one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_comp.core.surgery import Counts, Kept, cut, fill
from optimum_comp.families.catalogue import family_of
from optimum_comp.families.spec import FFN, HEADS, KV, Axis, Family


WIDTHS_FIELD = "comp_widths"
"""Field of a pruned model's config: how many neurons of each layer aren't zeros. Nothing reads it to run the model."""
_MULTIPLE = 32
"""Widths stay multiples of a block of weights, where they are: kernels are slow with others."""


@dataclass(frozen=True)
class Cut:
    """What goes from a decoder layer along one axis, and what its consumer becomes.

    Attributes:
        axis: the axis.
        counts: units of each kind before.
        kept: units of the axis' kinds that stay, ascending.
        weight: the consumer's repaired weight, `[d_out, channels that stay]`; as it was, cut, if `None`.
    """

    axis: Axis
    counts: Counts
    kept: Kept
    weight: Tensor | None = None

    @property
    def after(self) -> dict[str, int]:
        """Units of each kind afterwards."""
        return {**self.counts, **{kind: len(units) for kind, units in self.kept.items()}}


def groups_kept(groups: Tensor, counts: Counts) -> dict[str, Tensor]:
    """Key-value groups that stay, with their query heads.

    Args:
        groups: indices, ascending.
        counts: heads and groups before.
    """
    each = counts[HEADS] // counts[KV]
    return {KV: groups, HEADS: (groups[:, None] * each + torch.arange(each)).flatten()}


def cut_parameter(family: Family, layer: nn.Module, name: str, value: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """One of a decoder layer's parameters after several cuts, in its own dtype.

    Args:
        family: the family.
        layer: the dense layer; only its modules are looked at.
        name: of the parameter.
        value: the dense parameter.
        cuts: in the order in which they were found.
    """
    layouts = family.layouts(layer).get(name, ())
    for each in cuts:
        consumer = each.axis.consumer
        if each.weight is not None and name == f"{consumer.path}.weight":
            value = consumer.turned(each.weight).to(value)
        else:
            value = cut(value, layouts, each.counts, each.kept)
    return value


def cut_layer(family: Family, config: Any, layer: nn.Module, cuts: Sequence[Cut]) -> None:
    """Cut a decoder layer in place, for good; its config is left as it is."""
    if cuts:
        _Surgeon(family, config, layer).cut(cuts, with_config=False)


def fill_parameter(family: Family, layer: nn.Module, name: str, value: Tensor, counts: Counts, room: Counts) -> Tensor:
    """One of a decoder layer's parameters with zeros for units that it doesn't have, which change nothing.

    Args:
        family: the family.
        layer: the dense layer; only its modules are looked at.
        name: of the parameter.
        value: the parameter.
        counts: units of each kind that it has.
        room: units that it is to have, of the kinds that grow.
    """
    return fill(value, family.layouts(layer).get(name, ()), counts, room)


def fill_layer(family: Family, config: Any, layer: nn.Module, counts: Counts, room: Counts) -> None:
    """The same for a decoder layer in place; its config is left as it is."""
    _Surgeon(family, config, layer).fill(counts, room)


def dead_units(family: Family, model: Any) -> list[Tensor]:
    """Of each layer, which neurons nothing is made of, `[neurons]`: their columns of their consumer are all zero."""
    return [family.ffn.consumer.matrix(layer).detach().eq(0).all(0).cpu() for layer in family.get_layers(model)]


def drop_dead_units(family: Family, model: Any) -> list[int]:
    """Take out neurons that nothing is made of (see `dead_units`), down to a multiple of a block of weights.

    The model computes the same; its layers then may have different widths, which its config can't say.

    Args:
        family: the family.
        model: a causal language model with its weights; changed.

    Returns:
        Each layer's width afterwards.
    """
    widths = []
    for layer, dead in zip(family.get_layers(model), dead_units(family, model), strict=True):
        counts, alive = family.counts(model.config, layer), ~dead
        keep = min(len(alive), max(1, -(-int(alive.sum()) // _MULTIPLE)) * _MULTIPLE)
        # Those that are alive, and the first others that a multiple has room for.
        kept = torch.argsort(alive, descending=True, stable=True)[:keep].sort().values
        if keep < len(alive):
            cut_layer(family, model.config, layer, [Cut(family.ffn, counts, {FFN: kept})])
        widths.append(keep)
    return widths


def fill_up(family: Family, model: Any, widths: Sequence[int]) -> None:
    """Give layers back the neurons of zeros that `drop_dead_units` took out, behind the others.

    Args:
        family: the family.
        model: the model; changed.
        widths: what each layer is to have.
    """
    for layer, width in zip(family.get_layers(model), widths, strict=True):
        counts = family.counts(model.config, layer)
        if counts[FFN] < width:
            fill_layer(family, model.config, layer, counts, {FFN: width})


def filled_parameters(model: Any) -> int:
    """Parameters of neurons of zeros that fill up a pruned model's layers, as its config tells."""
    widths = getattr(model.config, WIDTHS_FIELD, None)
    if not widths:
        return 0
    family = family_of(model.config)
    config, layer = model.config, family.get_layers(model)[0]
    whole = family.layer_parameters(config, layer, {})
    return sum(whole - family.layer_parameters(config, layer, {FFN: width}) for width in widths)


@contextlib.contextmanager
def cut_meanwhile(family: Family, config: Any, layer: nn.Module, cuts: Sequence[Cut]) -> Iterator[None]:
    """A decoder layer, and the config that its code looks at, cut inside the block."""
    surgeon = _Surgeon(family, config, layer)
    try:
        if cuts:
            surgeon.cut(cuts, with_config=True)
        yield
    finally:
        surgeon.undo()


_HEAD_ATTRIBUTES = {
    "num_heads": HEADS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "num_kv_heads": KV,
}


class _Surgeon:
    """Changes modules, and knows how to change them back."""

    def __init__(self, family: Family, config: Any, layer: nn.Module):
        self._family, self._config, self._layer = family, config, layer
        self._before: list[tuple[Any, str, Any]] = []

    def fill(self, counts: Counts, room: Counts) -> None:
        self._replace(lambda name, value: fill_parameter(self._family, self._layer, name, value, counts, room))

    def _replace(self, changed: Callable[[str, Tensor], Tensor]) -> None:
        """Put other values in the place of all parameters that units go from."""
        family, layer = self._family, self._layer
        values = {
            name: changed(name, parameter.detach())
            for name, parameter in layer.named_parameters()
            if name in family.layouts(layer)
        }
        for name, value in values.items():
            path, _, kind = name.rpartition(".")
            module = layer.get_submodule(path)
            old = getattr(module, kind)
            self._set(module, kind, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))
            if kind == "weight" and value.dim() == 2:
                self._resize(module, value)

    def cut(self, cuts: Sequence[Cut], *, with_config: bool) -> None:
        layer = self._layer
        self._replace(lambda name, value: cut_parameter(self._family, layer, name, value, cuts))
        after = cuts[-1].after
        if any(KV in each.kept or HEADS in each.kept for each in cuts):
            for module in layer.modules():
                for name, kind in _HEAD_ATTRIBUTES.items():
                    if isinstance(getattr(module, name, None), int):
                        self._set(module, name, after[kind])
                if isinstance(getattr(module, "num_key_value_groups", None), int):
                    self._set(module, "num_key_value_groups", after[HEADS] // after[KV])
        if with_config:
            for each in cuts:
                for kind, field in each.axis.fields:
                    self._set(self._config, field, after[kind])

    def undo(self) -> None:
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)
        self._before.clear()

    def _resize(self, module: nn.Module, weight: Tensor) -> None:
        """Numbers that dense layers keep of their sizes."""
        if isinstance(module, nn.Linear):
            self._set(module, "out_features", weight.shape[0])
            self._set(module, "in_features", weight.shape[1])
        elif hasattr(module, "nf"):
            self._set(module, "nx", weight.shape[0])
            self._set(module, "nf", weight.shape[1])

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


def apply_to_config(family: Family, config: Any, kept_layers: Sequence[int], counts: Counts, after: Counts) -> None:
    """Write depth and sizes of the pruned model into its config, and cut lists with an entry for each layer.

    Args:
        family: the family.
        config: the dense model's; changed.
        kept_layers: layers that stay.
        counts: units of each kind before.
        after: those that stay, of each kind that was cut.
    """
    for field in family.per_layer_fields:
        values = getattr(config, field, None)
        if values is not None:
            setattr(config, field, [values[index] for index in kept_layers])
    setattr(config, family.depth_field, len(kept_layers))
    heads = counts.get(HEADS, 0)
    if heads and after.get(HEADS, heads) != heads and getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // heads
    for axis in family.axes:
        for kind, field in axis.fields:
            if kind in after:
                setattr(config, field, after[kind])


def parameter_shapes(module: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of each of a module's parameters, shared ones once."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
