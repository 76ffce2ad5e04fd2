"""A tokenizer's files, carried over as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def has_tokenizer(source: str, source_arguments: dict[str, Any]) -> bool:
    """Whether a model's folder holds a tokenizer; on the hub and in GGUF files one is expected.

    Looked at here, since what transformers raises without one differs by family and version.
    """
    if "gguf_file" in source_arguments or not Path(source).is_dir():
        return True
    return _holds_tokenizer(_source_folder(source, source_arguments))


def _holds_tokenizer(folder: Path) -> bool:
    # `tokenizer_config.json` alone builds no tokenizer.
    return any((folder / name).is_file() for name in _VOCABULARIES)


def save_tokenizer(folder: Path, tokenizer: Any, source: str | None, source_arguments: dict[str, Any]) -> None:
    """Copy the tokenizer's files as they are; write them anew only where there are none to copy."""
    if tokenizer is None:
        return
    verbatim = source is not None and "gguf_file" not in source_arguments and tokenizer.name_or_path == source
    origin = _source_folder(source, source_arguments) if source is not None and verbatim else None
    if origin is not None and _holds_tokenizer(origin):
        for name in TOKENIZER_FILES:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)
    else:
        tokenizer.save_pretrained(folder)
    _name_a_class_that_all_versions_know(folder / "tokenizer_config.json")


def _name_a_class_that_all_versions_know(path: Path) -> None:
    """Transformers 5 writes `TokenizersBackend`, which version 4 refuses: its name is `PreTrainedTokenizerFast`."""
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _source_folder(source: str, arguments: dict[str, Any]) -> Path:
    """The local folder, or the hub's cache with the tokenizer's files in it."""
    if Path(source).is_dir():
        return Path(source) / arguments.get("subfolder", "")
    from huggingface_hub import snapshot_download

    known = {k: v for k, v in arguments.items() if k in ("revision", "token", "cache_dir", "local_files_only")}
    cached = snapshot_download(source, allow_patterns=list(TOKENIZER_FILES), **known)
    return Path(cached)
