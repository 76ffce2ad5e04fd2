"""Every supported family, as data; what isn't there is refused by name."""

from __future__ import annotations

from typing import Any

from optimum_comp.families.spec import FFN, HEADS, KV, LAYERS, Axis, Family, Fold, Refusal, Slot


_FIXED_HEADS = "its code takes a head's size from hidden_size / num_attention_heads, which fewer heads would change"


def norm(path: str) -> Slot:
    """A norm."""
    return Slot(path)


def ffn(
    consumer: str,
    *producers: Slot,
    field: str = "intermediate_size",
    norm: str = "",
    transposed: bool = False,
) -> Axis:
    """A feed-forward layer.

    Args:
        consumer: path to the dense layer that reads the neurons.
        producers: the dense layers that make them.
        field: config field with the number of neurons; empty if the code knows it.
        norm: path to a norm behind the consumer.
        transposed: whether the consumer's weight is `[d_in, d_out]`.
    """
    fields = ((FFN, field),) if field else ()
    return Axis(FFN, Slot(consumer, (FFN,), transposed=transposed), producers, fields, norm)


def neurons(path: str, *, transposed: bool = False) -> Slot:
    """A dense layer whose outputs are neurons."""
    return Slot(path, (FFN,), transposed=transposed)


def attention(consumer: str, *producers: Slot, norm: str = "") -> tuple[Axis, Axis]:
    """Key-value groups, and query heads within them, of an attention whose head size is a config field.

    Args:
        consumer: path to the dense layer that reads the heads' outputs.
        producers: what makes queries, keys and values.
        norm: path to a norm behind the consumer.
    """
    reader = Slot(consumer, (HEADS,))
    heads = (HEADS, "num_attention_heads")
    queries = tuple(slot for slot in producers if HEADS in slot.kinds)
    return (
        Axis(KV, reader, producers, (heads, (KV, "num_key_value_heads")), norm),
        Axis(HEADS, reader, queries, (heads,), norm),
    )


QUERIES, KEYS, VALUES = (
    Slot("self_attn.q_proj", (HEADS,)),
    Slot("self_attn.k_proj", (KV,)),
    Slot("self_attn.v_proj", (KV,)),
)
QKV = (QUERIES, KEYS, VALUES)
OUTPUT = Slot("self_attn.o_proj", (HEADS,))
GATE, UP, DOWN = neurons("mlp.gate_proj"), neurons("mlp.up_proj"), neurons("mlp.down_proj")
GATED = ffn("mlp.down_proj", GATE, UP)

PRE_NORM_FOLDS = (
    Fold((norm("input_layernorm"),), QKV),
    Fold((VALUES,), (OUTPUT,)),
    Fold((norm("post_attention_layernorm"),), (GATE, UP)),
    Fold((UP,), (DOWN,)),
)


def llama_like(model_type: str, **differing: Any) -> Family:
    """A family with Llama's names."""
    fields: dict[str, Any] = {"axes": (GATED, *attention("self_attn.o_proj", *QKV)), "folds": PRE_NORM_FOLDS}
    return Family(model_type, **{**fields, **differing})


def _with_norms_behind(model_type: str, folds: tuple[Fold, ...], **differing: Any) -> Family:
    """A family with a norm between each half of a layer and the residual stream."""
    axes = (
        ffn("mlp.down_proj", GATE, UP, norm="post_feedforward_layernorm"),
        *attention("self_attn.o_proj", *QKV, norm="post_attention_layernorm"),
    )
    return Family(model_type, axes, folds, **differing)


_GEMMA_FOLDS = (
    Fold((norm("input_layernorm"),), QKV),
    Fold((VALUES,), (OUTPUT,)),
    Fold((norm("pre_feedforward_layernorm"),), (GATE, UP)),
    Fold((UP,), (DOWN,)),
)

# Phi-3 keeps queries, keys and values in one weight, and gates and neurons in another.
_PHI3_QKV = ("q:heads", "k:kv", "v:kv")
_PHI3_GATE_UP = ("gate:ffn", "up:ffn")


def _attention_is_fixed(*names: str) -> tuple[Refusal, ...]:
    return tuple(Refusal(name, _FIXED_HEADS) for name in names or (KV, HEADS))


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama_like("llama"),
        llama_like("mistral"),
        llama_like("qwen2"),
        llama_like("qwen3"),
        llama_like("smollm3", per_layer_fields=("layer_types", "no_rope_layers")),
        llama_like("granite", multiplier="residual_multiplier"),
        llama_like("gemma"),
        _with_norms_behind("gemma2", _GEMMA_FOLDS),
        _with_norms_behind("gemma3_text", _GEMMA_FOLDS),
        _with_norms_behind(
            "olmo2",
            (Fold((VALUES,), (OUTPUT,)), Fold((UP,), (DOWN,))),
            refusals=tuple(
                Refusal(name, "the norms of its queries and keys span all heads, and fewer would change the rest")
                for name in (KV, HEADS)
            ),
        ),
        llama_like(
            "stablelm",
            axes=(GATED,),
            refusals=_attention_is_fixed(),
        ),
        llama_like(
            "cohere",
            axes=(
                GATED,
                *attention(
                    "self_attn.o_proj",
                    *QKV,
                    # One row for each head.
                    Slot("self_attn.q_norm", (HEADS,), optional=True),
                    Slot("self_attn.k_norm", (KV,), optional=True),
                ),
            ),
            # One norm for both halves of a layer.
            folds=(
                Fold((norm("input_layernorm"),), (*QKV, GATE, UP)),
                Fold((VALUES,), (OUTPUT,)),
                Fold((UP,), (DOWN,)),
            ),
        ),
        Family(
            "phi",
            axes=(ffn("mlp.fc2", neurons("mlp.fc1")), *attention("self_attn.dense", *QKV)),
            folds=(
                Fold((norm("input_layernorm"),), (*QKV, neurons("mlp.fc1"))),
                Fold((VALUES,), (Slot("self_attn.dense", (HEADS,)),)),
            ),
        ),
        Family(
            "phi3",
            axes=(
                ffn("mlp.down_proj", Slot("mlp.gate_up_proj", _PHI3_GATE_UP)),
                *attention("self_attn.o_proj", Slot("self_attn.qkv_proj", _PHI3_QKV)),
            ),
            folds=(
                Fold((norm("input_layernorm"),), (Slot("self_attn.qkv_proj", _PHI3_QKV),)),
                Fold((Slot("self_attn.qkv_proj", _PHI3_QKV, part="v"),), (OUTPUT,)),
                Fold((norm("post_attention_layernorm"),), (Slot("mlp.gate_up_proj", _PHI3_GATE_UP),)),
                Fold((Slot("mlp.gate_up_proj", _PHI3_GATE_UP, part="up"),), (DOWN,)),
            ),
            attention=("self_attn.qkv_proj",),
        ),
        Family(
            "starcoder2",
            axes=(ffn("mlp.c_proj", neurons("mlp.c_fc")), *attention("self_attn.o_proj", *QKV)),
            folds=(
                Fold((norm("input_layernorm"),), QKV),
                Fold((VALUES,), (OUTPUT,)),
                Fold((norm("post_attention_layernorm"),), (neurons("mlp.c_fc"),)),
            ),
        ),
        Family(
            "opt",
            axes=(ffn("fc2", neurons("fc1"), field="ffn_dim"),),
            folds=(
                Fold((norm("self_attn_layer_norm"),), QKV),
                Fold((VALUES,), (Slot("self_attn.out_proj", (HEADS,)),)),
                Fold((norm("final_layer_norm"),), (neurons("fc1"),)),
                Fold((neurons("fc1"),), (neurons("fc2"),)),
            ),
            layers="model.decoder.layers",
            refusals=_attention_is_fixed(),
        ),
        Family(
            "gpt_neox",
            axes=(ffn("mlp.dense_4h_to_h", neurons("mlp.dense_h_to_4h")),),
            folds=(
                Fold((norm("input_layernorm"),), (Slot("attention.query_key_value"),)),
                Fold((norm("post_attention_layernorm"),), (neurons("mlp.dense_h_to_4h"),)),
            ),
            layers="gpt_neox.layers",
            layer_index=("attention",),
            attention=("attention.query_key_value",),
            refusals=_attention_is_fixed(),
        ),
        Family(
            "gpt2",
            axes=(ffn("mlp.c_proj", neurons("mlp.c_fc", transposed=True), field="n_inner", transposed=True),),
            folds=(
                Fold((norm("ln_1"),), (Slot("attn.c_attn", transposed=True),)),
                Fold((norm("ln_2"),), (neurons("mlp.c_fc", transposed=True),)),
            ),
            layers="transformer.h",
            depth_field="n_layer",
            layer_index=("attn",),
            attention=("attn.c_attn",),
            refusals=(
                *_attention_is_fixed(),
                Refusal(
                    LAYERS, "its attention is scaled by the layer's number", when="scale_attn_by_inverse_layer_idx"
                ),
            ),
        ),
        Family(
            "falcon",
            axes=(ffn("mlp.dense_4h_to_h", neurons("mlp.dense_h_to_4h"), field="ffn_hidden_size"),),
            # Which norm feeds what differs by config; those that aren't there, or feed something else, don't hold.
            folds=(
                Fold((norm("ln_attn"),), (Slot("self_attention.query_key_value"),)),
                Fold((norm("ln_mlp"),), (neurons("mlp.dense_h_to_4h"),)),
                Fold(
                    (norm("input_layernorm"),),
                    (Slot("self_attention.query_key_value"), neurons("mlp.dense_h_to_4h")),
                ),
                Fold((norm("input_layernorm"),), (Slot("self_attention.query_key_value"),)),
                Fold((norm("post_attention_layernorm"),), (neurons("mlp.dense_h_to_4h"),)),
            ),
            layers="transformer.h",
            layer_index=("self_attention",),
            attention=("self_attention.query_key_value",),
            refusals=_attention_is_fixed(),
            repeated=("alibi",),
        ),
        Family(
            "bloom",
            axes=(ffn("mlp.dense_4h_to_h", neurons("mlp.dense_h_to_4h"), field=""),),
            folds=(
                Fold((norm("input_layernorm"),), (Slot("self_attention.query_key_value"),)),
                Fold((norm("post_attention_layernorm"),), (neurons("mlp.dense_h_to_4h"),)),
            ),
            layers="transformer.h",
            depth_field="n_layer",
            layer_index=("self_attention",),
            attention=("self_attention.query_key_value",),
            refusals=(
                *_attention_is_fixed(),
                Refusal(FFN, "its code makes every feed-forward layer four times as wide as the hidden states"),
            ),
            repeated=("alibi",),
        ),
    )
}

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")

_REFUSED = {
    "gemma3": "it reads images, too; save its language model as a Gemma3ForCausalLM (gemma3_text) and give that",
    "mamba": "it has no attention and no feed-forward layers",
    "mamba2": "it has no attention and no feed-forward layers",
    "falcon_mamba": "it has no attention and no feed-forward layers",
    "rwkv": "it is a recurrent network",
    "gemma3n": "its layers add to several residual streams at once",
    "gptj": "its attention and feed-forward layer have not been described; see docs/extending/family.md",
    "gpt_neo": "its attention and feed-forward layer have not been described; see docs/extending/family.md",
}


def family_of(config: Any) -> Family:
    """The family of a model, by its config.

    Raises:
        ValueError: there is none for this `model_type`, or it isn't a decoder-only language model; says why.
    """
    model_type = getattr(config, "model_type", None)
    supported = ", ".join(sorted(FAMILIES))
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model_type={model_type!r} is an encoder-decoder model; COMP prunes decoder-only language models "
            f"({supported})."
        )
    experts = next((field for field in _EXPERTS if (getattr(config, field, None) or 0) > 1), None)
    if experts is not None:
        raise ValueError(
            f"model_type={model_type!r} is a mixture of experts ({experts}={getattr(config, experts)}); COMP prunes "
            f"models with one feed-forward layer for all tokens ({supported})."
        )
    if model_type in _REFUSED:
        raise ValueError(f"model_type={model_type!r} can't be pruned: {_REFUSED[model_type]}.")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} has no family spec; supported: {supported}. A spec is some 20 lines: "
            "docs/extending/family.md."
        )
    return FAMILIES[model_type]
