"""The coarse step on a real model: every decoder layer's score, from whole forward passes with hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_comp.activations import first
from optimum_comp.core.layer_scores import CosineDistance, next_token_loss
from optimum_comp.utils import progress_disabled


_LOSS_SAMPLES = 8
"""The loss metric runs the model once for each layer; on this many samples, to bound its cost."""


def cosine_scores(model: nn.Module, layers: nn.ModuleList, batches: list[Tensor]) -> list[float]:
    """`1 − cos(input, output)` of each layer, averaged over tokens, from one forward pass."""
    distances = [CosineDistance() for _ in layers]

    def observe(distance: CosineDistance) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            distance.update(args[0] if args else kwargs["hidden_states"], first(output))

        return hook

    pairs = zip(layers, distances, strict=True)
    hooks = [layer.register_forward_hook(observe(distance), with_kwargs=True) for layer, distance in pairs]
    try:
        for batch in tqdm(batches, desc="Scoring layers", unit="batch", disable=progress_disabled()):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [distance.value() for distance in distances]


def loss_scores(model: nn.Module, layers: nn.ModuleList, batches: list[Tensor]) -> list[float]:
    """Mean next-token loss (nats) with each layer skipped in turn."""
    tokens = torch.cat(batches)[:_LOSS_SAMPLES]

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    scores = []
    for layer in tqdm(layers, desc="Scoring layers", unit="layer", disable=progress_disabled()):
        hook = layer.register_forward_hook(skip, with_kwargs=True)
        try:
            loss, count = 0.0, 0
            for sample in tokens.split(1):
                total, predictions = next_token_loss(model(input_ids=sample, use_cache=False).logits, sample)
                loss, count = loss + total, count + predictions
        finally:
            hook.remove()
        scores.append(loss / count)
    return scores


LAYER_SCORES: dict[str, Callable[[nn.Module, nn.ModuleList, list[Tensor]], list[float]]] = {
    "cosine": cosine_scores,
    "loss": loss_scores,
}
"""`(model, decoder layers, token batches [batch, length]) -> a score a layer`; low scores go first."""
