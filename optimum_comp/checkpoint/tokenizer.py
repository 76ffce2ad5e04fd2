"""A tokenizer's files, carried over as they are."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from optimum_comp.checkpoint.reader import resolve_folder
from optimum_comp.strict_json import read_object
from optimum_comp.utils import explaining, shown


TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/",
)
"""Patterns of a tokenizer's files and folders, its chat templates included."""
_MISTRALS = ("mistral", "ministral", "pixtral", "voxtral")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def open_tokenizer(name: str | PathLike[str], source_arguments: dict[str, Any] | None = None) -> Any:
    """A tokenizer of transformers.

    Args:
        name: folder or hub id.
        source_arguments: how it is found (see `lookup_arguments`).

    Raises:
        ValueError: it is damaged, or there is none in the folder.
        OSError: there is none, or it can't be reached.
    """
    from transformers import AutoTokenizer

    with explaining(f"the tokenizer of {shown(name)} can't be used"), _without_false_alarm(Path(name)):
        return AutoTokenizer.from_pretrained(str(name), **(source_arguments or {}))


@contextlib.contextmanager
def _without_false_alarm(folder: Path) -> Iterator[None]:
    """Keep what transformers says of Mistral's tokenizers from being said of others.

    Versions 4.57.3 to 4.57.6 say of every folder that they have written, if its vocabulary is large, that its
    tokenizer is wrong, and advise what would make it so.
    """
    try:
        kind = read_object(folder / "config.json").get("model_type")
    except (OSError, ValueError):
        kind = None
    if not isinstance(kind, str) or any(name in kind for name in _MISTRALS):
        yield
        return

    def is_said(record: logging.LogRecord) -> bool:
        return "fix_mistral_regex" not in record.getMessage()

    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addFilter(is_said)
    try:
        yield
    finally:
        logger.removeFilter(is_said)


def has_tokenizer(source: str, source_arguments: dict[str, Any]) -> bool:
    """Whether a model's folder holds a tokenizer; on the hub and in GGUF files one is expected.

    Looked at here, since what transformers raises without one differs by family and version.
    """
    if "gguf_file" in source_arguments or not Path(source).is_dir():
        return True
    return _holds_tokenizer(Path(source) / source_arguments.get("subfolder", ""))


def _holds_tokenizer(folder: Path) -> bool:
    # `tokenizer_config.json` alone builds no tokenizer.
    return any((folder / name).is_file() for name in _VOCABULARIES)


def save_tokenizer(folder: Path, tokenizer: Any, source: str | None, source_arguments: dict[str, Any]) -> None:
    """Copy the tokenizer's files as they are; write them anew only where there are none to copy."""
    if tokenizer is None:
        return
    verbatim = source is not None and "gguf_file" not in source_arguments and tokenizer.name_or_path == source
    origin = resolve_folder(source, source_arguments, TOKENIZER_FILES) if source is not None and verbatim else None
    if origin is not None and _holds_tokenizer(origin):
        copy_tokenizer(origin, folder)
    else:
        tokenizer.save_pretrained(folder)
    _name_a_class_that_all_versions_know(folder / "tokenizer_config.json")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files from folder to folder, over what is there."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target / path.name)


def _name_a_class_that_all_versions_know(path: Path) -> None:
    """Transformers 5 writes `TokenizersBackend`, which version 4 refuses: its name is `PreTrainedTokenizerFast`."""
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
