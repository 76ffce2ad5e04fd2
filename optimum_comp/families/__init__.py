"""Model families: one declarative spec each, found by `config.model_type`."""

from __future__ import annotations

from typing import Any

from optimum_comp.families.spec import FamilySpec, Fold, apply_to_config, apply_to_layer, renumber


FAMILIES: dict[str, FamilySpec] = {
    spec.model_type: spec
    for spec in (
        FamilySpec("llama"),
        FamilySpec("mistral"),
        FamilySpec("qwen2"),
        FamilySpec(
            "opt",
            layers="model.decoder.layers",
            consumer="fc2",
            producers=("fc1",),
            folds=(
                Fold(("self_attn_layer_norm",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                Fold(("self_attn.v_proj",), ("self_attn.out_proj",)),
                Fold(("final_layer_norm",), ("fc1",)),
                Fold(("fc1",), ("fc2",)),
            ),
            width_field="ffn_dim",
        ),
    )
}


def family_of(config: Any) -> FamilySpec:
    """The spec for a model's config.

    Raises:
        ValueError: no family has this `model_type`, or the model isn't a decoder-only language model.
    """
    model_type = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model_type={model_type!r} is an encoder-decoder model; COMP prunes decoder-only language models "
            f"({', '.join(sorted(FAMILIES))})."
        )
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} has no family spec; supported: {', '.join(sorted(FAMILIES))}. "
            "A spec is a few lines in optimum_comp/families/__init__.py."
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "FamilySpec", "Fold", "apply_to_config", "apply_to_layer", "family_of", "renumber"]
