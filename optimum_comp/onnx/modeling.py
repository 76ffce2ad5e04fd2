"""Optimum's class for causal language models, with a cache that stays in its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_comp.onnx.in_place import InPlace, Kept, kept
from optimum_comp.onnx.logits import KEPT, POSITIONS


try:
    from optimum.onnxruntime import ORTModelForCausalLM as OptimumModel
except ImportError as error:
    raise ImportError(
        "ORTModelForCausalLM is Optimum's, which needs ONNX Runtime and transformers below 4.58: "
        f"pip install 'optimum-comp[onnxruntime]'. {error}"
    ) from error


class ORTModelForCausalLM(OptimumModel):
    """`optimum.onnxruntime.ORTModelForCausalLM`, faster where attention is one operator that can add to a cache.

    There the cache has room for tokens to come, and the graph reads and writes it in place: for each token, nothing of
    it is copied, converted or bound anew. `past_key_values` are views of it; one from before stays as it was, and
    whoever goes on from it gets a copy. And of a prompt, the head sees the last token alone where no other's logits
    are asked for. All else is Optimum's: other graphs, beams, a cache of one's own, GPUs.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        is_plain = self.can_use_cache and self.provider == "CPUExecutionProvider" and not self.use_io_binding
        self._in_place = InPlace.of(self.session, self.path) if is_plain else None

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """See `GenerationMixin`; of the next token after a cache of this class, with less to do."""
        if (
            not isinstance(past_key_values, Kept)
            or input_ids.shape[1] != past_key_values.length + 1
            or any(kwargs.get(name) is not None for name in (POSITIONS, "inputs_embeds", "token_type_ids"))
        ):
            given = {"past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}
            return dict(super().prepare_inputs_for_generation(input_ids, **given))
        passed = {name: kwargs[name] for name in ("use_cache", KEPT) if name in kwargs}
        return {
            "input_ids": input_ids[:, -1:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            **passed,
        }

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_ids: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See Optimum's class.

        Args:
            input_ids: see there.
            attention_mask: see there.
            past_key_values: see there.
            position_ids: see there.
            use_cache: see there.
            logits_to_keep: how many of the last tokens get logits, as in transformers; 0 for all. `generate` asks for
                one, which spares the head of all others where the graph can.
            kwargs: see there.
        """
        start = past_key_values.length if isinstance(past_key_values, Kept) else 0
        if (
            self._in_place is None
            or not (self.config.use_cache if use_cache is None else use_cache)
            or not (past_key_values is None or isinstance(past_key_values, Kept))
            or not isinstance(input_ids, Tensor)
            or not isinstance(attention_mask, Tensor)
            or attention_mask.shape != (len(input_ids), start + input_ids.shape[1])
        ):
            found = super().forward(
                input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
            found.logits = kept(found.logits, logits_to_keep)
            return found
        logits, past = self._in_place.run(input_ids, attention_mask, past_key_values, position_ids, logits_to_keep)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past)
