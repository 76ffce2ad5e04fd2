"""ONNX Runtime GenAI: its configuration for our graphs, and a trial of them in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_comp.onnx import genai_trial
from optimum_comp.onnx.cache import cache_shapes
from optimum_comp.onnx.folders import MODEL_NAME
from optimum_comp.onnx.genai_tokenizer import SAMPLES
from optimum_comp.onnx.graph import is_fused


CONFIG_NAME = "genai_config.json"

MAX_LENGTH = 2048
"""Default of prompt and answer together. A cache that is written into is allocated for all of it at once."""


def write_config(folder: Path) -> dict[str, Any]:
    """Write `genai_config.json` for the graph in an ONNX folder.

    Names and sizes are the graph's own; tokens that end an answer and how to choose the next one are those of the
    model's generation config.

    Args:
        folder: holds `model.onnx` and `config.json`.

    Returns:
        What was written.

    Raises:
        ValueError: GenAI has no way to run the graph; says why.
    """
    settings = genai_config(folder)
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return settings


def genai_config(folder: Path) -> dict[str, Any]:
    """What `genai_config.json` has to say for an ONNX folder.

    Args:
        folder: holds `model.onnx`, `config.json` and perhaps `generation_config.json`.

    Raises:
        ValueError: layers have caches of different shapes, or no token ends an answer.
    """
    import onnx
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    generation = _generation_settings(folder)
    graph = onnx.load(folder / MODEL_NAME, load_external_data=False).graph
    names = {value.name for value in graph.input}
    heads, head_size, layers = cache_shape(graph)
    tokens = {key: generation.get(key, getattr(config, key, None)) for key in ("bos_token_id", "eos_token_id")}
    ends = tokens["eos_token_id"]
    if ends is None:
        raise ValueError(f"{folder} names no eos_token_id, without which GenAI doesn't stop; add it to config.json.")
    padding = generation.get("pad_token_id", getattr(config, "pad_token_id", None))
    first_end = ends[0] if isinstance(ends, list) else ends
    context = int(config.max_position_embeddings)
    plain = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in names}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_NAME,
        "head_size": head_size,
        "hidden_size": config.hidden_size,
        "inputs": {
            **plain,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
    }
    model = {
        # What any graph is that the entries below describe; the names of families only stand for such entries.
        "type": "decoder",
        "bos_token_id": first_end if tokens["bos_token_id"] is None else tokens["bos_token_id"],
        "eos_token_id": ends,
        "pad_token_id": first_end if padding is None else padding,
        "context_length": context,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    search = {
        "do_sample": bool(generation.get("do_sample", False)),
        "temperature": generation.get("temperature") or 1.0,
        "top_k": 50 if generation.get("top_k") is None else generation["top_k"],
        "top_p": generation.get("top_p") or 1.0,
        "repetition_penalty": generation.get("repetition_penalty") or 1.0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "min_length": 0,
        "max_length": min(context, MAX_LENGTH),
        # Attention in one operator writes into a cache that is there; other graphs make a longer one at every token.
        "past_present_share_buffer": is_fused(graph),
    }
    return {"model": model, "search": search}


def _generation_settings(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: value for key, value in settings.items() if value is not None}


def cache_shape(graph: Any) -> tuple[int, int, int]:
    """Heads and width of the keys that a layer caches, and the number of layers."""
    shapes = list(cache_shapes(graph).values())
    if not shapes:
        raise ValueError("the graph has no cache (past_key_values.0.key, ...); export it with `export_onnx`.")
    if len(set(shapes)) != 1:
        raise ValueError("the layers' caches differ in shape, and GenAI's configuration has one shape for all.")
    return *shapes[0], len(shapes) // 2


@dataclass(frozen=True)
class GenaiTrial:
    """What GenAI made of a folder.

    Attributes:
        tokens: ids that it generated.
        encodings: ids of each sample text, without special tokens; `None` if it can't open the tokenizer.
    """

    tokens: list[int]
    encodings: list[list[int]] | None

    def agrees_with(self, tokenizer: Any) -> bool:
        """Whether GenAI's tokenizer gave the ids that this one of transformers gives, special tokens aside."""
        expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SAMPLES]
        return self.encodings == expected


def try_in_genai(folder: Path, prompt: Sequence[int], new_tokens: int) -> GenaiTrial:
    """Open a folder with GenAI, generate greedily, and encode texts with its tokenizer.

    Args:
        folder: holds a graph and `genai_config.json`.
        prompt: token ids.
        new_tokens: how many to generate, whatever they are.

    Raises:
        RuntimeError: GenAI doesn't open or run it; with its last lines.
    """
    job = {"folder": str(folder.resolve()), "prompt": list(prompt), "new_tokens": new_tokens, "texts": SAMPLES}
    # In a process of its own: a tokenizer that it doesn't know may end it.
    done = subprocess.run(
        [sys.executable, "-m", genai_trial.__name__, json.dumps(job)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith(genai_trial.MARK):
            found |= json.loads(line.removeprefix(genai_trial.MARK))
    if "tokens" not in found:
        raise RuntimeError(f"GenAI doesn't run {folder}: {_reason(done)}")
    return GenaiTrial(found["tokens"], found.get("encodings"))


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last lines of a process that failed, or how it ended where it said nothing: a crash does so."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return " ".join(lines[-3:]) or f"the process ended with status {done.returncode}."
