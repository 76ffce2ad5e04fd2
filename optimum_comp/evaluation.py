"""Perplexity, throughput and memory of a PyTorch or an ONNX folder: the same code on the same tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optimum_comp.beginning import Beginning, decide, in_front, losses_of_model, spread, start_tokens
from optimum_comp.calibration.text import PYDOC, first_tokens, read_beginning, read_text, tokenize
from optimum_comp.checkpoint.opening import open_config, trusted
from optimum_comp.checkpoint.reader import resolve_folder, weight_files
from optimum_comp.checkpoint.source import empty_model
from optimum_comp.checkpoint.tokenizer import open_tokenizer
from optimum_comp.configuration import BEGINS
from optimum_comp.core.layer_scores import next_token_loss
from optimum_comp.families.cutting import filled_parameters
from optimum_comp.files import check_model
from optimum_comp.onnx.folders import GRAPH_FILES
from optimum_comp.options import Choice, Integer, Integers, Text, Texts, column_option, option, settings_class
from optimum_comp.report.run import recorded_beginning
from optimum_comp.utils import (
    explaining,
    file_bytes,
    get_logger,
    lookup_arguments,
    parameter_count,
    peak_memory_bytes,
    plain_arguments,
    progress_disabled,
    shown,
)


logger = get_logger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", *GRAPH_FILES)


@settings_class
class Settings:
    """What to measure."""

    text: str | None = option(
        Text("a file, a dataset's name or pydoc"),
        "Text of which perplexity is measured: a file, a dataset as name[:config[:split]], or pydoc for Python's "
        "documentation.",
        optional=True,
        metavar="FILE|DATASET",
        default=PYDOC,
    )
    text_column: str | None = column_option()
    window: int = option(
        Integer(2),
        "Tokens of a window, start tokens included; windows don't overlap, and a window's first token of text isn't "
        "predicted.",
        default=512,
    )
    max_tokens: int | None = option(
        Integer(0), "Tokens of the text that are read at most; 0 reads all.", optional=True, default=20480
    )
    begin: str = option(
        Choice(BEGINS),
        "Whether each window begins with the tokens that the tokenizer puts in front of a text, as <bos>: auto (as "
        "pruning found, else unless the model does as well without), always or never; the same where it puts nothing "
        "there.",
        default="auto",
    )
    begins_with: Sequence[int] | None = option(
        Integers("a list of token ids"), "What windows begin with where that is decided already.", default=None
    )
    prompts: Sequence[str] = option(
        Texts(), "What the model is asked; its greedy answer is shown.", flag="--prompt", metavar="TEXT", default=()
    )
    prompt_tokens: int = option(
        Integer(0), "Length of the prompt of which throughput is measured; 0 for none.", default=128
    )
    long_prompt_tokens: int = option(
        Integer(0), "Length of a second prompt of which prefill is measured; 0 for none.", default=0
    )
    new_tokens: int = option(Integer(2), "Tokens of an answer, and of a measurement of decoding.", default=32)
    repeats: int = option(Integer(1), "Throughput is the median of so many runs.", default=3)
    threads: int | None = option(
        Integer(1), "Processor threads.", default_text="the runtime's own choice", default=None
    )

    def _require(self) -> None:
        if self.max_tokens and self.max_tokens < self.window:
            raise ValueError(f"max_tokens={self.max_tokens} is not valid: one window takes {self.window} tokens.")

    def as_with(self, first: Evaluation) -> Settings:
        """The settings for models that are compared with one that was measured first: windows begin as its did.

        With start tokens, if its did, and with the model's own: in another vocabulary they have other ids.
        """
        if self.text is None or self.begins_with is not None:
            return self
        return dataclasses.replace(self, begin="always" if first.begins_with else "never")


@dataclass
class Evaluation:
    """What was measured; `None` where it was left out.

    Attributes:
        model: the folder or hub id.
        runtime: `pytorch` or `onnxruntime`.
        parameters: of the architecture that `config.json` describes, tied weights once.
        size_bytes: of the weight files.
        perplexity: exp of the mean next-token loss.
        predictions: tokens that were predicted for it.
        bits_per_byte: the same loss over the bytes of what was predicted, in bits: comparable across vocabularies.
        bytes_predicted: those bytes, in UTF-8.
        vocabulary: tokens that the model knows.
        window: tokens of a window.
        begins_with: start tokens of each window, which aren't predicted; empty for none.
        start: the same as text.
        text: where the text is from.
        text_sha256: of the very tokens of text.
        prefill_tokens_per_second: of a prompt of `prompt_tokens` tokens, batch 1.
        decode_tokens_per_second: of greedy generation after it, batch 1.
        prompt_tokens: length of the prompt of the throughput.
        first_token_seconds: from that prompt to the first token of the answer.
        long_prefill_tokens_per_second: prefill of a prompt of `long_prompt_tokens` tokens.
        long_prompt_tokens: its length.
        load_seconds: from the folder to a model that answers.
        peak_memory_bytes: largest resident set of the process after loading, prefill and decoding.
        threads: processor threads.
        answers: `prompt` and the model's greedy `answer` of each thing that it was asked.
    """

    model: str
    runtime: str
    parameters: int
    size_bytes: int
    perplexity: float | None = None
    predictions: int | None = None
    bits_per_byte: float | None = None
    bytes_predicted: int | None = None
    vocabulary: int | None = None
    window: int | None = None
    text: str | None = None
    text_sha256: str | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    prompt_tokens: int | None = None
    first_token_seconds: float | None = None
    long_prefill_tokens_per_second: float | None = None
    long_prompt_tokens: int | None = None
    load_seconds: float | None = None
    peak_memory_bytes: int | None = None
    threads: int | None = None
    begins_with: list[int] = field(default_factory=list)
    start: str | None = None
    answers: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def is_onnx_folder(path: str | Path) -> bool:
    """Whether a folder holds an ONNX model."""
    return Path(path).is_dir() and any(Path(path).glob("*.onnx"))


def load_model(path: str | Path, threads: int | None = None, **kwargs: Any) -> tuple[Any, str]:
    """Load a folder or hub id with the runtime that it is for.

    Args:
        path: a PyTorch or an ONNX folder, or a hub id.
        threads: processor threads.
        kwargs: passed on to `from_pretrained`.

    Returns:
        The model, and `pytorch` or `onnxruntime`.

    Raises:
        OSError: there is no such model.
        ValueError: an interrupted run has left it unfinished, or its weights are a pickle.
        ImportError: it is an ONNX folder and ONNX Runtime isn't installed.
    """
    if is_onnx_folder(path):
        from optimum_comp.onnx.runtime import load_onnx

        return load_onnx(path, threads=threads, **kwargs), "onnxruntime"
    from transformers import AutoModelForCausalLM

    if threads is not None:
        torch.set_num_threads(threads)
    arguments = trusted(path, kwargs)
    with explaining(f"{shown(path)} can't be loaded"):
        return AutoModelForCausalLM.from_pretrained(path, **arguments).eval(), "pytorch"


def evaluate(path: str | Path, settings: Settings, **kwargs: Any) -> Evaluation:
    """Measure one model in this process.

    `peak_memory_bytes` is the whole process's; `evaluate_apart` gives each model a process of its own.

    Args:
        path: a PyTorch or an ONNX folder, or a hub id.
        settings: what to measure.
        kwargs: passed on to `from_pretrained`.

    Raises:
        ValueError: the text is shorter than one window.
    """
    check_model(path)
    # The folder's own: ONNX Runtime's model puts its attention implementation into its copy.
    config = open_config(str(path), lookup_arguments(kwargs))
    tokens, name = None, None
    if settings.text is not None or settings.prompts:
        tokenizer = open_tokenizer(path, lookup_arguments(kwargs))
    if settings.text is not None:
        tokens, name = _text_tokens(settings, tokenizer)
        if tokens.numel() < settings.window:
            raise ValueError(
                f"{name} is too short: {tokens.numel()} tokens don't fill one window of {settings.window}; give more "
                "text or a smaller window."
            )
        _require_room(settings, tokenizer)
    started = time.perf_counter()
    model, runtime = load_model(path, settings.threads, **kwargs)
    result = Evaluation(str(path), runtime, count_parameters(config), weight_bytes(path, lookup_arguments(kwargs)))
    result.vocabulary = getattr(config, "vocab_size", None)
    result.load_seconds = time.perf_counter() - started
    result.threads = settings.threads or torch.get_num_threads()
    with _torch_aside() if runtime == "onnxruntime" else contextlib.nullcontext():
        for prompt in settings.prompts:
            said = answer(model, tokenizer, prompt, settings.new_tokens)
            result.answers.append({"prompt": prompt, "answer": said})
        if settings.prompt_tokens:
            prefill, decode = throughput(model, settings.prompt_tokens, settings.new_tokens, settings.repeats)
            result.prefill_tokens_per_second, result.decode_tokens_per_second = prefill, decode
            result.prompt_tokens = settings.prompt_tokens
            result.first_token_seconds = settings.prompt_tokens / prefill
        if settings.long_prompt_tokens:
            result.long_prompt_tokens = settings.long_prompt_tokens
            result.long_prefill_tokens_per_second, _ = throughput(
                model, settings.long_prompt_tokens, 2, settings.repeats
            )
        # Before perplexity: its logits of whole windows are no part of what a user of the model needs.
        result.peak_memory_bytes = peak_memory_bytes()
        if tokens is not None:
            start = _beginning(path, settings, tokenizer, model, tokens).tokens
            result.begins_with, result.start = list(start), tokenizer.decode(start) if start else None
            result.perplexity, result.predictions = perplexity(model, tokens, settings.window, start)
            result.bytes_predicted = bytes_predicted(tokenizer, tokens, settings.window, len(start))
            result.bits_per_byte = bits_per_byte(result.perplexity, result.predictions, result.bytes_predicted)
            result.window, result.text = settings.window, name
            room = settings.window - len(start)
            used = tokens[: tokens.numel() // room * room]
            result.text_sha256 = hashlib.sha256(used.numpy().tobytes()).hexdigest()
    return result


def _text_tokens(settings: Settings, tokenizer: Any) -> tuple[Tensor, str]:
    """The tokens of text, `[n]`, and the text's name; of a long text, little beyond them is read."""
    if not settings.max_tokens:
        text, name = read_text(settings.text, settings.text_column)
        return tokenize(tokenizer, text), name
    beginning, name = read_beginning(settings.text, settings.text_column, settings.max_tokens)
    return first_tokens(tokenizer, beginning, settings.max_tokens), name


def _require_room(settings: Settings, tokenizer: Any) -> None:
    """Refuse windows in which start tokens leave nothing to predict."""
    start = settings.begins_with
    if start is None:
        start = [] if settings.begin == "never" else start_tokens(tokenizer)
    if settings.window < len(start) + 2:
        raise ValueError(
            f"window={settings.window} leaves nothing to predict behind {tokenizer.decode(start)!r}; take at least "
            f"{len(start) + 2}, or begin with nothing: begin='never' (--begin never)."
        )


def _beginning(path: str | Path, settings: Settings, tokenizer: Any, model: Any, tokens: Tensor) -> Beginning:
    """What windows begin with: as decided before, as pruning found, or as is measured now."""
    if settings.begins_with is not None:
        return Beginning(tuple(settings.begins_with))
    recorded = recorded_beginning(path) if settings.begin == "auto" else None
    if recorded is not None:
        return recorded
    return decide(settings.begin, tokenizer, spread(tokens, settings.window), losses_of_model(model), "Windows")


@contextlib.contextmanager
def _torch_aside() -> Iterator[None]:
    """One thread for torch meanwhile.

    Where ONNX Runtime computes, torch only picks tokens, and its threads wait for work on the cores that ONNX
    Runtime's need: without them, two cores generate half as fast again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, window: int = 512, start: Sequence[int] = ()) -> tuple[float, int]:
    """Perplexity over windows that don't overlap.

    Args:
        model: a causal language model of transformers, `ORTModelForCausalLM` or `PlainModel`.
        tokens: text, `[n]`, at least one window.
        window: tokens of a window, `start` included; those of the text are predicted, but for the first.
        start: tokens that each window begins with.

    Returns:
        Perplexity and the number of predictions.
    """
    total, count = 0.0, 0
    count_start = len(start)
    room = window - count_start
    windows = tokens[: tokens.numel() // room * room].view(-1, 1, room)
    for batch in tqdm(windows, desc="Perplexity", unit="window", disable=progress_disabled()):
        batch = in_front(start, batch).to(model.device)
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
        loss, predictions = next_token_loss(logits[:, count_start:], batch[:, count_start:])
        total, count = total + loss, count + predictions
    return math.exp(total / count), count


def bytes_predicted(tokenizer: Any, tokens: Tensor, window: int = 512, start: int = 0) -> int:
    """UTF-8 bytes of what `perplexity` predicts of a text: of each window all but its first token.

    Args:
        tokenizer: the model's.
        tokens: the text, `[n]`, at least one window.
        window: as for `perplexity`.
        start: tokens that each window begins with, which aren't of the text.
    """
    room = window - start
    windows = tokens[: tokens.numel() // room * room].view(-1, room)
    # As the tokens have it: clean-up takes spaces away that the text has.
    texts = (tokenizer.decode(each[1:], clean_up_tokenization_spaces=False) for each in windows)
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def bits_per_byte(perplexity: float, predictions: int, count: int) -> float | None:
    """What a text costs by a model, which no choice of tokens changes the unit of.

    Args:
        perplexity: of a token.
        predictions: tokens.
        count: bytes that they stand for; of none, there is nothing to say.
    """
    return math.log2(perplexity) * predictions / count if count else None


@torch.no_grad()
def throughput(model: Any, prompt_tokens: int, new_tokens: int, repeats: int) -> tuple[float, float | None]:
    """Prefill and decode tokens per second at batch 1, medians over `repeats` after one warm-up.

    Prefill is the time to the first token of a prompt of `prompt_tokens` random tokens; decoding is the time of the
    tokens after it, through `generate`, greedy, with the cache. Of a
    model so small that it is lost in the noise, there is none (`None`).
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)

    # No token ends the answer. To ask for a least length instead would have all logits looked through at each token.
    never = int(model.config.vocab_size)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
            eos_token_id=never,
        )
        return time.perf_counter() - started

    seconds(2)
    first = statistics.median(seconds(1) for _ in range(repeats))
    whole = statistics.median(seconds(new_tokens) for _ in range(repeats))
    return prompt_tokens / first, (new_tokens - 1) / (whole - first) if whole > first else None


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """The model's greedy answer, through its chat template if it has one."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    output = model.generate(
        input_ids=inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        max_new_tokens=new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
    )
    return str(tokenizer.decode(output[0, length:], skip_special_tokens=True)).strip()


def count_parameters(config: Any) -> int:
    """Parameters of the model that a config describes, tied weights once; nothing is allocated.

    Neurons of zeros that fill up a narrow layer don't count.
    """
    model = empty_model(config, torch.float32)
    return parameter_count(model) - filled_parameters(model)


def weight_bytes(path: str | Path, lookup: Mapping[str, Any] | None = None) -> int:
    """Size of a folder's weight files; of a hub id, what its cached snapshot holds.

    Args:
        path: the folder, or a hub id.
        lookup: how it is found (see `lookup_arguments`).
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = resolve_folder(str(path), {**(lookup or {}), "local_files_only": True}, _WEIGHT_FILES)
    except LocalEntryNotFoundError:
        return 0
    named = (lookup or {}).get("gguf_file")
    if named is not None:
        return file_bytes(folder, (str(named),))
    # A folder may hold the same weights a second time, as a pickle or as GGUF.
    return sum(file.stat().st_size for file in weight_files(folder)) or file_bytes(folder, _WEIGHT_FILES)


def evaluate_apart(path: str | Path, settings: Settings, **kwargs: Any) -> Evaluation:
    """`evaluate` in a process of its own, so that peak memory is this model's alone.

    Args:
        path: as for `evaluate`.
        settings: as for `evaluate`.
        kwargs: arguments of `from_pretrained` that JSON can hold.

    Raises:
        RuntimeError: the process failed; with the last lines that it wrote.
        ValueError: JSON can't hold an argument.
    """
    job = {"path": str(path), "settings": dataclasses.asdict(settings), "kwargs": plain_arguments(kwargs)}
    environment = {**os.environ, "TQDM_DISABLE": "1"} if progress_disabled() else dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "optimum_comp.evaluation", str(result)]
        # Not among the arguments, which everybody on the machine can read: there may be a token in it.
        given = json.dumps(job)
        done = subprocess.run(
            command,
            env=environment,
            input=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            lines = done.stderr.splitlines()[-5:] or [f"it ended with {_ending(done.returncode)}"]
            raise RuntimeError(f"evaluation of {path} failed:\n" + "\n".join(lines))
        return Evaluation(**json.loads(result.read_text(encoding="utf-8")))


def evaluate_all(
    models: Mapping[str, str | Path], settings: Settings, loading: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[tuple[str, Evaluation]]:
    """`evaluate_apart` one model after the other, windows of all beginning as the first one's do.

    Args:
        models: folders or hub ids by name.
        settings: as for `evaluate`.
        loading: by name, arguments of `from_pretrained` that JSON can hold.

    Yields:
        Name and measurements of each.
    """
    for name, path in models.items():
        logger.info("Measuring %s ...", name)
        result = evaluate_apart(path, settings, **(loading or {}).get(name, {}))
        settings = settings.as_with(result)
        yield name, result


def _ending(status: int) -> str:
    # Windows has no such signal.
    if status == -getattr(signal, "SIGKILL", 0) < 0:
        return "SIGKILL: the system may have run out of memory"
    return f"signal {-status}" if status < 0 else f"status {status}"


def _main(arguments: Sequence[str]) -> None:
    job = json.load(sys.stdin)
    result = evaluate(job["path"], Settings(**job["settings"]), **job["kwargs"])
    Path(arguments[0]).write_text(json.dumps(result.to_dict()), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1:])
