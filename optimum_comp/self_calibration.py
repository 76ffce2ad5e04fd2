"""Calibration text that the model writes itself, so that nothing has to be downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_comp.utils import progress_disabled


_BATCH = 32
"""Samples written side by side: enough to keep the processor busy, few enough for their KV cache."""
_TOP_P = 0.95
_TEMPERATURE = 1.0


@torch.no_grad()
def write_text(
    model: Any,
    tokenizer: Any,
    num_samples: int,
    sequence_length: int,
    seed: int,
    *,
    temperature: float = _TEMPERATURE,
    top_p: float = _TOP_P,
) -> Tensor:
    """Sample text from the model, starting each sample from its own begin- or end-of-text token.

    The start token isn't part of the blocks. The end-of-text token can't be sampled, so every block is full.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, or `None` (then the ids in the model's config are used).
        num_samples: blocks.
        sequence_length: tokens of a block.
        seed: of the sampling; the global random state is left as it was.
        temperature: of the sampling.
        top_p: nucleus of the sampling.

    Returns:
        `[num_samples, sequence_length]`, int64.
    """
    from transformers import GenerationConfig

    start = _start_token(model, tokenizer)
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        min_new_tokens=sequence_length,
        max_new_tokens=sequence_length,
        eos_token_id=getattr(model.generation_config, "eos_token_id", None),
        # Never written, since no sample ends early; another token than the first, which transformers would take for
        # padding on the wrong side.
        pad_token_id=0 if start else 1,
    )
    blocks = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        steps = range(0, num_samples, _BATCH)
        for first in tqdm(steps, desc="Writing calibration text", unit="batch", disable=progress_disabled()):
            prompt = torch.full((min(_BATCH, num_samples - first), 1), start, device=model.device)
            written = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, use_cache=True
            )
            blocks.append(written[:, 1:].cpu())
    return torch.cat(blocks)


def _start_token(model: nn.Module, tokenizer: Any) -> int:
    """The token that text begins after: begin-of-text, else end-of-text, else padding."""
    for holder in (tokenizer, model.generation_config, model.config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(holder, name, None)
            if isinstance(token, list) and token:
                token = token[0]
            if isinstance(token, int):
                return token
    raise ValueError(
        'calibration="self" needs a begin- or end-of-text token, and neither tokenizer nor config names one; give '
        "calibration text instead."
    )
