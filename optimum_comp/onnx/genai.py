"""ONNX Runtime GenAI: its configuration for our graphs, a tokenizer that it reads right, and its environment.

GenAI runs the exported graph as it is. Its builder writes a graph with attention as one operator, which generates
faster. Up to 0.15 it runs beside Optimum; later ones need transformers 5, which Optimum's ONNX part excludes, and so a
Python environment of their own. Either way it runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_comp.onnx.cache import cache_shapes
from optimum_comp.onnx.folders import MODEL_NAME, copy_companions


CONFIG_NAME = "genai_config.json"
ENVIRONMENT_VARIABLE = "COMP_GENAI_PYTHON"
REQUIREMENTS = (
    "onnxruntime-genai==0.18.0",
    "onnxruntime>=1.31",
    "transformers>=5",
    "torch==2.13.0",
    "onnx-ir",
    "safetensors",
)
"""What the environment of the builder needs. The builder's options and the names in its graph are this version's."""

_NEEDS_TRANSFORMERS_5 = (0, 16)
"""GenAI from this version on."""

MAX_LENGTH = 2048
"""Default of prompt and answer together. A fused graph's cache is allocated for all of it at once."""
_SAMPLES = (
    "Hello world",
    "Hello  world\n\n  a\tb\r\n",
    " leading and trailing ",
    "def f(x):\n    return x + 1  # it's 12345.6789\n",
    "é ü ß 漢字 العربية 😀👍🏽 it's we'll",
)
"""Texts on which two tokenizers have to agree: runs of spaces, newlines, tabs, digits, emoji, several scripts."""


@dataclass(frozen=True)
class GenaiEnvironment:
    """A Python with ONNX Runtime GenAI's model builder.

    Attributes:
        python: the interpreter.
        versions: distribution -> version of what the builder stands on.
    """

    python: Path
    versions: Mapping[str, str]


def find_environment(python: str | Path | None = None) -> GenaiEnvironment | None:
    """The environment that is given, that the environment variable names, or this one.

    Args:
        python: its interpreter; `None` takes `COMP_GENAI_PYTHON`, or, where that isn't set, the running interpreter if
            GenAI is installed beside this package. An empty `COMP_GENAI_PYTHON` stands for none at all.

    Returns:
        `None` if there is none.

    Raises:
        ImportError: it isn't one that the builder runs in; says how to make one.
    """
    here = sys.executable if importlib.util.find_spec("onnxruntime_genai") else None
    given = python or os.environ.get(ENVIRONMENT_VARIABLE, here)
    if not given:
        return None
    # Not resolved: a virtual environment's interpreter is a link, and knows its environment by the link's place.
    path = Path(given).expanduser().absolute()
    if not path.is_file():
        raise ImportError(f"there is no Python at {given}. {_how_to()}")
    names = ("onnxruntime-genai", "onnxruntime", "transformers", "torch", "onnx-ir")
    done = _run(path, ["-c", _VERSIONS, *names])
    if done.returncode != 0:
        raise ImportError(f"{given} doesn't run as a Python interpreter: {_last_lines(done.stderr)} {_how_to()}")
    versions = json.loads(done.stdout)
    missing = [name for name in names if name not in versions]
    if missing:
        raise ImportError(f"the environment of {given} has no {', '.join(missing)}. {_how_to()}")
    if _numbers(versions["onnxruntime-genai"]) >= _NEEDS_TRANSFORMERS_5 and _numbers(versions["transformers"]) < (5,):
        raise ImportError(
            f"the environment of {given} has transformers {versions['transformers']}; GenAI's builder "
            f"{versions['onnxruntime-genai']} needs 5. {_how_to()}"
        )
    return GenaiEnvironment(path, versions)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def require_environment(python: str | Path | None = None) -> GenaiEnvironment:
    """`find_environment`, which there has to be.

    Raises:
        ImportError: there is none; says how to make one.
    """
    found = find_environment(python)
    if found is None:
        raise ImportError(f"ONNX Runtime GenAI's model builder isn't installed. {_how_to()}")
    return found


def _how_to() -> str:
    packages = " ".join(f"'{name}'" for name in REQUIREMENTS)
    return (
        "Install it beside this package with\n"
        "  pip install 'optimum-comp[genai]'\n"
        "or make an environment of its own with\n"
        "  python3 -m venv genai-env\n"
        f"  genai-env/bin/pip install {packages}\n"
        f"  export {ENVIRONMENT_VARIABLE}=$PWD/genai-env/bin/python"
    )


def run_builder(
    checkpoint: Path, folder: Path, environment: GenaiEnvironment, precision: str, **options: str | int
) -> None:
    """Run GenAI's model builder on the CPU provider.

    Args:
        checkpoint: a folder that transformers opens.
        folder: gets `model.onnx`, `model.onnx.data`, `genai_config.json` and a tokenizer.
        environment: where to run.
        precision: `int8`, `int4` or `fp32`.
        options: the builder's `--extra_options`.

    Raises:
        RuntimeError: it failed; with its last lines.
    """
    with tempfile.TemporaryDirectory() as cache:
        arguments = ["-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint.resolve()), "-o", str(folder)]
        arguments += ["-p", precision, "-e", "cpu", "-c", cache]
        # A cache of whole length for layers with a window too: one that is as short needs GenAI to turn it.
        options = {"windowed_kv_cache": "false", **options}
        arguments += ["--extra_options", *(f"{key}={value}" for key, value in options.items())]
        done = _run(environment.python, arguments)
    if done.returncode != 0 or not (folder / MODEL_NAME).is_file():
        raise RuntimeError(f"GenAI's model builder failed on {checkpoint}: {_reason(done)}")


def _run(python: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    # -I: nothing of this process's environment, which has other versions, may get into that one's imports.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(
        [str(python), "-I", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last lines of a process that failed, or how it ended where it said nothing: a crash does so."""
    return _last_lines(done.stderr or done.stdout) or f"the process ended with status {done.returncode}."


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-3:])


def write_config(folder: Path, graph_name: str, *, built: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `genai_config.json` for a graph in an ONNX folder.

    Names and sizes are the graph's own; tokens that end an answer and how to choose the next one are those of the
    model's generation config.

    Args:
        folder: holds the graph and `config.json`.
        graph_name: the graph's file.
        built: the builder's own configuration, if it has made the graph; what describes the decoder is taken from it.

    Returns:
        What was written.

    Raises:
        ValueError: GenAI has no way to run the graph; says why.
    """
    settings = genai_config(folder, graph_name)
    if built is not None:
        settings["model"]["type"] = built["model"]["type"]
        settings["model"]["decoder"] = {**built["model"]["decoder"], "filename": graph_name}
        for key in ("past_present_share_buffer", "chunk_size"):
            if key in built["search"]:
                settings["search"][key] = built["search"][key]
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return settings


def genai_config(folder: Path, graph_name: str = MODEL_NAME) -> dict[str, Any]:
    """What `genai_config.json` has to say for a graph that Optimum has exported.

    Args:
        folder: holds the graph, `config.json` and perhaps `generation_config.json`.
        graph_name: the graph's file.

    Raises:
        ValueError: layers have caches of different shapes, or no token ends an answer.
    """
    import onnx
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    generation = _generation_settings(folder)
    graph = onnx.load(folder / graph_name, load_external_data=False).graph
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
        "filename": graph_name,
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
        # The exported graph makes a longer cache at every token instead of writing into one that is there.
        "past_present_share_buffer": False,
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
    # A fused graph leaves the width open.
    known = {width for _, width in shapes if width} or {0}
    if len({heads for heads, _ in shapes}) != 1 or len(known) != 1:
        raise ValueError("the layers' caches differ in shape, and GenAI's configuration has one shape for all.")
    return shapes[0][0], known.pop(), len(shapes) // 2


def mend_tokenizer(folder: Path) -> list[str]:
    """Make GenAI read a byte-level tokenizer right where only its decoder or its class misleads it.

    GenAI takes the way of splitting text from the decoder and the class name. A byte-level vocabulary with a decoder
    made for SentencePiece (as conversions from GGUF write it), or with a Llama class, gets unknown tokens for every
    space and newline. Such files are rewritten, if that changes nothing in what transformers makes of them: the same
    ids and the same text on spaces, newlines, emoji and the model's own special tokens.

    Args:
        folder: an ONNX folder; its own copies of the tokenizer's files are changed.

    Returns:
        What was changed, or why GenAI may not read the tokenizer; nothing if there is nothing to say.
    """
    from transformers import AutoTokenizer

    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.is_file():
        return ["There is no tokenizer.json, which GenAI needs to turn text into tokens."]
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    settings = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.is_file() else {}
    byte_level = _byte_level(tokenizer.get("decoder"))
    if tokenizer["model"].get("type") != "BPE" or _byte_level(tokenizer.get("pre_tokenizer")) is None:
        return []
    class_name = str(settings.get("tokenizer_class", ""))
    if tokenizer["decoder"] == byte_level and not class_name.startswith("Llama"):
        return []
    mended = {**tokenizer, "model": {**tokenizer["model"]}}
    mended["decoder"] = byte_level or {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    if "byte_fallback" in mended["model"]:
        mended["model"]["byte_fallback"] = False
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        candidate = Path(scratch)
        copy_companions(folder, candidate)
        (candidate / path.name).write_text(json.dumps(mended, ensure_ascii=False), encoding="utf-8")
        inputs = list(AutoTokenizer.from_pretrained(folder).model_input_names)
        # What a model is given follows from the class unless it is said.
        plain = {**settings, "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
        (candidate / settings_path.name).write_text(
            json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if _encodings(folder) != _encodings(candidate):
            return [
                "GenAI may read this tokenizer wrong: it has a byte-level vocabulary with a decoder for another kind, "
                "and can't be rewritten without changing its tokens."
            ]
        for name in (path.name, settings_path.name):
            shutil.move(candidate / name, folder / name)
    return [
        "tokenizer.json and tokenizer_config.json were rewritten as a plain byte-level tokenizer, since GenAI reads "
        "them wrong otherwise; token ids and texts are the same on the texts that were compared."
    ]


def _byte_level(part: Any) -> dict[str, Any] | None:
    """The byte-level step of a tokenizer's decoder or pre-tokenizer, alone or in a sequence."""
    if not isinstance(part, dict):
        return None
    steps = [part, *part.get("decoders", ()), *part.get("pretokenizers", ())]
    return next((step for step in steps if step.get("type") == "ByteLevel"), None)


def _encodings(folder: Path) -> list[Any]:
    """What transformers makes of the samples, of the special tokens and of a chat with this folder's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*_SAMPLES, "".join(f"{token} x\n" for token in tokenizer.all_special_tokens)]
    found: list[Any] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)]
    found.append(sorted(tokenizer("x")))
    if tokenizer.chat_template:
        texts.append(chat_text(tokenizer, _SAMPLES[1]))
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [text, ids, tokenizer(text)["input_ids"]]
        found += [tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)]
    return found


def chat_text(tokenizer: Any, question: str) -> str:
    """A question as the model's chat template puts it, up to where the answer begins."""
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def try_in_genai(folder: Path, environment: GenaiEnvironment, prompt: Sequence[int], new_tokens: int) -> GenaiTrial:
    """Open a folder with GenAI, generate greedily, and encode texts with its tokenizer.

    Args:
        folder: holds a graph and `genai_config.json`.
        environment: where GenAI is.
        prompt: token ids.
        new_tokens: how many to generate, whatever they are.

    Raises:
        RuntimeError: GenAI doesn't open or run it; with its last lines.
    """
    job = {"folder": str(folder), "prompt": list(prompt), "new_tokens": new_tokens, "texts": _SAMPLES, "mark": _FOUND}
    done = _run(environment.python, ["-c", _TRIAL, json.dumps(job)])
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith(_FOUND):
            found |= json.loads(line.removeprefix(_FOUND))
    if "tokens" not in found:
        raise RuntimeError(f"GenAI doesn't run {folder}: {_reason(done)}")
    return GenaiTrial(found["tokens"], found.get("encodings"))


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
        expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _SAMPLES]
        return self.encodings == expected


_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        continue
print(json.dumps(found))
"""

_FOUND = "found: "
"""Begins the lines of a trial's output that are its result."""

_TRIAL = """
import json, sys
import onnxruntime_genai as genai
job = json.loads(sys.argv[1])
model = genai.Model(job["folder"])
length = len(job["prompt"]) + job["new_tokens"]
settings = genai.GeneratorParams(model)
settings.set_search_options(do_sample=False, min_length=length, max_length=length)
generator = genai.Generator(model, settings)
generator.append_tokens(job["prompt"])
for _ in range(job["new_tokens"]):
    generator.generate_next_token()
tokens = [int(token) for token in generator.get_sequence(0)][len(job["prompt"]):]
print(job["mark"] + json.dumps({"tokens": tokens}), flush=True)
# A tokenizer that it doesn't know may end the process (0.15).
try:
    tokenizer = genai.Tokenizer(model)
    encodings = [[int(token) for token in tokenizer.encode(text)] for text in job["texts"]]
except Exception as error:
    print(error, file=sys.stderr)
    encodings = None
print(job["mark"] + json.dumps({"encodings": encodings}), flush=True)
"""
