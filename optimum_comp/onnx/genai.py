"""ONNX Runtime GenAI: its configuration for our graphs, a tokenizer that it reads right, and its own model builder.

GenAI runs the exported graph as it is. Its builder writes a graph with attention as one operator, which generates
faster; it needs transformers 5, which Optimum's ONNX part excludes, so it runs in a Python environment of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_comp.atomic import atomic_folder, check_folder
from optimum_comp.onnx.export import check_checkpoint
from optimum_comp.onnx.folders import MODEL_NAME, copy_companions, graph_bytes
from optimum_comp.onnx.graph import matrices
from optimum_comp.utils import get_logger


logger = get_logger(__name__)

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

MAX_LENGTH = 2048
"""Default of prompt and answer together. A fused graph's cache is allocated for all of it at once."""

BLOCK_SIZES = {8: 64, 4: 32}
"""Bits of the builder's weights -> weights that share a scale, unless asked for otherwise."""

_EMBEDDING = "model.embed_tokens.weight"
_SMALL_TENSOR = 1024
"""Bytes up to which a tensor stays in the graph's own file."""

_FUSED_TOLERANCE = 1e-3
"""Of a logit of the fused graph, relative to the largest one."""

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


@dataclass(frozen=True)
class GenaiReport:
    """What the builder made.

    Attributes:
        output: the folder; GenAI and `ORTModelForCausalLM` open it.
        bits: of the weights.
        size_bytes: of the graph and its weights.
        seconds: it took.
        notes: what a user has to know.
        versions: of the environment.
    """

    output: Path
    bits: int
    size_bytes: int
    seconds: float
    notes: tuple[str, ...]
    versions: Mapping[str, str]


def find_environment(python: str | Path | None = None) -> GenaiEnvironment | None:
    """The environment that is given, or that the environment variable names.

    Args:
        python: its interpreter; `None` takes `COMP_GENAI_PYTHON`.

    Returns:
        `None` if neither is there.

    Raises:
        ImportError: it isn't one that the builder runs in; says how to make one.
    """
    given = python or os.environ.get(ENVIRONMENT_VARIABLE)
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
    if int(versions["transformers"].split(".")[0]) < 5:
        raise ImportError(
            f"the environment of {given} has transformers {versions['transformers']}; GenAI's builder needs 5. "
            f"{_how_to()}"
        )
    return GenaiEnvironment(path, versions)


def require_environment(python: str | Path | None = None) -> GenaiEnvironment:
    """`find_environment`, which there has to be.

    Raises:
        ImportError: there is none; says how to make one.
    """
    found = find_environment(python)
    if found is None:
        raise ImportError(f"ONNX Runtime GenAI's model builder needs a Python environment of its own. {_how_to()}")
    return found


def _how_to() -> str:
    packages = " ".join(f"'{name}'" for name in REQUIREMENTS)
    return (
        "Make one with\n"
        "  python3 -m venv genai-env\n"
        f"  genai-env/bin/pip install {packages}\n"
        f"  export {ENVIRONMENT_VARIABLE}=$PWD/genai-env/bin/python"
    )


def build_genai(
    checkpoint: str | Path,
    output: str | Path,
    *,
    bits: int,
    python: str | Path | None = None,
    block_size: int | None = None,
    overwrite: bool = False,
) -> GenaiReport:
    """Build a decoder with fused attention from a float checkpoint, with GenAI's own rounding of the weights.

    The builder runs offline in a process of its own. What it leaves in float although it is in the file at 8 bits
    already, the embedding that is tied to the head, reads the head's weights.

    Args:
        checkpoint: a safetensors checkpoint of an architecture that the builder knows.
        output: the folder to make.
        bits: of the weights: 8 or 4.
        python: interpreter of the builder's environment; `None` takes `COMP_GENAI_PYTHON`.
        block_size: weights that share a scale; 64 of 8 bits and 32 of 4 if not given.
        overwrite: replace a model that is in `output`.

    Raises:
        FileExistsError: the output exists and isn't to be, or may not be, overwritten.
        ImportError: there is no environment to build in; says how to make one.
        RuntimeError: the builder failed; with its last lines.
        ValueError: `checkpoint` isn't a checkpoint, or other bits or blocks than those possible.
    """
    started = time.perf_counter()
    if bits not in BLOCK_SIZES:
        raise ValueError(f"bits={bits!r} is not valid: it must be one of {', '.join(map(str, BLOCK_SIZES))}.")
    block_size = BLOCK_SIZES[bits] if block_size is None else block_size
    if block_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"block_size={block_size!r} is not valid: it must be 16, 32, 64, 128 or 256.")
    source = Path(checkpoint)
    check_checkpoint(source)
    check_folder(output, overwrite=overwrite, sources=[source])
    environment = require_environment(python)
    with atomic_folder(output, overwrite=overwrite, sources=[source]) as folder:
        run_builder(source, folder, environment, f"int{bits}", block_size=block_size)
        _finish_built(folder, source)
        # The builder saves what transformers 5 has read, under names that version 4 refuses.
        for written in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / written).unlink(missing_ok=True)
        copy_companions(source, folder)
        shutil.copyfile(source / "config.json", folder / "config.json")
        built = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        write_config(folder, MODEL_NAME, built=built)
        notes = mend_tokenizer(folder)
        size = graph_bytes(folder)
    seconds = time.perf_counter() - started
    return GenaiReport(Path(output), bits, size, seconds, tuple(notes), environment.versions)


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
        raise RuntimeError(f"GenAI's model builder failed on {checkpoint}: {_last_lines(done.stderr or done.stdout)}")


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
    heads, head_size, layers = _cache_shape(graph)
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


def _cache_shape(graph: Any) -> tuple[int, int, int]:
    """Heads and width of the keys that a layer caches, and the number of layers."""
    shapes = []
    for value in graph.input:
        if re.fullmatch(r"past_key_values\.\d+\.(key|value)", value.name):
            dimensions = value.type.tensor_type.shape.dim
            shapes.append((dimensions[1].dim_value, dimensions[3].dim_value))
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
    job = {"folder": str(folder), "prompt": list(prompt), "new_tokens": new_tokens, "texts": _SAMPLES}
    done = _run(environment.python, ["-c", _TRIAL, json.dumps(job)])
    if done.returncode != 0:
        raise RuntimeError(f"GenAI doesn't run {folder}: {_last_lines(done.stderr)}")
    found = json.loads(done.stdout.splitlines()[-1])
    return GenaiTrial(found["tokens"], found["encodings"])


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
try:
    tokenizer = genai.Tokenizer(model)
    encodings = [[int(token) for token in tokenizer.encode(text)] for text in job["texts"]]
except Exception as error:
    print(error, file=sys.stderr)
    encodings = None
print(json.dumps({"tokens": tokens, "encodings": encodings}))
"""


def _finish_built(folder: Path, checkpoint: Path) -> None:
    """Mend what the builder leaves undone.

    The look-up of a tied embedding, which it leaves in float at 8 bits, reads the head's weights.
    """
    import onnx
    import onnx_ir
    from transformers import AutoConfig

    from optimum_comp.onnx.blocks import share_with_embedding

    config = AutoConfig.from_pretrained(checkpoint)
    model = onnx.load(folder / MODEL_NAME)
    _set_window(model.graph, config)
    heads = [node.op_type for node in model.graph.node if "logits" in node.output]
    if config.tie_word_embeddings and heads == ["MatMulNBits"] and _EMBEDDING in _names(model.graph.initializer):
        share_with_embedding(model.graph, _EMBEDDING, "logits")
    save_with_data(onnx_ir.from_proto(model), folder / MODEL_NAME)


def _set_window(graph: Any, config: Any) -> None:
    """Give a model whose every layer looks back no further than a window that window.

    The builder does so only where the config tells layer by layer (`layer_types`), which Mistral's doesn't.
    """
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "layer_types", None) or not getattr(config, "use_sliding_window", True):
        return
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "GroupQueryAttention" and attribute.name == "local_window_size":
                attribute.i = window


def save_with_data(model: Any, path: Path) -> None:
    """Write a model of `onnx_ir`, its weights in one file beside it that a runtime can map into memory."""
    import onnx_ir

    # The alignment is that of memory mapping on Windows, the coarsest there is.
    onnx_ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=_SMALL_TENSOR, alignment=65536)


def fuse(exported: Path, checkpoint: Path, environment: GenaiEnvironment, target: Path) -> dict[str, Any]:
    """Write a graph with fused attention that has the exported graph's quantized weights.

    GenAI's builder makes the graph from the float checkpoint; each of its products, and the look-up of the embedding,
    are then given the weights of the exported graph. Weights that this one has in a file of their own stay there: both
    graphs read that file.

    Args:
        exported: a quantized graph that `can_be_fused`.
        checkpoint: the float checkpoint that it was exported from.
        environment: where the builder is.
        target: the file to write, beside `exported`.

    Returns:
        The builder's `genai_config.json`.

    Raises:
        RuntimeError: the builder failed, or its graph isn't made of the same products, or computes something else.
        ValueError: it can't be fused.
    """
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data
    from transformers import AutoConfig

    source = onnx.load(exported, load_external_data=False)
    if not can_be_fused(source.graph):
        raise ValueError(f"{exported} has weights that aren't stored in blocks, which a fused graph can't take.")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch)
        # Separate q, k and v: as fast, and each has its counterpart. The rounded weights are not used.
        run_builder(checkpoint, folder, environment, "int8", block_size=64, fuse_qkv="false")
        built = onnx.load(folder / MODEL_NAME, load_external_data=False)
        _set_window(built.graph, AutoConfig.from_pretrained(checkpoint))
        given = _give_weights(source.graph, built.graph)
        for tensor in built.graph.initializer:
            if tensor.name not in given and uses_external_data(tensor):
                load_external_data_for_tensor(tensor, str(folder))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
        settings: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    onnx.save(built, target)
    _compare(exported, target, _cache_shape(source.graph)[:2])
    return settings


def can_be_fused(graph: Any) -> bool:
    """Whether a quantized graph's dense layers are of a kind that a fused graph can take: in blocks, or in float."""
    kinds = {node.op_type for node in graph.node}
    heads = {node.op_type for node in graph.node if "logits" in node.output}
    return heads == {"MatMulNBits"} and "MatMulInteger" not in kinds


def _give_weights(source: Any, built: Any) -> set[str]:
    """Replace the weights of the builder's products and of its look-up by the source's, in place.

    Returns:
        Names of the source's tensors that are in the builder's graph now.

    Raises:
        RuntimeError: a product has no counterpart of its size.
    """
    ours, theirs = _products(source), _products(built)
    sizes = [
        {place: _size(graph, node) for place, node in found.items()}
        for graph, found in ((source, ours), (built, theirs))
    ]
    differing = [place for place in sorted({*ours, *theirs}) if sizes[0].get(place) != sizes[1].get(place)]
    if differing:
        raise RuntimeError(
            "GenAI's builder makes other products of this model than Optimum's export; the first that differs: "
            f"{differing[0]}."
        )
    needed = set()
    for place, node in theirs.items():
        mine = ours[place]
        node.op_type, node.domain = mine.op_type, mine.domain
        del node.input[1:], node.attribute[:]
        node.input.extend(mine.input[1:])
        node.attribute.extend(mine.attribute)
        needed |= set(mine.input[1:])
    nodes, result = _lookup(source)
    renamed = []
    for node in built.node:
        if node.op_type != "Gather" or node.input[0] != _EMBEDDING:
            renamed.append(node)
            continue
        for part in nodes:
            copied = type(part)()
            copied.CopyFrom(part)
            copied.output[:] = [node.output[0] if name == result else name for name in part.output]
            renamed.append(copied)
            needed |= set(part.input)
    del built.node[:]
    built.node.extend(renamed)
    used = {name for node in built.node for name in node.input}
    kept = [tensor for tensor in built.initializer if tensor.name in used and tensor.name not in needed]
    given = [tensor for tensor in source.initializer if tensor.name in needed]
    del built.initializer[:]
    built.initializer.extend([*kept, *given])
    # What the builder notes of shapes is of tensors that may be gone.
    del built.value_info[:]
    return _names(given)


def _place(node: Any) -> str:
    """A product's place in the model, the same in both graphs: `layers.0/attn/q_proj`."""
    name = re.sub(r"(/MatMul)?(_Q\d+)?$", "", node.name).removeprefix("/model/").removeprefix("/")
    return name.replace("/self_attn/", "/attn/")


def _products(graph: Any) -> dict[str, Any]:
    """Place -> multiplication by a weight, in blocks or in float."""
    weights = matrices(graph)
    return {
        _place(node): node
        for node in graph.node
        if node.op_type == "MatMulNBits" or (node.op_type == "MatMul" and node.input[1] in weights)
    }


def _size(graph: Any, node: Any) -> tuple[int, int]:
    if node.op_type == "MatMul":
        rows, columns = matrices(graph)[node.input[1]].dims
        return rows, columns
    found = {attribute.name: attribute.i for attribute in node.attribute}
    return found["K"], found["N"]


def _lookup(graph: Any) -> tuple[list[Any], str]:
    """The nodes that make the embedding of the tokens, in order, and the name of what they make."""
    users = [node for node in graph.node if "input_ids" in node.input]
    lookups = [node for node in users if node.op_type in ("Gather", "GatherBlockQuantized")]
    tables = _names(graph.initializer)
    (lookup,) = (node for node in lookups if node.input[0] in tables)
    result, following = lookup.output[0], {"Reshape", "DequantizeLinear"}
    while True:
        readers = [node for node in graph.node if result in node.input]
        if len(readers) != 1 or readers[0].op_type not in following:
            break
        result = readers[0].output[0]
    needed, nodes = {result}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    return nodes[::-1], result


def _names(values: Any) -> set[str]:
    return {value.name for value in values}


class CachedGraph:
    """A decoder's graph in ONNX Runtime, with its cache: what has been read so far, batch 1.

    Args:
        path: the graph.
        heads: of a layer's cache.
        width: of a head.
    """

    def __init__(self, path: Path, heads: int, width: int):
        import numpy as np
        from onnxruntime import InferenceSession

        self._session = InferenceSession(path, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]
        past = [name for name in self._inputs if name.startswith("past_key_values.")]
        self._cache = {name: np.zeros((1, heads, 0, width), np.float32) for name in past}
        self._read = 0

    def logits(self, tokens: Sequence[int]) -> Any:
        """Logits `[len(tokens), vocabulary]` of tokens that follow those that were read before."""
        import numpy as np

        start, self._read = self._read, self._read + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, self._read), np.int64),
            "position_ids": np.arange(start, self._read)[None],
        }
        given = {name: value for name, value in feeds.items() if name in self._inputs}
        values = dict(zip(self._outputs, self._session.run(None, given | self._cache), strict=True))
        self._cache = {name: values[name.replace("past_key_values", "present")] for name in self._cache}
        return values["logits"][0]


def greedy_tokens(exported: Path, graph: Path, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The tokens that ONNX Runtime generates with a graph, whatever they are.

    Args:
        exported: Optimum's graph of the model, which says how large the cache is.
        graph: the graph to run.
        prompt: token ids.
        new_tokens: how many to generate.
    """
    import onnx

    heads, width, _ = _cache_shape(onnx.load(exported, load_external_data=False).graph)
    decoder = CachedGraph(graph, heads, width)
    found: list[int] = []
    step = list(prompt)
    for _ in range(new_tokens):
        step = [int(decoder.logits(step)[-1].argmax())]
        found += step
    return found


def _compare(exported: Path, fused: Path, cache: tuple[int, int]) -> None:
    """Make sure that two graphs compute the same, at a prompt and after it.

    Both multiply in float32 for it: activations that are rounded to 8 bits at other places would hide a mistake.

    Args:
        exported: one graph.
        fused: the other, in the same folder.
        cache: heads and width of a layer's cache.

    Raises:
        RuntimeError: they don't.
    """
    import numpy as np

    tokens = np.random.default_rng(0).integers(_vocabulary(exported), size=24).tolist()
    found = []
    for path in (exported, fused):
        # Beside the graph, since the weights' file has to be in the same folder.
        exact = path.with_name(f"exact_{path.name}")
        try:
            _write_exact(path, exact)
            decoder = CachedGraph(exact, *cache)
            found.append((decoder.logits(tokens[:16]), decoder.logits(tokens[16:])))
            del decoder
        finally:
            exact.unlink(missing_ok=True)
    for name, one, other in zip(("prefill", "cached continuation"), *found, strict=True):
        difference = float(np.abs(other - one).max())
        bound = _FUSED_TOLERANCE * max(1.0, float(np.abs(one).max()))
        # Written so that NaN fails too.
        if not difference <= bound:
            raise RuntimeError(
                f"the graph with fused attention disagrees with the exported one: their logits differ by up to "
                f"{difference:.3g} ({name}), more than {bound:.3g}."
            )
        logger.info("The fused graph's logits differ by at most %.2g (%s).", difference, name)


def _vocabulary(path: Path) -> int:
    import onnx

    outputs = {value.name: value for value in onnx.load(path, load_external_data=False).graph.output}
    return int(outputs["logits"].type.tensor_type.shape.dim[-1].dim_value)


def _write_exact(path: Path, target: Path) -> None:
    """Copy a graph, its products set to multiply in float32."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(model, target)
