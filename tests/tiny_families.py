"""A tiny random model of every family, in the shapes that its config allows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FFN = {"intermediate_size": 96}
GQA = {**FFN, "num_key_value_heads": 2}
MHA = {**FFN, "num_key_value_heads": 4}
# Alternating, so that a list that is cut at the wrong place makes another model.
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]

# Where a config has a field for it, heads are such that no two of a layer's sizes are the same: a slice of the wrong
# dimension doesn't fit.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**GQA, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {**GQA, "head_dim": 20, "attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {**GQA, "head_dim": 36}),
    "mistral": ("mistral", {**GQA, "sliding_window": 8, "head_dim": 28}),
    "qwen2": (
        "qwen2",
        {**GQA, "head_dim": 20, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
    ),
    "qwen3": ("qwen3", {**GQA, "head_dim": 28}),
    "smollm3": ("smollm3", {**GQA, "head_dim": 36, "no_rope_layers": [1, 0, 1, 1], "use_sliding_window": False}),
    "granite": (
        "granite",
        {**GQA, "head_dim": 20, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.3},
    ),
    "gemma": ("gemma", {**GQA, "head_dim": 28}),
    "gemma2": (
        "gemma2",
        {**GQA, "head_dim": 36, "query_pre_attn_scalar": 32, "sliding_window": 8, "layer_types": TYPES},
    ),
    "gemma3": (
        "gemma3_text",
        {**GQA, "head_dim": 28, "query_pre_attn_scalar": 32, "sliding_window": 8, "layer_types": TYPES},
    ),
    "gemma3-one-group": (
        "gemma3_text",
        {**GQA, "num_key_value_heads": 1, "head_dim": 36, "sliding_window": 8, "layer_types": TYPES},
    ),
    "olmo2": ("olmo2", GQA),
    "stablelm": ("stablelm", MHA),
    "stablelm-parallel": ("stablelm", {**GQA, "use_parallel_residual": True, "use_qkv_bias": True}),
    "cohere": ("cohere", {**GQA, "head_dim": 20}),
    "cohere-norms": ("cohere", {**GQA, "head_dim": 28, "use_qk_norm": True}),
    "phi": ("phi", MHA),
    "phi-groups": ("phi", {**GQA, "head_dim": 20}),
    "phi3": ("phi3", {**GQA, "head_dim": 20, "sliding_window": None}),
    "starcoder2": ("starcoder2", {**GQA, "head_dim": 36, "sliding_window": None}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-350m": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", FFN),
    "gpt_neox-sequential": ("gpt_neox", {**FFN, "use_parallel_residual": False}),
    "gpt2": ("gpt2", {"n_inner": 96, "n_positions": 120}),
    "gpt2-default-width": ("gpt2", {"n_positions": 120}),
    "falcon": ("falcon", {"ffn_hidden_size": 96, "bias": True}),
    "falcon-alibi": (
        "falcon",
        {"ffn_hidden_size": 96, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon-new": (
        "falcon",
        {"ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 4},
    ),
    "bloom": ("bloom", {}),
}


def tiny_config(name: str) -> Any:
    model_type, fields = CONFIGS[name]
    # Odd, so no other size, and another for each model; none below what `tiny_blocks` draws from.
    vocabulary = 131 + 2 * list(CONFIGS).index(name)
    return CONFIG_MAPPING[model_type](vocab_size=vocabulary, **{**SIZES, **IDS, **fields})


def tiny_family(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    # Random norms and biases too: freshly made ones are alike, and a slice of the wrong rows wouldn't show.
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in key or ".ln_" in key:
            parameter.data += torch.randn_like(parameter) * 0.1
    return model.eval()
