"""What the pruner has to know of a model family, as data."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Fold:
    """Where a scale for each channel can be moved from what makes an activation into what reads it.

    Attributes:
        producers: paths to norms or dense layers that make the activation, channel by channel.
        consumers: paths to the dense layers that read it, and nothing else does.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class FamilySpec:
    """Where a family keeps its parts; the defaults are Llama's names.

    Attributes:
        model_type: `config.model_type` of the family.
        layers: path from the causal LM to its list of decoder layers.
        consumer: path from a decoder layer to the dense layer whose inputs are the FFN's neurons.
        producers: paths to the dense layers that create them, row by row.
        attention: paths to the dense layers that make queries, keys and values.
        folds: where equalization may move scales, as far as the config doesn't forbid it.
        width_field: config field that holds the number of FFN neurons.
        depth_field: config field that holds the number of decoder layers.
        layer_index: paths from a decoder layer to modules with a `layer_idx`.
        per_layer_fields: config fields that are lists with one entry for each layer.
    """

    model_type: str
    layers: str = "model.layers"
    consumer: str = "mlp.down_proj"
    producers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    attention: tuple[str, ...] = _ATTENTION
    folds: tuple[Fold, ...] = (
        Fold(("input_layernorm",), _ATTENTION),
        Fold(("self_attn.v_proj",), ("self_attn.o_proj",)),
        Fold(("post_attention_layernorm",), ("mlp.gate_proj", "mlp.up_proj")),
        Fold(("mlp.up_proj",), ("mlp.down_proj",)),
    )
    width_field: str = "intermediate_size"
    depth_field: str = "num_hidden_layers"
    layer_index: tuple[str, ...] = ("self_attn",)
    per_layer_fields: tuple[str, ...] = ("layer_types",)

    def get_layers(self, model: nn.Module) -> nn.ModuleList:
        """The model's decoder layers."""
        return attrgetter(self.layers)(model)

    def get_consumer(self, layer: nn.Module) -> nn.Linear:
        """The dense layer that reads the FFN's neurons."""
        return attrgetter(self.consumer)(layer)

    def get_producers(self, layer: nn.Module) -> list[nn.Linear]:
        """The dense layers that create the FFN's neurons."""
        return [attrgetter(path)(layer) for path in self.producers]

    def neuron_parameters(self, layer: nn.Module) -> int:
        """Parameters that go with one FFN neuron: a column of the consumer, a row (and bias) of each producer."""
        rows = sum(p.weight.shape[1] + (p.bias is not None) for p in self.get_producers(layer))
        return self.get_consumer(layer).weight.shape[0] + rows


def resize_linear(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Give a dense layer another weight `[d_out, d_in]` (and bias), in its own dtype and on its own device."""
    own = linear.weight
    linear.weight = nn.Parameter(weight.to(own).contiguous(), requires_grad=own.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(own).contiguous(), requires_grad=own.requires_grad)
    linear.out_features, linear.in_features = weight.shape


def apply_to_layer(spec: FamilySpec, layer: nn.Module, kept: torch.Tensor, consumer_weight: torch.Tensor) -> None:
    """Slice one decoder layer's FFN in place.

    Args:
        spec: the family.
        layer: the decoder layer.
        kept: indices of the neurons that stay, ascending, `[k]`.
        consumer_weight: the repaired weight of the consumer, `[d_out, k]`.
    """
    for producer in spec.get_producers(layer):
        rows = kept.to(producer.weight.device)
        bias = None if producer.bias is None else producer.bias.detach()[rows]
        resize_linear(producer, producer.weight.detach()[rows], bias)
    resize_linear(spec.get_consumer(layer), consumer_weight, None)


def apply_to_config(spec: FamilySpec, config: Any, kept_layers: list[int], width: int) -> None:
    """Write the new depth and width into a model's config, and cut its per-layer lists to the layers that stay."""
    for field in spec.per_layer_fields:
        values = getattr(config, field, None)
        if values is not None:
            setattr(config, field, [values[index] for index in kept_layers])
    setattr(config, spec.depth_field, len(kept_layers))
    setattr(config, spec.width_field, width)


def renumber(spec: FamilySpec, layers: nn.ModuleList) -> None:
    """Give every layer the index that its place in the KV cache has."""
    for index, layer in enumerate(layers):
        modules: list[Any] = [layer, *(attrgetter(path)(layer) for path in spec.layer_index)]
        for module in modules:
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
