"""Whether a graph computes what it was made from: on random tokens, in the class that users open it with.

Every graph goes through here before it is kept. What is exported is compared with PyTorch, a rewritten graph with the
one that it was made of, and a quantized one with itself and with the float graph.
"""

from __future__ import annotations

import collections
import gc
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_comp.onnx.folders import MODEL_NAME
from optimum_comp.onnx.plain import PlainModel
from optimum_comp.onnx.runtime import is_transformers_5
from optimum_comp.utils import get_logger


logger = get_logger(__name__)

TOLERANCE = 1e-3
"""Of a logit of a float graph, relative to the largest one: float32 rounding, and nothing else."""

PREFILL, CACHED, GENERATED, PADDED = "prefill", "cached continuation", "generation", "left padding"
_UNCACHED, _ALONE = "without cache", "one prompt alone"

FAR = "long prompt"

_BATCH, _PREFILL, _CONTINUATION, _GENERATED, _PADDING = 2, 16, 8, 4, 5
"""Sequences; tokens of a prompt, after it, and that are generated; and by how many the shorter prompt is shorter."""

_FAR, _PART = 768, 64
"""Tokens of a long prompt, past the windows of most models that have one, and how many of them are read at once."""


@dataclass(frozen=True)
class Found:
    """What a model computes on random tokens.

    Attributes:
        logits: case -> `[sequences, positions, vocabulary]`, float32. Two prompts (`PREFILL`), tokens that follow them
            through the cache, one after the other (`CACHED`), and the same tokens in one run with their prompts; a
            shorter prompt and what follows it, at once, alone, and padded on the left beside a longer one (`PADDED`;
            the positions of the padding aside); the steps of greedy generation (`GENERATED`). If asked for, the end
            of a prompt that is read in parts (`FAR`).
        tokens: that generation has chosen, `[sequences, steps]`.
    """

    logits: Mapping[str, Tensor]
    tokens: Tensor


def run_torch(checkpoint: Path, *, far: bool = False) -> Found:
    """What PyTorch computes with a checkpoint in float32; `far`: with a long prompt, too."""
    from transformers import AutoModelForCausalLM

    # .float(): the argument that names a dtype has changed its own name between versions.
    return run_model(AutoModelForCausalLM.from_pretrained(checkpoint).float().eval(), far=far)


def run_graph(folder: Path, *, cache_shape: tuple[int, int] | None = None, far: bool = False) -> Found:
    """What `ORTModelForCausalLM` computes with a graph; with transformers 5, `PlainModel`.

    Args:
        folder: holds `model.onnx` and `config.json`.
        cache_shape: heads and width of a layer's cache, for a graph that insists on them (see `open_cache`).
        far: with a long prompt, too.

    Raises:
        RuntimeError: the class doesn't open or run it; says why.
    """
    # What was compared before may still be there, and models are large.
    gc.collect()
    try:
        if is_transformers_5():
            return run_model(PlainModel(folder, in_place=False), far=far)
        from optimum.onnxruntime import ORTModelForCausalLM

        model = ORTModelForCausalLM.from_pretrained(folder, file_name=MODEL_NAME, provider="CPUExecutionProvider")
        if cache_shape is not None:
            model.num_key_value_heads, model.embed_size_per_head = cache_shape
        return run_model(model, far=far)
    except Exception as error:
        runtime = "ONNX Runtime" if is_transformers_5() else "ORTModelForCausalLM"
        raise RuntimeError(f"{MODEL_NAME} doesn't run in {runtime}: {error}") from error


@torch.no_grad()
def run_model(model: Any, *, far: bool = False) -> Found:
    """What an opened model computes, of PyTorch or of ONNX Runtime; `far`: with a long prompt, too."""
    from transformers import GenerationConfig

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (_BATCH, _PREFILL + _CONTINUATION), generator=generator)
    mask = torch.ones_like(ids)
    shorter = mask.clone()
    shorter[0, :_PADDING] = 0
    # Attention in one operator takes several tokens behind a cache of one sequence only.
    steps, at_once = [_PREFILL, *[1] * _CONTINUATION], [_PREFILL - _PADDING, _CONTINUATION]
    both = torch.cat([*_run_in_parts(model, ids, mask, steps)], 1)
    logits = {
        PREFILL: both[:, :_PREFILL],
        CACHED: both[:, _PREFILL:],
        _UNCACHED: _forward(model, ids, mask).logits[:, _PREFILL:],
        _ALONE: torch.cat([*_run_in_parts(model, ids[:1, _PADDING:], mask[:1, _PADDING:], at_once)], 1),
        PADDED: torch.cat([*_run_in_parts(model, ids, shorter, steps)], 1)[:1, _PADDING:],
    }
    if far:
        length = min(_FAR, getattr(model.config, "max_position_embeddings", _FAR)) // _PART * _PART
        longer = torch.randint(model.config.vocab_size, (1, max(length, _PART)), generator=generator)
        parts = [_PART] * (longer.shape[1] // _PART)
        # Only the last part's are kept.
        logits[FAR] = collections.deque(_run_in_parts(model, longer, torch.ones_like(longer), parts), maxlen=1)[0]
    # Settings of its own, without the model's: no token ends it, and no penalty changes what is compared.
    settings = GenerationConfig(
        max_new_tokens=_GENERATED, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    prompts = {"input_ids": ids[:, :_PREFILL], "attention_mask": mask[:, :_PREFILL]}
    # What isn't set is taken from them.
    own, model.generation_config = model.generation_config, settings
    try:
        generated = model.generate(**prompts, generation_config=settings)
    finally:
        model.generation_config = own
    logits[GENERATED] = torch.stack(generated.logits, 1)
    return Found(logits, generated.sequences[:, _PREFILL:])


def _run_in_parts(model: Any, ids: Tensor, mask: Tensor, parts: Sequence[int]) -> Iterator[Tensor]:
    """Logits of some tokens after others, each part of so many, which reads those before it in the cache."""
    done = 0
    given: dict[str, Any] = {}
    for length in parts:
        end = done + length
        found = _forward(model, ids[:, done:end], mask[:, :end], **given)
        yield found.logits
        done, given = end, {"past_key_values": found.past_key_values}


def _forward(model: Any, ids: Tensor, mask: Tensor, **given: Any) -> Any:
    if "position_ids" in inspect.signature(model.forward).parameters:
        # As `generate` makes them.
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        given["position_ids"] = positions[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, use_cache=True, **given)


def require_same(
    expected: Found, found: Found, *, tolerance: float = TOLERANCE, names: tuple[str, str]
) -> dict[str, float]:
    """Refuse a model that computes something else than another one.

    A logit may be off by `tolerance * max(1, largest absolute logit)`: float32 rounding grows with the logits. An
    absolute difference above `tolerance` is logged even if it passes.

    Args:
        expected: what the one computes.
        found: what the other computes; cases that only one of both has are left out.
        tolerance: see above.
        names: of the other and the one, as the error calls them.

    Returns:
        Case -> largest absolute difference of a logit.

    Raises:
        RuntimeError: a logit differs by more; names the first such case, the difference and the bound.
    """
    # A step's logits follow from the tokens before it, which differ after two that are about equally likely.
    same = (found.tokens == expected.tokens).long().cumprod(1).roll(1, dims=1)
    same[:, 0] = 1
    differences = {}
    for case in (case for case in expected.logits if case in found.logits):
        one, other = expected.logits[case], found.logits[case]
        if case == GENERATED:
            one, other = one[same.bool()], other[same.bool()]
        difference = differences[case] = (other - one).abs().max().item()
        bound = tolerance * max(1.0, one.abs().max().item())
        # Written so that NaN fails too.
        if not difference <= bound:
            raise RuntimeError(
                f"{names[0]} disagrees with {names[1]}: its logits differ by up to {difference:.3g} ({case}), more "
                f"than {bound:.3g}. It is not kept."
            )
        if difference > tolerance:
            logger.warning(
                "%s and %s differ by up to %.3g (%s): above %g, though within it relative to the logits.",
                *names,
                difference,
                case,
                tolerance,
            )
    return differences


_OWN_SHARE, _LEAST = 2.5, 0.01
"""Measured are up to 1.2 of what a correct graph is off from the float one; and what is too little to matter."""


@dataclass(frozen=True)
class Drift:
    """How far a quantized graph's logits may be off.

    Both are L2 norms of the difference relative to the logits, each position's mean taken away. About 1.4 is what has
    nothing to do with it.

    Attributes:
        itself: between a run through the cache and one without, and between a prompt alone and padded beside another;
            no more, either, than what rounding explains, `_OWN_SHARE` of the least that any case is off from the float
            graph.
        exact: from the float graph.
    """

    itself: float
    exact: float


def require_close(expected: Found, found: Found, allowed: Drift) -> None:
    """Refuse a quantized graph that contradicts itself, or has little to do with the float graph.

    Args:
        expected: what the float graph computes.
        found: what the quantized one computes.
        allowed: how far it may be off.

    Raises:
        RuntimeError: it is off by more; names the case, the error and the bound.
    """
    errors = {
        case: _relative_error(expected.logits[case], found.logits[case])
        for case in expected.logits
        if case != GENERATED
    }
    for case, reference in ((CACHED, _UNCACHED), (PADDED, _ALONE)):
        error = _relative_error(found.logits[reference], found.logits[case])
        bound = min(allowed.itself, max(_OWN_SHARE * min(errors.values()), _LEAST))
        _require_error("itself", f"{case} against {reference}", error, bound)
    for case, error in errors.items():
        _require_error("the float one", case, error, allowed.exact)


def _require_error(whom: str, case: str, error: float, bound: float) -> None:
    # Written so that NaN fails too.
    if not error <= bound:
        raise RuntimeError(
            f"the quantized graph disagrees with {whom}: its logits are off by {error:.3g} of their norm ({case}), "
            f"more than {bound:.3g}. It is not kept."
        )
    logger.info("The quantized graph is off from %s by %.3g (%s).", whom, error, case)


def _relative_error(expected: Tensor, found: Tensor) -> float:
    one, other = (logits - logits.mean(-1, keepdim=True) for logits in (expected, found))
    return ((other - one).norm() / one.norm()).item()
