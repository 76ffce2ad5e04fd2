"""A decoder's graph in ONNX Runtime alone, for where Optimum's class for it can't be installed (transformers 5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimum_comp.onnx.cache import PAST, PRESENT
from optimum_comp.onnx.folders import MODEL_NAME
from optimum_comp.onnx.runtime import GraphRunner


@dataclass(frozen=True)
class Step:
    """What a run of the graph gives.

    Attributes:
        logits: `[sequences, tokens, vocabulary]`.
        past_key_values: name of the input -> what a layer has cached, for the tokens that follow.
    """

    logits: Tensor
    past_key_values: dict[str, Any]


@dataclass(frozen=True)
class Generated:
    """What `generate` has made, with its steps.

    Attributes:
        sequences: prompts and answers, `[sequences, length]`.
        logits: of each step, `[sequences, vocabulary]`.
    """

    sequences: Tensor
    logits: tuple[Tensor, ...]


class PlainModel:
    """As much of a causal language model of transformers as comparing and measuring needs.

    Args:
        folder: holds `model.onnx` and `config.json`.
        threads: threads inside an operator; `None` leaves ONNX Runtime's default.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | Path, threads: int | None = None):
        from transformers import AutoConfig, GenerationConfig

        self.config = AutoConfig.from_pretrained(folder)
        named = (Path(folder) / "generation_config.json").is_file()
        self.generation_config = GenerationConfig.from_pretrained(folder) if named else GenerationConfig()
        self._runner = GraphRunner(Path(folder) / MODEL_NAME, threads)
        self._outputs = ["logits", *(name.replace(PAST, PRESENT, 1) for name in self._runner.cache_names)]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: dict[str, Any] | None = None,
        *,
        use_cache: bool = True,
    ) -> Step:
        """Logits of tokens that follow those in the cache.

        Args:
            input_ids: `[sequences, tokens]`.
            attention_mask: `[sequences, tokens and what is in the cache]`.
            past_key_values: of an earlier step; nothing is in the cache if not given.
            use_cache: whether the result holds a cache.
        """
        start = attention_mask.shape[1] - input_ids.shape[1]
        given = {"attention_mask": attention_mask.numpy(), **(past_key_values or {})}
        if "position_ids" in self._runner.input_names:
            # As `generate` of transformers makes them.
            positions = (attention_mask.cumsum(1) - 1).masked_fill(attention_mask == 0, 1)
            given["position_ids"] = positions[:, start:].numpy()
        outputs = self._outputs if use_cache else self._outputs[:1]
        logits, *cache = self._runner.run(input_ids.numpy(), outputs, given, start=start)
        return Step(torch.from_numpy(logits), dict(zip(self._runner.cache_names, cache, strict=False)))

    __call__ = forward

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any = None, **settings: Any
    ) -> Tensor | Generated:
        """The likeliest token after each, without penalties.

        Args:
            input_ids: prompts, `[sequences, tokens]`, padded on the left if at all.
            attention_mask: 0 where there is padding.
            generation_config: of transformers.
            settings: in place of its fields. Of them all, numbers of tokens, tokens that end an answer, padding and
                whether steps are given, too, are looked at.

        Returns:
            Prompts and answers `[sequences, length]`; with `return_dict_in_generate`, the steps beside them.

        Raises:
            ValueError: sampling or beams are asked for.
        """
        chosen = {**(generation_config or self.generation_config).to_dict(), **settings}
        if chosen.get("do_sample") or (chosen.get("num_beams") or 1) > 1:
            raise ValueError(
                "in plain ONNX Runtime only greedy generation is possible (do_sample=False, num_beams=1)."
            )
        ends = chosen.get("eos_token_id")
        stops = torch.tensor([] if ends is None else ends).flatten()
        padding = chosen.get("pad_token_id") or 0
        sequences, mask, step = input_ids, attention_mask, input_ids
        past: dict[str, Any] | None = None
        going = torch.ones(len(input_ids), dtype=torch.bool)
        logits: list[Tensor] = []
        least = chosen.get("min_new_tokens") or 0
        for count in range(chosen.get("max_new_tokens") or 20):
            found = self.forward(step, mask, past)
            past, scores = found.past_key_values, found.logits[:, -1]
            logits.append(scores)
            if count < least:
                scores = scores.index_fill(1, stops.long(), -np.inf)
            step = torch.where(going, scores.argmax(-1), padding)[:, None]
            sequences = torch.cat([sequences, step], 1)
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            going &= ~torch.isin(step[:, 0], stops)
            if not going.any():
                break
        return Generated(sequences, tuple(logits)) if chosen.get("return_dict_in_generate") else sequences
