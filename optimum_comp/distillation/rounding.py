"""Training with weights as a recipe will round them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from optimum_comp.core.gram import GramAccumulator
from optimum_comp.core.rounding import Blocks, compensated, straight_through, within_its_codes
from optimum_comp.families import Family
from optimum_comp.onnx.recipes import RECIPES, Format
from optimum_comp.utils import progress_disabled


class Rounded(nn.Module):
    """A weight's parametrization: forward it is rounded in blocks, backward it isn't.

    Args:
        blocks: how the weight is rounded to begin with; the scales stay.
    """

    def __init__(self, blocks: Blocks):
        super().__init__()
        self.bits, self.block_size = blocks.bits, blocks.block_size
        self.scales: Tensor
        self.register_buffer("scales", blocks.scales.float())

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight."""
        return straight_through(weight, self.scales, self.bits, self.block_size)


class _Tied(nn.Module):
    """A head's parametrization: its weight is the embedding's, whatever that is.

    Args:
        embedding: whose weight it is; it isn't a part of the head.
    """

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self._embedding = (embedding,)

    def forward(self, nothing: Tensor) -> Tensor:
        """The embedding's weight."""
        return cast(Tensor, self._embedding[0].weight)


def rounds_head(recipe: str | None) -> bool:
    """Whether a recipe stores the head, and an embedding that is tied to it, in few bits."""
    head = None if recipe is None else RECIPES[recipe].head
    return head is not None and head.bits < 8


def few_bits(model: Any, family: Family, recipe: str) -> Iterator[tuple[nn.Linear, Format]]:
    """The dense layers that a recipe stores in few bits, and how; those in 8 bits lose next to nothing."""
    chosen = RECIPES[recipe]
    assert chosen.layers is not None
    left = set(family.attention) if chosen.attention is not None else set()
    for layer in family.get_layers(model):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear) and path not in left:
                yield module, chosen.layers.fitted(module.in_features)
    head = model.get_output_embeddings()
    if rounds_head(recipe) and isinstance(head, nn.Linear):
        assert chosen.head is not None
        yield head, chosen.head.fitted(head.in_features)


@torch.no_grad()
def round_while_training(model: Any, family: Family, recipe: str, samples: Tensor) -> None:
    """Put the rounding of a recipe on the weights that it stores in few bits.

    It begins with the codes that change the layers' outputs least (see `core.rounding`), whose error the training has
    to make good. Weights begin at the edge of their code's range that
    is nearest to what they were, so that little is needed for another code.

    Args:
        model: in float.
        family: the model's.
        recipe: a name in `RECIPES`, of few bits.
        samples: text that the rounding looks at, `[samples, length]`.
    """
    modules = list(few_bits(model, family, recipe))
    sums = {module: GramAccumulator(module.in_features, dtype=torch.float32) for module, _ in modules}
    hooks = [module.register_forward_pre_hook(_adder(sums[module])) for module, _ in modules]
    try:
        for sample in tqdm(samples.split(1), desc="Calibrating", unit="sample", disable=progress_disabled()):
            model(input_ids=sample.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for module, form in tqdm(modules, desc="Rounding", unit="matrix", disable=progress_disabled()):
        weight = module.weight.detach().float()
        blocks = compensated(weight.cpu(), sums.pop(module).value(), form.bits, form.block_size)
        module.weight.copy_(within_its_codes(weight.cpu(), blocks))
        rounded = Rounded(blocks).to(module.weight.device)
        embedding = model.get_input_embeddings()
        if embedding.weight is module.weight:
            parametrize.register_parametrization(embedding, "weight", rounded)
            module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
            # Unsafe: another shape than the parameter, of which there is none.
            parametrize.register_parametrization(module, "weight", _Tied(embedding), unsafe=True)
        else:
            parametrize.register_parametrization(module, "weight", rounded)


def _adder(total: GramAccumulator) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total.update(inputs[0])

    return add


def leave_rounded(model: Any) -> None:
    """Make the rounded weights the model's own: what is saved lies on the grid that the recipe will find."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and parametrize.is_parametrized(module):
            made_by = cast(nn.ModuleDict, module.parametrizations)["weight"]
            is_tied = isinstance(cast(nn.ModuleList, made_by)[0], _Tied)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=not is_tied)
    model.tie_weights()
