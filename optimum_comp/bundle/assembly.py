"""Putting a bundle together: a folder to copy to a phone, for Optimum and for ONNX Runtime GenAI."""

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
from pathlib import Path
from typing import Any

from optimum_comp import __version__
from optimum_comp.bundle.readme import readme
from optimum_comp.bundle.verification import FORMAT, FORMAT_VERSION, MANIFEST, BundleReport, sizes_of
from optimum_comp.checkpoint.tokenizer import open_tokenizer
from optimum_comp.files import atomic_folder, check_folder, check_model, file_digest, write_record
from optimum_comp.onnx.folders import MODEL_NAME, copy_companions
from optimum_comp.onnx.fused import genai_version
from optimum_comp.onnx.genai import genai_config, try_in_genai, write_config
from optimum_comp.onnx.genai_tokenizer import mend_tokenizer
from optimum_comp.onnx.graph import save_with_data
from optimum_comp.onnx.noise import without_noise
from optimum_comp.onnx.quantization import check_onnx_folder
from optimum_comp.onnx.recipes import find_target
from optimum_comp.onnx.runtime import greedy_tokens, require_onnxruntime


EXTERNAL_DATA_BYTES = 100_000_000
"""Size of a graph with its weights above which these get a file of their own, for a phone to map into memory."""

_TRIAL_TEXT, _TRIAL_TOKENS = "The capital of France is", 8

_MODULES = ("optimum", "transformers", "torch", "onnx", "onnxruntime", "onnxruntime_genai")
"""What a bundle depends on, as it is imported: `onnxruntime` is there from one of several distributions."""


def write_bundle(
    quantized: str | Path,
    output: str | Path,
    *,
    target: str,
    ort_format: bool = False,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> BundleReport:
    """Make a self-contained folder of a quantized model.

    Its one graph opens with `ORTModelForCausalLM.from_pretrained` and with ONNX Runtime GenAI. Where this is
    installed, it generates a few tokens, which are compared with those of ONNX Runtime alone.

    Args:
        quantized: an ONNX folder as `quantize_onnx` makes it.
        output: the folder to make.
        target: a key of `TARGETS`: the processor that the bundle is for.
        ort_format: add `model.ort` and the configuration of a minimal build of ONNX Runtime that it needs.
        external_data_bytes: size above which weights get a file of their own.
        overwrite: replace a bundle or a model that is in `output`.
        record: what the output is to be known by; one of the bundle's files.

    Raises:
        FileExistsError: the output exists and isn't to be, or may not be, overwritten.
        ImportError: the `onnxruntime` extra isn't installed.
        RuntimeError: GenAI is installed and doesn't run the model.
        ValueError: no such target, no model in `quantized`, or `output` is in it.
    """
    started = time.perf_counter()
    source = Path(quantized)
    find_target(target)
    check_model(source)
    check_onnx_folder(source)
    check_folder(output, overwrite=overwrite, sources=[source])
    require_onnxruntime()
    genai_config(source)
    recipe = _recipe_of(source)
    notes: list[str] = []
    if recipe.get("target", "any") not in ("any", target):
        notes.append(f"The model was quantized for {recipe['target']}, not for {target}.")

    with atomic_folder(output, overwrite=overwrite, sources=[source]) as folder, without_noise():
        copy_companions(source, folder)
        for name in ("config.json", "ort_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        _copy_graph(source, folder, limit=external_data_bytes)
        write_config(folder)
        notes += mend_tokenizer(folder)
        if ort_format:
            _write_ort_format(folder, target)
        agrees = None if genai_version() is None else _try(folder, notes)
        report = BundleReport(Path(output), target, recipe.get("name"), {}, MODEL_NAME, agrees, notes)
        if record is not None:
            write_record(folder, record)
        (folder / "README.md").write_text(readme(folder, report, Path(output).resolve().name), encoding="utf-8")
        _write_manifest(folder, report, recipe)
        files = sizes_of(folder)
    return dataclasses.replace(report, files=files, seconds=time.perf_counter() - started)


def _recipe_of(source: Path) -> dict[str, Any]:
    """The quantization recipe that `quantize_onnx` has noted, without its lists of nodes."""
    path = source / "ort_config.json"
    noted = json.loads(path.read_text(encoding="utf-8")).get("comp_recipe", {}) if path.is_file() else {}
    return {key: value for key, value in noted.items() if key not in ("nodes", "left_in_float")}


def _copy_graph(source: Path, folder: Path, *, limit: int) -> None:
    import onnx_ir

    model = onnx_ir.load(source / MODEL_NAME)
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    is_separate = any(isinstance(tensor, onnx_ir.ExternalTensor) for tensor in tensors)
    if is_separate or sum(tensor.nbytes for tensor in tensors) > limit:
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


def _try(folder: Path, notes: list[str]) -> bool:
    """Run the bundle in GenAI, and note what a user has to know.

    Returns:
        Whether it generated what ONNX Runtime generates.

    Raises:
        RuntimeError: GenAI doesn't open or run it.
    """
    tokenizer = open_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    prompt = list(range(3, 15)) if tokenizer is None else tokenizer(_TRIAL_TEXT)["input_ids"]
    trial = try_in_genai(folder, prompt, _TRIAL_TOKENS)
    expected = greedy_tokens(folder / MODEL_NAME, prompt, _TRIAL_TOKENS)
    if trial.tokens != expected:
        notes.append(f"GenAI generated {trial.tokens} where ONNX Runtime generates {expected} with the same graph.")
    if tokenizer is not None and trial.encodings is None:
        notes.append("GenAI can't open this tokenizer; turn text into tokens outside of it.")
    elif tokenizer is not None and not trial.agrees_with(tokenizer):
        notes.append("GenAI's tokenizer gives other tokens than transformers' on the texts that were compared.")
    return trial.tokens == expected


def _write_manifest(folder: Path, report: BundleReport, recipe: dict[str, Any]) -> None:
    sizes = sizes_of(folder)
    files = [{"path": name, "bytes": size, "sha256": file_digest(folder / name)} for name, size in sizes.items()]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
        "versions": _versions(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    """Distribution -> version of this package and of what is installed of the modules that it stands on."""
    providers = importlib.metadata.packages_distributions()
    names = sorted({name for module in _MODULES for name in providers.get(module, ())})
    return {name: importlib.metadata.version(name) for name in names} | {"optimum-comp": __version__}
