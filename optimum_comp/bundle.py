"""A folder to copy to a phone: the quantized model for Optimum and for ONNX Runtime GenAI, with a manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_comp import __version__
from optimum_comp.files import STAGE_RECORD, atomic_folder, check_folder, check_model, file_digest, write_record
from optimum_comp.onnx.export import check_checkpoint
from optimum_comp.onnx.folders import MODEL_NAME, copy_companions
from optimum_comp.onnx.fused import can_be_fused, fuse, greedy_tokens
from optimum_comp.onnx.genai import (
    CONFIG_NAME,
    GenaiEnvironment,
    chat_text,
    find_environment,
    genai_config,
    mend_tokenizer,
    require_environment,
    try_in_genai,
    write_config,
)
from optimum_comp.onnx.graph import save_with_data
from optimum_comp.onnx.noise import without_noise
from optimum_comp.onnx.quantization import check_onnx_folder
from optimum_comp.onnx.recipes import find_target
from optimum_comp.onnx.runtime import require_onnxruntime
from optimum_comp.utils import format_bytes, get_logger, shown


logger = get_logger(__name__)

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "optimum-comp-bundle", 1

FUSED_NAME = "model_fused.onnx"
"""Not another `model.onnx` in a folder below: Optimum looks through those too, and takes any of several."""

EXTERNAL_DATA_BYTES = 100_000_000
"""Size of a graph with its weights above which these get a file of their own, for a phone to map into memory."""

_TRIAL_TEXT, _TRIAL_TOKENS = "The capital of France is", 8

_MODULES = ("optimum", "transformers", "torch", "onnx", "onnxruntime")
"""What a bundle depends on, as it is imported: `onnxruntime` is there from one of several distributions."""

_MANIFEST_BYTES = 10_000_000
"""A manifest has some hundred bytes a file; more isn't read."""


class BundleError(ValueError):
    """A bundle isn't what its manifest says."""


@dataclass(frozen=True)
class BundleReport:
    """What a bundle holds.

    Attributes:
        output: the folder.
        target: name of the processor it is for.
        recipe: name of the quantization recipe; `None` if the folder it was made from doesn't say.
        files: path in the folder -> size in bytes, the manifest aside.
        genai_graph: the graph that GenAI runs: `model_fused.onnx`, or `model.onnx`.
        genai_agrees: whether GenAI, when the bundle was made, generated what ONNX Runtime generates; `None` if it
            wasn't tried, for want of an environment with GenAI.
        notes: what a user has to know.
        seconds: it took to write, or 0.
    """

    output: Path
    target: str
    recipe: str | None
    files: dict[str, int]
    genai_graph: str
    genai_agrees: bool | None
    notes: list[str]
    seconds: float = 0.0

    @property
    def size_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(self.files.values())

    def text(self) -> str:
        """What was made, in a few lines."""
        lines = [f"{self.output}: {format_bytes(self.size_bytes)} in {len(self.files)} files for {self.target}."]
        tried = {True: "and gives ONNX Runtime's tokens", False: "but gives other tokens", None: "which wasn't tried"}
        lines.append(f"ONNX Runtime GenAI runs {self.genai_graph}, {tried[self.genai_agrees]}.")
        return "\n".join([*lines, *self.notes])


def write_bundle(
    quantized: str | Path,
    output: str | Path,
    *,
    target: str,
    ort_format: bool = False,
    checkpoint: str | Path | None = None,
    genai: bool | None = None,
    genai_python: str | Path | None = None,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> BundleReport:
    """Make a self-contained folder of a quantized model.

    It opens with `ORTModelForCausalLM.from_pretrained` and with ONNX Runtime GenAI. With the float checkpoint and an
    environment of GenAI's model builder, it also gets `model_fused.onnx`: the same weights, in the same file, in a
    graph with attention as one operator, with which GenAI generates half as fast again.

    Args:
        quantized: an ONNX folder as `quantize_onnx` makes it.
        output: the folder to make.
        target: a key of `TARGETS`: the processor that the bundle is for.
        ort_format: add `model.ort` and the configuration of a minimal build of ONNX Runtime that it needs.
        checkpoint: the float checkpoint that was exported and quantized.
        genai: whether to make the fused graph; `None` makes it if there are checkpoint, environment and a recipe that
            stores all weights in blocks.
        genai_python: interpreter of an environment with ONNX Runtime GenAI; see `find_environment`.
        external_data_bytes: size above which weights get a file of their own. With a fused graph they always do.
        overwrite: replace a bundle or a model that is in `output`.
        record: what the output is to be known by; one of the bundle's files.

    Raises:
        FileExistsError: the output exists and isn't to be, or may not be, overwritten.
        ImportError: the `onnxruntime` extra isn't installed, or there is no environment to make the fused graph in.
        RuntimeError: a graph that was made computes something else than the one it was made of.
        ValueError: no such target, no model in `quantized`, a fused graph is asked for that can't be made, or
            `output` is in a folder that is read from.
    """
    started = time.perf_counter()
    source = Path(quantized)
    float_checkpoint = None if checkpoint is None else Path(checkpoint)
    find_target(target)
    check_model(source)
    check_onnx_folder(source)
    if genai and float_checkpoint is None:
        raise ValueError("the fused graph is made from the float checkpoint; give checkpoint.")
    if float_checkpoint is not None:
        check_checkpoint(float_checkpoint)
    sources = [path for path in (source, float_checkpoint) if path is not None]
    check_folder(output, overwrite=overwrite, sources=sources)
    require_onnxruntime()
    genai_config(source)
    environment = require_environment(genai_python) if genai else find_environment(genai_python)
    recipe = _recipe_of(source)
    notes: list[str] = []
    if recipe.get("target", "any") not in ("any", target):
        notes.append(f"The model was quantized for {recipe['target']}, not for {target}.")
    fusing = float_checkpoint if _is_fused(source, float_checkpoint, environment, genai, notes) else None

    with atomic_folder(output, overwrite=overwrite, sources=sources) as folder, without_noise():
        copy_companions(source, folder)
        for name in ("config.json", "ort_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        _copy_graph(source, folder, separate=fusing is not None, limit=external_data_bytes)
        built = None
        if fusing is not None and environment is not None:
            built = _fuse(folder, fusing, environment, genai, notes)
        graph = MODEL_NAME if built is None else FUSED_NAME
        write_config(folder, graph, built=built)
        notes += mend_tokenizer(folder)
        if ort_format:
            _write_ort_format(folder, target)
        agrees = None if environment is None else _try(folder, environment, graph, notes)
        report = BundleReport(Path(output), target, recipe.get("name"), {}, graph, agrees, notes)
        if record is not None:
            write_record(folder, record)
        (folder / "README.md").write_text(_readme(folder, report, Path(output).resolve().name), encoding="utf-8")
        _write_manifest(folder, report, recipe, environment)
        files = _sizes(folder)
    return dataclasses.replace(report, files=files, seconds=time.perf_counter() - started)


def verify_bundle(folder: str | Path) -> BundleReport:
    """Check every file of a bundle against its manifest.

    Returns:
        What the bundle holds.

    Raises:
        BundleError: there is no manifest that this version reads, or a file is missing, differs or isn't listed;
            names it.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}.")
    report, digests = _read_manifest(folder)
    for name, size in report.files.items():
        path = folder / name
        try:
            _check_file(folder, path, size, digests[name])
        # Of a name that is too long for the file system, for one.
        except OSError as error:
            raise BundleError(f"{shown(path)} can't be read: {error.strerror}.") from error
    for path in sorted(folder.rglob("*")):
        _check_inside(folder, path)
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in report.files and name != MANIFEST:
            raise BundleError(f"{path} is not in the manifest.")
    return report


def _read_manifest(folder: Path) -> tuple[BundleReport, dict[str, str]]:
    """What a bundle holds by its manifest, and path in the folder -> SHA-256 as the manifest says.

    Raises:
        BundleError: it isn't one that this version reads; says why.
    """
    path = folder / MANIFEST
    try:
        _check_inside(folder, path)
        if path.stat().st_size > _MANIFEST_BYTES:
            raise ValueError(f"it has more than {format_bytes(_MANIFEST_BYTES)}.")
        manifest = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        if _entry(manifest, "format", str) != FORMAT:
            raise BundleError(f"{path} is not of the format {FORMAT}.")
        version = _entry(manifest, "format_version", int)
        if version != FORMAT_VERSION:
            raise BundleError(f"{path} has format version {version}; this package reads {FORMAT_VERSION}.")
        sizes: dict[str, int] = {}
        digests: dict[str, str] = {}
        for entry in _entry(manifest, "files", list):
            name = _entry(entry, "path", str)
            if not _is_inside(name):
                raise BundleError(f"{path} names {name!r}, which is not in the bundle.")
            if name in sizes:
                raise ValueError(f"it names {name!r} twice.")
            sizes[name], digests[name] = _entry(entry, "bytes", int), _entry(entry, "sha256", str)
        if sum(sizes.values()) != _entry(manifest, "total_bytes", int):
            raise ValueError(f"its files have {sum(sizes.values())} bytes, not total_bytes.")
        recipe, genai = _entry(manifest, "recipe", dict), _entry(manifest, "genai", dict)
        notes = _entry(manifest, "notes", list)
        if not all(isinstance(note, str) for note in notes):
            raise ValueError("its notes aren't all texts.")
        report = BundleReport(
            folder,
            _entry(manifest, "target", str),
            _entry(recipe, "name", str, type(None)) if "name" in recipe else None,
            sizes,
            _entry(genai, "graph", str),
            _entry(genai, "agrees", bool, type(None)),
            notes,
        )
    except BundleError:
        raise
    # What isn't UTF-8 or JSON, whole numbers of thousands of digits, lists in lists without end.
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error
    if report.genai_graph not in sizes:
        raise BundleError(f"{path} is damaged: {report.genai_graph!r}, which GenAI runs, is not among its files.")
    return report, digests


def _entry(mapping: Any, key: str, *kinds: type) -> Any:
    """An entry of what was read from JSON, of one of the kinds that are asked for.

    Raises:
        ValueError: there is none, or it is something else.
    """
    if not isinstance(mapping, dict):
        raise ValueError(f"there is {type(mapping).__name__} where an object with {key!r} has to be.")
    if key not in mapping:
        raise ValueError(f"it has no {key!r} where there has to be one.")
    # `True` is an int to isinstance.
    if type(mapping[key]) not in kinds:
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{key!r} is {type(mapping[key]).__name__}, not {wanted}.")
    return mapping[key]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which isn't JSON.")


def _is_inside(name: str) -> bool:
    """Whether a name is the plain relative path, on any system, of something in the bundle."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts)
    # A colon makes a drive or a stream on Windows; what doesn't print is no name of ours, and may not be one at all.
    return plain and name.isprintable() and not set(name) & {"\\", ":"}


def _check_inside(folder: Path, path: Path) -> None:
    is_link, home = path.is_symlink(), folder.resolve()
    places = [home]
    if home.parent.name == "snapshots":
        # In the hub's cache, a snapshot's files are links to blobs beside it.
        places.append(home.parent.parent / "blobs")
    try:
        inside = any(path.resolve(strict=is_link).is_relative_to(place) for place in places)
    # A link to nothing, or to itself.
    except (OSError, RuntimeError):
        inside = False
    if not inside:
        raise BundleError(f"{path} is a link to what is not in the bundle.")


def _check_file(folder: Path, path: Path, size: int, digest: str) -> None:
    _check_inside(folder, path)
    if not path.is_file():
        raise BundleError(f"{path} is missing.")
    if path.stat().st_size != size:
        raise BundleError(f"{path} has {path.stat().st_size} bytes; the manifest says {size}.")
    if file_digest(path) != digest:
        raise BundleError(f"{path} differs from what the manifest says: its SHA-256 is another.")


def _recipe_of(source: Path) -> dict[str, Any]:
    """The quantization recipe that `quantize_onnx` has noted, without its lists of nodes."""
    path = source / "ort_config.json"
    noted = json.loads(path.read_text(encoding="utf-8")).get("comp_recipe", {}) if path.is_file() else {}
    return {key: value for key, value in noted.items() if key not in ("nodes", "left_in_float")}


def _is_fused(
    source: Path,
    checkpoint: Path | None,
    environment: GenaiEnvironment | None,
    wanted: bool | None,
    notes: list[str],
) -> bool:
    """Whether there will be a fused graph.

    Raises:
        ValueError: it is asked for, and the weights aren't stored in a way that it can take.
    """
    import onnx

    if wanted is False or checkpoint is None or environment is None:
        return False
    if can_be_fused(onnx.load(source / MODEL_NAME, load_external_data=False).graph):
        return True
    problem = f"{source} has weights that aren't stored in blocks, so there is no fused graph; recipe int8 makes one."
    if wanted:
        raise ValueError(problem)
    notes.append(problem)
    return False


def _fuse(
    folder: Path, checkpoint: Path, environment: GenaiEnvironment, wanted: bool | None, notes: list[str]
) -> dict[str, Any] | None:
    """Make the fused graph; where nobody has asked for it, do without if the builder can't."""
    logger.info("Making the graph with fused attention ...")
    try:
        return fuse(folder / MODEL_NAME, checkpoint, environment, folder / FUSED_NAME)
    except RuntimeError as error:
        if wanted:
            raise
        (folder / FUSED_NAME).unlink(missing_ok=True)
        notes.append(f"There is no graph with fused attention: {error}")
        return None


def _copy_graph(source: Path, folder: Path, *, separate: bool, limit: int) -> None:
    import onnx_ir

    model = onnx_ir.load(source / MODEL_NAME)
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    is_separate = any(isinstance(tensor, onnx_ir.ExternalTensor) for tensor in tensors)
    if separate or is_separate or sum(tensor.nbytes for tensor in tensors) > limit:
        save_with_data(model, folder / MODEL_NAME)
    else:
        shutil.copyfile(source / MODEL_NAME, folder / MODEL_NAME)


def _write_ort_format(folder: Path, target: str) -> None:
    """Convert `model.onnx` to `model.ort`, with optimizations that hold for all processors of the target's kind."""
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    platform = "amd64" if target.startswith("x86") else "arm"
    # It tells on its standard output and in its log what it is about to do.
    talker = logging.getLogger("ort_format_model.utils")
    level = talker.level
    talker.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_onnx_models_to_ort(
                folder / MODEL_NAME,
                output_dir=folder,
                optimization_styles=[OptimizationStyle.Fixed],
                target_platform=platform,
                enable_type_reduction=True,
            )
    except Exception as error:
        raise RuntimeError(f"{MODEL_NAME} can't be converted to ORT format: {error}") from error
    finally:
        talker.setLevel(level)


def _try(folder: Path, environment: GenaiEnvironment, graph: str, notes: list[str]) -> bool:
    """Run the bundle in GenAI, and note what a user has to know.

    Returns:
        Whether it generated what ONNX Runtime generates with the same graph.

    Raises:
        RuntimeError: GenAI doesn't open or run it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None
    prompt = list(range(3, 15)) if tokenizer is None else tokenizer(_TRIAL_TEXT)["input_ids"]
    trial = try_in_genai(folder, environment, prompt, _TRIAL_TOKENS)
    expected = greedy_tokens(folder / MODEL_NAME, folder / graph, prompt, _TRIAL_TOKENS)
    if trial.tokens != expected:
        notes.append(f"GenAI generated {trial.tokens} where ONNX Runtime generates {expected} with the same graph.")
    if tokenizer is not None and trial.encodings is None:
        notes.append("GenAI can't open this tokenizer; turn text into tokens outside of it.")
    elif tokenizer is not None and not trial.agrees_with(tokenizer):
        notes.append("GenAI's tokenizer gives other tokens than transformers' on the texts that were compared.")
    return trial.tokens == expected


def _write_manifest(
    folder: Path, report: BundleReport, recipe: dict[str, Any], environment: GenaiEnvironment | None
) -> None:
    sizes = _sizes(folder)
    files = [{"path": name, "bytes": size, "sha256": file_digest(folder / name)} for name, size in sizes.items()]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    versions = _versions()
    if environment is not None:
        versions["onnxruntime-genai"] = environment.versions["onnxruntime-genai"]
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model_type": config["model_type"],
        "target": report.target,
        "recipe": recipe,
        "genai": {"graph": report.genai_graph, "agrees": report.genai_agrees},
        "notes": report.notes,
        "files": files,
        "total_bytes": sum(sizes.values()),
        "versions": versions,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    """Distribution -> version of this package and of what is installed of the modules that it stands on."""
    providers = importlib.metadata.packages_distributions()
    names = sorted({name for module in _MODULES for name in providers.get(module, ())})
    return {name: importlib.metadata.version(name) for name in names} | {"optimum-comp": __version__}


def _sizes(folder: Path) -> dict[str, int]:
    """Path in the folder -> size in bytes, the manifest aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {name: size for name, size in names.items() if name != MANIFEST}


def _readme(folder: Path, report: BundleReport, name: str) -> str:
    files = "\n".join(
        f"| `{path}` | {format_bytes(size)} | {_describe(path)} |" for path, size in _sizes(folder).items()
    )
    quoted = json.dumps(_prompt(folder), ensure_ascii=False)
    settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    texts = {
        "NAME": name,
        "TARGET": report.target,
        "RECIPE": report.recipe or "-",
        "GRAPH": report.genai_graph,
        "LENGTH": str(min(512, settings["search"]["max_length"])),
        "FILES": files,
        "KOTLIN_PROMPT": quoted.replace("$", "\\$"),
        "PROMPT": quoted,
    }
    text = _README
    for key, value in texts.items():
        text = text.replace(f"@{key}@", value)
    return text


def _describe(path: str) -> str:
    known = {
        MODEL_NAME: "graph for Optimum and plain ONNX Runtime",
        f"{MODEL_NAME}.data": "weights, of both graphs where there are two",
        FUSED_NAME: "graph with fused attention, for GenAI",
        "model.ort": "ORT format, for a minimal build of ONNX Runtime",
        "genai_config.json": "how GenAI runs the model",
        "config.json": "architecture",
        "generation_config.json": "how to choose tokens",
        "ort_config.json": "how it was quantized",
        "chat_template.jinja": "how a chat is written",
    }
    if path == STAGE_RECORD:
        return "what it was made from, and how"
    if path in known:
        return known[path]
    if path.endswith(".config"):
        return "operators and types that a minimal build needs"
    return "tokenizer" if path.startswith(("tokenizer", "special_tokens", "vocab", "merges", "added")) else ""


def _prompt(folder: Path) -> str:
    """A chat with `{question}` in it as text, as the model's template puts it."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return "{question}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return chat_text(tokenizer, "{question}") if tokenizer.chat_template else "{question}"


_README = """# @NAME@

A quantized language model (recipe `@RECIPE@`, for `@TARGET@`), made by optimum-comp. Copy the whole folder to the
device. `manifest.json` has the size and SHA-256 of every file.

| file | size | |
| --- | ---: | --- |
@FILES@

## Python, Optimum

`pip install 'optimum-onnx[onnxruntime]' 'onnxruntime>=1.23'`

```python
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

torch.set_num_threads(1)  # its threads get in the way of ONNX Runtime's
folder = "@NAME@"
model = ORTModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = @PROMPT@.replace("{question}", "What is gravity?")
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
answer = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## Python, ONNX Runtime GenAI

`pip install 'onnxruntime-genai>=0.15'`. GenAI runs `@GRAPH@`.

```python
import onnxruntime_genai as genai

model = genai.Model("@NAME@")
tokenizer = genai.Tokenizer(model)
stream = tokenizer.create_stream()
settings = genai.GeneratorParams(model)
settings.set_search_options(max_length=@LENGTH@)
generator = genai.Generator(model, settings)
generator.append_tokens(tokenizer.encode(@PROMPT@.replace("{question}", "What is gravity?")))
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
```

## Android, Kotlin

The archive `onnxruntime-genai-android-VERSION.aar` (0.18 or later) is among the files of ONNX Runtime GenAI's
releases; put it into `app/libs`. Copy this folder to the app's own files, such as `filesDir`: it can't be read from
inside the package.

```kotlin
// build.gradle.kts: implementation(fileTree("libs") { include("*.aar") })
import ai.onnxruntime.genai.Generator
import ai.onnxruntime.genai.GeneratorParams
import ai.onnxruntime.genai.Model
import ai.onnxruntime.genai.Tokenizer

fun answer(folder: String, question: String, onText: (String) -> Unit) {
    val prompt = @KOTLIN_PROMPT@.replace("{question}", question)
    Model(folder).use { model ->
        Tokenizer(model).use { tokenizer ->
            GeneratorParams(model).use { settings ->
                settings.setSearchOption("max_length", @LENGTH@.0)
                Generator(model, settings).use { generator ->
                    tokenizer.createStream().use { stream ->
                        tokenizer.encode(prompt).use { generator.appendTokenSequences(it) }
                        while (!generator.isDone) {
                            generator.generateNextToken()
                            onText(stream.decode(generator.getLastTokenInSequence(0)))
                        }
                    }
                }
            }
        }
    }
}
```

## iOS, Swift

ONNX Runtime GenAI's Objective-C library (0.18 or later), with `#import "ort_genai_objc.h"` in the bridging header. Add
this folder to the app as a folder reference.

```swift
func answer(folder: String, question: String, onText: (String) -> Void) throws {
    let prompt = @PROMPT@.replacingOccurrences(of: "{question}", with: question)
    let model = try OGAModel(path: folder)
    let tokenizer = try OGATokenizer(model: model)
    let stream = try OGATokenizerStream(tokenizer: tokenizer)
    let settings = try OGAGeneratorParams(model: model)
    try settings.setSearchOption("max_length", doubleValue: @LENGTH@)
    let generator = try OGAGenerator(model: model, params: settings)
    try generator.appendTokenSequences(tokenizer.encode(prompt))
    while try !generator.isDone() {
        try generator.generateNextToken()
        let count = generator.sequenceCount(at: 0, error: nil)
        let tokens = try generator.sequenceData(at: 0)
        onText(try stream.decode(tokens[count - 1]))
    }
}
```
"""
