"""Calibration text that the model writes itself, so that nothing has to be downloaded."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from optimum_comp.calibration.prompts import prompts
from optimum_comp.utils import progress_disabled


_CACHE_BYTES = 2**31
_MOST_SAMPLES = 64
"""Samples written side by side: as many as keep the processor busy, and whose KV cache fits into `_CACHE_BYTES`."""
_LOGIT_BYTES = 128
"""For each token that may come next, while one is drawn: its logit, sorted with its place, summed up, and copies of
these; measured."""
_TOP_P = 0.95
_TEMPERATURE = 1.0
_EPSILON = 1e-3
"""Tokens less likely than that aren't drawn (Hewitt et al., arXiv 2210.15191)."""
_REQUEST_TOKENS = 64
_HERE = "\u2026"
"""What a chat template is given to show where a request stands."""


def write_self(
    model: Any,
    tokenizer: Any,
    num_samples: int,
    sequence_length: int,
    seed: int,
    *,
    start: Sequence[int] = (),
    temperature: float = _TEMPERATURE,
    together: int | None = None,
) -> Tensor:
    """The model's own text: of a chat model, answers to requests of many kinds, else what it writes from nothing.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, or `None`.
        num_samples: blocks.
        sequence_length: tokens of a block.
        seed: of the sampling; the global random state is left as it was.
        start: tokens that texts begin with, where it writes from nothing.
        temperature: of the sampling; requests are drawn at 1 whatever it is, to be of every kind.
        together: samples written side by side; another number writes another text. As many as are best if `None`.

    Returns:
        `[num_samples, sequence_length]`, int64.
    """
    if is_chat(tokenizer):
        return converse(
            model, tokenizer, num_samples, sequence_length, seed, temperature=temperature, together=together
        )
    return write_text(
        model, tokenizer, num_samples, sequence_length, seed, start=start, temperature=temperature, together=together
    )


def is_chat(tokenizer: Any) -> bool:
    """Whether a tokenizer says how to talk with its model."""
    return bool(getattr(tokenizer, "chat_template", None))


def longest_written(tokenizer: Any, sequence_length: int) -> int:
    """Tokens in the cache at most while a sample is written: an answer may be as long, and has a request before it.

    Args:
        tokenizer: the model's.
        sequence_length: tokens of a sample.
    """
    return 2 * sequence_length if is_chat(tokenizer) else sequence_length


@torch.no_grad()
def write_text(
    model: Any,
    tokenizer: Any,
    num_samples: int,
    sequence_length: int,
    seed: int,
    *,
    start: Sequence[int] = (),
    temperature: float = _TEMPERATURE,
    top_p: float = _TOP_P,
    together: int | None = None,
) -> Tensor:
    """Sample text from the model, starting each sample from what its texts begin with.

    The start tokens aren't part of the blocks. The end-of-text token can't be sampled, so every block is full.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, or `None` (then the ids in the model's config are used).
        num_samples: blocks.
        sequence_length: tokens of a block.
        seed: of the sampling; the global random state is left as it was.
        start: tokens that texts begin with; the model's own begin- or end-of-text token if there are none.
        temperature: of the sampling.
        top_p: nucleus of the sampling.
        together: samples written side by side; another number writes another text. `side_by_side` if `None`.

    Returns:
        `[num_samples, sequence_length]`, int64.
    """
    start = list(start) or [_start_token(model, tokenizer)]
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        min_new_tokens=sequence_length,
        max_new_tokens=sequence_length,
        eos_token_id=_ends(model) or None,
        # Never written, since no sample ends early; another token than the first ones, which transformers would take
        # for padding on the wrong side.
        pad_token_id=next(token for token in range(len(start) + 1) if token not in start),
    )
    blocks = []
    with seeded(seed, model.device):
        together = together or side_by_side(model.config, model.dtype.itemsize, sequence_length)
        tokens = num_samples * sequence_length
        with tqdm(total=tokens, desc="Writing calibration text", unit="tok", disable=progress_disabled()) as progress:
            for first in range(0, num_samples, together):
                prompt = torch.tensor([start], device=model.device).repeat(min(together, num_samples - first), 1)
                written = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=settings,
                    use_cache=True,
                    streamer=_Counter(progress, prompt.numel()),
                )
                blocks.append(written[:, len(start) :].cpu())
    return torch.cat(blocks)


@torch.no_grad()
def converse(
    model: Any,
    tokenizer: Any,
    num_samples: int,
    sequence_length: int,
    seed: int,
    *,
    temperature: float = _TEMPERATURE,
    together: int | None = None,
) -> Tensor:
    """Have a chat model answer requests of many kinds, and cut what both said, template included, into blocks.

    Every other request is one that the model thinks of itself: it goes on where its template has a user speak (Xu et
    al., "Magpie", arXiv 2406.08464), so they are what such models are asked, in their own languages. The others
    (`prompts`) have it write what few ask for: stories, speeches, reports.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with a chat template.
        num_samples: blocks.
        sequence_length: tokens of a block.
        seed: of the requests and of the sampling; the global random state is left as it was.
        temperature: of the answers.
        together: answers written side by side; another number writes another text. `side_by_side` if `None`.

    Returns:
        `[num_samples, sequence_length]`, int64.
    """
    needed = num_samples * sequence_length
    asked = prompts(seed)
    written: list[Tensor] = []
    with seeded(seed, model.device):
        most = side_by_side(model.config, model.dtype.itemsize, longest_written(tokenizer, sequence_length))
        together = together or min(most, num_samples)
        with tqdm(total=needed, desc="Writing calibration text", unit="tok", disable=progress_disabled()) as progress:
            while needed > 0:
                # The last ones wait for the slowest, so no more are asked than will do.
                usual = sum(map(len, written)) / len(written) if written else sequence_length
                count = min(together, math.ceil(needed / usual))
                own = _own_requests(model, tokenizer, count // 2, min(_REQUEST_TOKENS, sequence_length))
                requests = [_request(tokenizer, each) for each in own]
                requests += [_request(tokenizer, next(asked)) for _ in range(count - len(own))]
                answers = _answers(model, requests, temperature, sequence_length)
                for request, answer in zip(requests, answers, strict=True):
                    end = _end(model, answer.tolist())
                    # Without an end, it was cut off: what is there is as good.
                    whole = torch.cat([torch.tensor(request), answer if end is None else answer[: end + 1]])
                    progress.update(min(len(whole), max(needed, 0)))
                    needed -= len(whole)
                    written.append(whole)
    return torch.cat(written)[: num_samples * sequence_length].view(num_samples, sequence_length)


def _answers(model: Any, requests: Sequence[list[int]], temperature: float, longest: int) -> Tensor:
    """How the model goes on after each of several beginnings, `[beginnings, at most longest]`."""
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        # In place of a nucleus, which would have the whole vocabulary sorted for every token.
        epsilon_cutoff=_EPSILON,
        max_new_tokens=longest,
        eos_token_id=_ends(model) or None,
        pad_token_id=0,
    )
    width = max(map(len, requests))
    ids = torch.tensor([[0] * (width - len(each)) + each for each in requests], device=model.device)
    there = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in requests], device=model.device)
    found = model.generate(ids, attention_mask=there, generation_config=settings, use_cache=True)
    return cast(Tensor, found)[:, width:].cpu()


def _own_requests(model: Any, tokenizer: Any, count: int, longest: int) -> list[str]:
    """At most `count` requests that the model has a user make; those that come to no end aren't among them."""
    before, there, _ = _said(tokenizer, _HERE).partition(_HERE)
    beginning = _encoded(tokenizer, before) if there else []
    if not beginning or count == 0:
        return []
    found = []
    for tokens in _answers(model, [beginning] * count, _TEMPERATURE, longest).tolist():
        end = _end(model, tokens)
        text = "" if end is None else tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        if text:
            found.append(text)
    return found


def _ends(model: Any) -> list[int]:
    """Tokens that end what is written."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]


def _end(model: Any, tokens: Sequence[int]) -> int | None:
    """The place of the first token that ends what is written; `None` if nothing does."""
    ends = _ends(model)
    return next((place for place, token in enumerate(tokens) if token in ends), None)


def _request(tokenizer: Any, text: str) -> list[int]:
    """A request in the words of a chat template, up to where the answer begins."""
    return _encoded(tokenizer, _said(tokenizer, text))


def _said(tokenizer: Any, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The generators that sampling on a device draws from begin at a seed meanwhile; no other is touched.

    `torch.manual_seed` would seed those of every GPU.

    Args:
        seed: the seed.
        device: where is sampled.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


class _Counter(BaseStreamer):
    """Moves a progress bar by the tokens that are written; the prompt, which comes first, isn't."""

    def __init__(self, progress: Any, prompt: int):
        self._progress = progress
        self._prompt = prompt

    def put(self, value: Tensor) -> None:
        self._progress.update(value.numel() - self._prompt)
        self._prompt = 0

    def end(self) -> None:
        """Nothing is held back."""


def side_by_side(config: Any, itemsize: int, sequence_length: int) -> int:
    """How many samples are best written side by side.

    Args:
        config: of the model.
        itemsize: bytes of a value that it computes.
        sequence_length: tokens of a sample.
    """
    return max(1, min(_MOST_SAMPLES, _CACHE_BYTES // _cache_bytes(config, itemsize, sequence_length)))


def sample_bytes(config: Any, itemsize: int, sequence_length: int) -> int:
    """What each sample takes that is being written: its KV cache, and what its next token is drawn from.

    Args:
        config: of the model.
        itemsize: bytes of a value that it computes.
        sequence_length: tokens of a sample.
    """
    # A layer's part of the cache is there twice while a token is added to it, and its groups repeated for their heads.
    growing = 4 * config.hidden_size * sequence_length * itemsize
    return _cache_bytes(config, itemsize, sequence_length) + growing + _LOGIT_BYTES * int(config.vocab_size)


def _cache_bytes(config: Any, itemsize: int, sequence_length: int) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head * sequence_length * itemsize)


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
