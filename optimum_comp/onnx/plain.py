"""A decoder's graph in ONNX Runtime alone, for where Optimum's class for it can't be installed (transformers 5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimum_comp.onnx.cache import present_of
from optimum_comp.onnx.folders import MODEL_NAME
from optimum_comp.onnx.in_place import InPlace, Kept, kept
from optimum_comp.onnx.logits import POSITIONS
from optimum_comp.onnx.runtime import GraphRunner


@dataclass(frozen=True)
class Step:
    """What a run of the graph gives.

    Attributes:
        logits: `[sequences, tokens, vocabulary]`.
        past_key_values: what the layers have cached, for the tokens that follow: by name of the input, or where it
            stays in its place.
    """

    logits: Tensor
    past_key_values: dict[str, Any] | Kept


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
        in_place: have the cache stay in its place where the graph can (see `onnx.in_place`).
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | Path, threads: int | None = None, *, in_place: bool = True):
        from transformers import AutoConfig, GenerationConfig

        self.config = AutoConfig.from_pretrained(folder)
        named = (Path(folder) / "generation_config.json").is_file()
        self.generation_config = GenerationConfig.from_pretrained(folder) if named else GenerationConfig()
        path = Path(folder) / MODEL_NAME
        self._runner = GraphRunner(path, threads)
        self._in_place = InPlace.of(self._runner.session, path) if in_place else None
        self._outputs = ["logits", *(present_of(name) for name in self._runner.cache_names)]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: dict[str, Any] | Kept | None = None,
        *,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Step:
        """Logits of tokens that follow those in the cache.

        Args:
            input_ids: `[sequences, tokens]`.
            attention_mask: `[sequences, tokens and what is in the cache]`.
            past_key_values: of an earlier step; nothing is in the cache if not given.
            use_cache: whether the result holds a cache.
            logits_to_keep: how many of the last tokens get logits; 0 for all.
        """
        start = attention_mask.shape[1] - input_ids.shape[1]
        # As `generate` of transformers makes them.
        positions = (attention_mask.cumsum(1) - 1).masked_fill(attention_mask == 0, 1)[:, start:]
        if self._in_place is not None and use_cache and not isinstance(past_key_values, dict):
            return Step(*self._in_place.run(input_ids, attention_mask, past_key_values, positions, logits_to_keep))
        given = {"attention_mask": attention_mask.numpy()}
        if isinstance(past_key_values, dict):
            given |= past_key_values
        if POSITIONS in self._runner.input_names:
            given[POSITIONS] = positions.numpy()
        outputs = self._outputs if use_cache else self._outputs[:1]
        logits, *cache = self._runner.run(input_ids.numpy(), outputs, given, start=start)
        return Step(
            kept(torch.from_numpy(logits), logits_to_keep), dict(zip(self._runner.cache_names, cache, strict=False))
        )

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
        past: dict[str, Any] | Kept | None = None
        going = torch.ones(len(input_ids), dtype=torch.bool)
        logits: list[Tensor] = []
        least = chosen.get("min_new_tokens") or 0
        for count in range(chosen.get("max_new_tokens") or 20):
            found = self.forward(step, mask, past, logits_to_keep=1)
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
