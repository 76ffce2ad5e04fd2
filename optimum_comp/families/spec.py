"""What the pruner has to know of a model family, as data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from optimum_comp.core.surgery import Counts, Layout, shape_after


FFN, KV, HEADS, LAYERS = "ffn", "kv", "heads", "layers"
"""What may go: neurons, key-value groups with their query heads, query heads within groups; whole layers."""


@dataclass(frozen=True)
class Slot:
    """A norm or a dense layer, and which of its channels are meant.

    Attributes:
        path: from the decoder layer.
        parts: what its rows are, part by part, as `"name:kind"` or, of an only part, `"kind"`; of a consumer, its
            columns. Empty if they are of no unit.
        part: name of the part that is meant; all if empty.
        transposed: the weight is `[d_in, d_out]`, as GPT-2's `Conv1D` has it.
        optional: some configs do without it.
    """

    path: str
    parts: tuple[str, ...] = ()
    part: str = ""
    transposed: bool = False
    optional: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of unit of each part."""
        return tuple(part.rpartition(":")[2] for part in self.parts)

    @property
    def rows(self) -> int:
        """The weight's dimension of output channels."""
        return 1 if self.transposed else 0

    @property
    def columns(self) -> int:
        """The weight's dimension of input channels."""
        return 1 - self.rows

    def is_in(self, layer: nn.Module) -> bool:
        """Whether a layer has it."""
        module: Any = layer
        for name in self.path.split("."):
            module = getattr(module, name, None)
        return getattr(module, "weight", None) is not None

    def module(self, layer: nn.Module) -> Any:
        """The norm or dense layer itself."""
        return layer.get_submodule(self.path)

    def matrix(self, layer: nn.Module) -> Tensor:
        """A dense layer's weight, `[d_out, d_in]`; a view of it."""
        return self.turned(self.module(layer).weight)

    def turned(self, weight: Tensor) -> Tensor:
        """A weight as `[d_out, d_in]` from the way it is stored, and the other way round."""
        return weight.T if self.transposed else weight

    @property
    def kind_meant(self) -> str:
        """The kind of unit of the part that is meant."""
        return next(
            kind for part, kind in zip(self.parts, self.kinds, strict=True) if part.startswith(f"{self.part}:")
        )

    def rows_meant(self, size: int, counts: Counts) -> slice:
        """Which of its output channels are meant.

        Args:
            size: how many there are.
            counts: units of each kind.
        """
        if not self.part:
            return slice(0, size)
        names = [part.partition(":")[0] for part in self.parts]
        return Layout(self.rows, self.kinds).parts(size, counts)[names.index(self.part)]


@dataclass(frozen=True)
class Axis:
    """One prunable size: units that one dense layer reads, and what creates them.

    Attributes:
        name: `ffn`, `kv` or `heads`.
        consumer: the dense layer whose inputs the units are; it is repaired when some go.
        producers: the dense layers, and norms of single units, whose output channels go with them.
        fields: config fields that hold how many there are, by kind of unit.
        norm: path to a norm behind the consumer, before the residual stream; empty if there is none.
    """

    name: str
    consumer: Slot
    producers: tuple[Slot, ...]
    fields: tuple[tuple[str, str], ...]
    norm: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units that go."""
        return (KV, HEADS) if self.name == KV else (self.name,)


@dataclass(frozen=True)
class Fold:
    """Where a scale for each channel can be moved from what makes an activation into what reads it.

    Attributes:
        producers: norms or dense layers that make the activation, channel by channel.
        consumers: the dense layers that read it, and nothing else does.
    """

    producers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]

    def is_in(self, layer: nn.Module) -> bool:
        """Whether a layer has all of it; which norms there are differs by config."""
        return all(slot.is_in(layer) for slot in (*self.producers, *self.consumers))

    def __str__(self) -> str:
        """`a -> b, c`."""
        from_, to = (", ".join(slot.path for slot in slots) for slots in (self.producers, self.consumers))
        return f"{from_} -> {to}"


@dataclass(frozen=True)
class Refusal:
    """What can't be pruned, and why.

    Attributes:
        what: an axis' name, or `layers`.
        reason: said to the user.
        when: config field that has to be true for it; always if empty.
    """

    what: str
    reason: str
    when: str = ""


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts.

    Attributes:
        model_type: `config.model_type` of the family.
        axes: its prunable sizes; `ffn` is always among them, since it stands in for removed layers, too.
        folds: where equalization may move scales, as far as the layer's function allows.
        layers: path from the causal LM to its list of decoder layers.
        depth_field: config field that holds the number of decoder layers.
        per_layer_fields: config fields that are lists with one entry for each layer.
        layer_index: paths from a decoder layer to modules with a `layer_idx`.
        attention: paths to the dense layers that make queries, keys and values.
        multiplier: config field with a factor that everything a layer adds to the residual stream is multiplied by.
        refusals: what can't be pruned.
        repeated: keyword arguments of a decoder layer that have a row for every sample's head.
    """

    model_type: str
    axes: tuple[Axis, ...]
    folds: tuple[Fold, ...]
    layers: str = "model.layers"
    depth_field: str = "num_hidden_layers"
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    layer_index: tuple[str, ...] = ("self_attn",)
    attention: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    multiplier: str = ""
    refusals: tuple[Refusal, ...] = ()
    repeated: tuple[str, ...] = ()

    def axis(self, name: str) -> Axis:
        """An axis by its name.

        Raises:
            KeyError: the family hasn't declared it.
        """
        return next(axis for axis in self.axes if axis.name == name)

    @property
    def ffn(self) -> Axis:
        """The feed-forward layer's neurons."""
        return self.axis(FFN)

    def refusal(self, what: str, config: Any) -> str | None:
        """Why an axis (or `layers`) can't be pruned in a model with this config; `None` if it can.

        Args:
            what: an axis' name, or `layers`.
            config: the model's; `None` for what holds for all of the family.
        """
        for refusal in self.refusals:
            if refusal.what == what and (not refusal.when or getattr(config, refusal.when, False)):
                return refusal.reason
        if what != LAYERS and all(axis.name != what for axis in self.axes):
            return "it has none that could be pruned"
        heads = self._heads(config)
        if what == KV and heads and heads[KV] == 1:
            return "there is one group, and one has to stay"
        if what == HEADS and heads and heads[HEADS] == heads[KV]:
            return "every group has one head; kv removes it with its group"
        return None

    def get_layers(self, model: nn.Module) -> nn.ModuleList:
        """The model's decoder layers."""
        return attrgetter(self.layers)(model)

    def counts(self, config: Any, layer: nn.Module) -> dict[str, int]:
        """How many units of each kind a decoder layer has.

        Args:
            config: the model's.
            layer: the decoder layer; its weights may be on the meta device.
        """
        return {FFN: self.ffn.consumer.matrix(layer).shape[1], **self._heads(config)}

    def _heads(self, config: Any) -> dict[str, int]:
        """Query heads and key-value groups; nothing if no axis says how they are counted, or no config."""
        fields = next((dict(axis.fields) for axis in self.axes if axis.name == KV), {})
        heads = getattr(config, fields.get(HEADS, ""), None)
        return {} if heads is None else {HEADS: heads, KV: getattr(config, fields[KV], None) or heads}

    def layouts(self, layer: nn.Module) -> dict[str, list[Layout]]:
        """Name of each of a layer's parameters that units go from -> how it is laid out."""
        found: dict[str, list[Layout]] = {}
        for slot, is_consumer in self._slots():
            if slot.optional and not slot.is_in(layer):
                continue
            module = slot.module(layer)
            layout = Layout(slot.columns if is_consumer else slot.rows, slot.kinds)
            _add(found, f"{slot.path}.weight", layout if module.weight.dim() > 1 else Layout(0, slot.kinds))
            if not is_consumer and getattr(module, "bias", None) is not None:
                _add(found, f"{slot.path}.bias", Layout(0, slot.kinds))
        return found

    def _slots(self) -> Iterator[tuple[Slot, bool]]:
        for axis in self.axes:
            yield axis.consumer, True
            for producer in axis.producers:
                yield producer, False

    def layer_parameters(self, config: Any, layer: nn.Module, after: Counts) -> int:
        """Parameters of a decoder layer with so many units of each kind left (all of those that aren't named)."""
        counts, layouts = self.counts(config, layer), self.layouts(layer)
        return sum(
            math.prod(shape_after(parameter.shape, layouts.get(name, ()), counts, after))
            for name, parameter in layer.named_parameters()
        )


def _add(found: dict[str, list[Layout]], name: str, layout: Layout) -> None:
    known = found.setdefault(name, [])
    if layout not in known:
        known.append(layout)


def renumber(family: Family, layers: nn.ModuleList) -> None:
    """Give every layer the index that its place in the KV cache has."""
    for index, layer in enumerate(layers):
        modules: list[Any] = [layer, *(attrgetter(path)(layer) for path in family.layer_index)]
        for module in modules:
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
