"""llama.cpp on a checkpoint's weights, measured as ONNX Runtime is: what else somebody might run on the same machine.

The weights are written as GGUF in float32, rounded by llama.cpp's own quantizer, and run by the build of llama.cpp
that the package node-llama-cpp carries. Token ids go in and come out, so the file needs no tokenizer.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from node_packages import NodeUnavailableError, install, require_node
from optimum_comp.evaluation import Evaluation, Settings, count_parameters, evaluate_apart


VERSION = "3.22.1"
"""Of node-llama-cpp, and of the packages with its builds of llama.cpp."""

BUILDS = {
    ("Linux", "x86_64"): "linux-x64",
    ("Linux", "aarch64"): "linux-arm64",
    ("Darwin", "arm64"): "mac-arm64-metal",
    ("Darwin", "x86_64"): "mac-x64",
}
"""The build for a system and processor."""

FORMATS = {"Q8_0": 7, "Q4_K_M": 15, "Q4_0": 2}
"""llama.cpp's numbers of file types."""

RUNTIME = "llama.cpp"
NOTE = (
    "llama.cpp: speed and memory of its build in node-llama-cpp, Node.js included; perplexity of the weights as they "
    "are stored, in PyTorch, without what llama.cpp loses by rounding activations to 8 bits."
)
"""What a reader of the numbers has to know."""

_RUN = Path(__file__).with_name("llama_cpp.mjs")


class LlamaCppUnavailableError(RuntimeError):
    """llama.cpp can't be had here, or doesn't take the model; the message says why, in one line."""


def measure(
    checkpoint: str | Path, folder: Path, settings: Settings, formats: Sequence[str] = tuple(FORMATS)
) -> Iterator[tuple[str, Evaluation]]:
    """Speed, size and perplexity of a checkpoint in llama.cpp.

    Args:
        checkpoint: a folder that transformers loads, of Llama's architecture.
        folder: for packages and GGUF files; those that are here already are used.
        settings: what to measure.
        formats: keys of `FORMATS`.

    Yields:
        Name of the format and measurements.

    Raises:
        LlamaCppUnavailableError: see there.
    """
    modules, library = set_up(folder)
    config = AutoConfig.from_pretrained(checkpoint)
    exact = folder / "F32.gguf"
    if not exact.exists():
        write_gguf(checkpoint, exact)
    for name in formats:
        model = folder / f"{name}.gguf"
        if not model.exists():
            quantize(exact, model, name, library)
        result = Evaluation(str(model), RUNTIME, count_parameters(config), model.stat().st_size)
        _measure_speed(model, modules, config.vocab_size, settings, result)
        _measure_perplexity(model, checkpoint, settings, result)
        yield name, result


def set_up(folder: Path) -> tuple[Path, Path]:
    """Install node-llama-cpp in a folder, unless it is there.

    Returns:
        The `node_modules`, and llama.cpp's shared library in it.

    Raises:
        LlamaCppUnavailableError: there is no build of it for this machine, no Node.js, or npm fails.
    """
    system = (platform.system(), platform.machine())
    if system not in BUILDS:
        raise LlamaCppUnavailableError(f"node-llama-cpp has no build that is used here for {' '.join(system)}.")
    build = f"@node-llama-cpp/{BUILDS[system]}"
    try:
        modules = install({"node-llama-cpp": VERSION, build: VERSION}, folder)
    except NodeUnavailableError as error:
        raise LlamaCppUnavailableError(str(error)) from error
    found = sorted((modules / build).glob("bins/*/libllama.*"))
    if not found:
        raise LlamaCppUnavailableError(f"{build} {VERSION} has no libllama.")
    return modules, found[0]


def write_gguf(checkpoint: str | Path, path: Path) -> None:
    """A checkpoint as GGUF in float32, without its tokenizer.

    Raises:
        LlamaCppUnavailableError: the `gguf` package is missing, or the model has what isn't written here.
    """
    try:
        import gguf
    except ImportError as error:
        raise LlamaCppUnavailableError("there is no gguf: pip install 'optimum-comp[gguf]'.") from error
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = model.config
    _require_plain_llama(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    # Ids go in and come out, so any texts will do, but node-llama-cpp insists on some.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([str(number) for number in range(config.vocab_size)])
    writer.add_token_merges(["1 0"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbouring rows of a head together, transformers those of its two halves.
            values = values.reshape(-1, 2, width // 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def _require_plain_llama(config: Any) -> None:
    wanted = {"model_type": "llama", "rope_scaling": None, "attention_bias": False, "mlp_bias": False}
    for name, value in wanted.items():
        if (found := getattr(config, name, value)) != value:
            raise LlamaCppUnavailableError(f"{name} is {found!r}: GGUF is written here for {value!r} alone.")


def quantize(source: Path, target: Path, name: str, library: Path) -> None:
    """Round a GGUF file with llama.cpp's own code.

    In a process of its own: what goes wrong in a library ends the process.

    Args:
        source: in float32.
        target: the file to make.
        name: a key of `FORMATS`.
        library: see `set_up`.

    Raises:
        LlamaCppUnavailableError: it failed.
    """
    partial = target.with_suffix(".partial")
    command = [sys.executable, __file__, str(library), str(source), str(partial), str(FORMATS[name])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise LlamaCppUnavailableError(f"llama.cpp can't make {name} of {source}: {last[0]}")
    partial.replace(target)


class _Parameters(ctypes.Structure):
    """The beginning of `llama_model_quantize_params`, and more room than the rest of it takes."""

    _fields_ = (("threads", ctypes.c_int32), ("file_type", ctypes.c_int32), ("rest", ctypes.c_uint8 * 1016))


def _quantize_here(library: str, source: str, target: str, file_type: str) -> int:
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = _Parameters
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
    llama.llama_model_quantize.restype = ctypes.c_uint32
    llama.llama_backend_init()
    parameters = llama.llama_model_quantize_default_params()
    parameters.file_type = int(file_type)
    return llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))


def generated(model: Path, modules: Path, prompt: Sequence[int], count: int, threads: int) -> list[int]:
    """llama.cpp's greedy tokens behind a prompt, as `run` gives them."""
    return run(model, modules, [(prompt, count)], threads=threads, repeats=1)["prompts"][0][0]["tokens"]


def run(
    model: Path, modules: Path, prompts: Sequence[tuple[Sequence[int], int]], *, threads: int, repeats: int
) -> dict[str, Any]:
    """Let llama.cpp generate greedily in a process of its own.

    Args:
        model: a GGUF file.
        modules: the `node_modules` with node-llama-cpp.
        prompts: token ids, and how many tokens to generate behind them.
        threads: processor threads.
        repeats: runs of each prompt, after a warm-up.

    Returns:
        `load_seconds`, `peak_memory_bytes`, and of each of the `prompts` a list of runs with `first` and `rest`, the
        seconds to the first token and from there to the last one, and `tokens`.

    Raises:
        LlamaCppUnavailableError: it failed.
    """
    asked = [{"ids": list(ids), "count": count} for ids, count in prompts]
    job = {"model": str(model.resolve()), "prompts": asked, "threads": threads, "repeats": repeats}
    script = modules.parent / _RUN.name
    # Node.js looks for packages beside the script.
    shutil.copyfile(_RUN, script)
    command = [require_node(), str(script)]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if "Error" in line][:1] or [f"status {done.returncode}"]
        raise LlamaCppUnavailableError(f"llama.cpp can't run {model}: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure_speed(model: Path, modules: Path, vocabulary: int, settings: Settings, result: Evaluation) -> None:
    """What `throughput` measures of all others: the same prompts, medians after a warm-up."""

    def prompt(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist()

    lengths = [(settings.prompt_tokens, settings.new_tokens), (settings.long_prompt_tokens, 2)]
    prompts = [(prompt(length), count) for length, count in lengths if length]
    threads = settings.threads or torch.get_num_threads()
    found = run(model, modules, prompts, threads=threads, repeats=settings.repeats)
    result.threads, result.load_seconds = threads, found["load_seconds"]
    result.peak_memory_bytes = found["peak_memory_bytes"]
    first, rest = (
        [statistics.median(each[name] for each in runs) for runs in found["prompts"]] for name in ("first", "rest")
    )
    if settings.long_prompt_tokens:
        result.long_prompt_tokens = settings.long_prompt_tokens
        result.long_prefill_tokens_per_second = settings.long_prompt_tokens / first[-1]
    if settings.prompt_tokens:
        result.prompt_tokens, result.first_token_seconds = settings.prompt_tokens, first[0]
        result.prefill_tokens_per_second = settings.prompt_tokens / first[0]
        result.decode_tokens_per_second = (settings.new_tokens - 1) / rest[0]


def turn(folder: Path, name: str, vocabulary: int, settings: Settings) -> list[float]:
    """Tokens a second of both prompts and of decoding, of one run.

    Args:
        folder: which `measure` was given.
        name: key of `FORMATS`, which is in it.
        vocabulary: ids are below this.
        settings: as for `measure`.

    Raises:
        LlamaCppUnavailableError: it failed.
    """
    found = Evaluation(name, RUNTIME, 0, 0)
    once = dataclasses.replace(settings, repeats=1)
    _measure_speed(folder / f"{name}.gguf", folder / "node_modules", vocabulary, once, found)
    speeds = (
        found.prefill_tokens_per_second,
        found.long_prefill_tokens_per_second,
        found.decode_tokens_per_second,
    )
    return [speed or float("nan") for speed in speeds]


def _measure_perplexity(model: Path, checkpoint: str | Path, settings: Settings, result: Evaluation) -> None:
    if settings.text is None:
        return
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        stored = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
        stored.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(scratch)
        found = evaluate_apart(scratch, dataclasses.replace(settings, prompt_tokens=0, long_prompt_tokens=0))
    measured = ("perplexity", "predictions", "bits_per_byte", "bytes_predicted", "vocabulary")
    for name in (*measured, "window", "begins_with", "start", "text", "text_sha256"):
        setattr(result, name, getattr(found, name))


if __name__ == "__main__":
    sys.exit(_quantize_here(*sys.argv[1:]))
