"""A tokenizer's files as ONNX Runtime GenAI reads them right."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from optimum_comp.checkpoint.tokenizer import open_tokenizer
from optimum_comp.onnx.folders import copy_companions


SAMPLES = (
    "Hello world",
    "Hello  world\n\n  a\tb\r\n",
    " leading and trailing ",
    "def f(x):\n    return x + 1  # it's 12345.6789\n",
    "é ü ß 漢字 العربية 😀👍🏽 it's we'll",
)
"""Texts on which two tokenizers have to agree: runs of spaces, newlines, tabs, digits, emoji, several scripts."""


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
        inputs = list(open_tokenizer(folder).model_input_names)
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
    tokenizer = open_tokenizer(folder)
    texts = [*SAMPLES, "".join(f"{token} x\n" for token in tokenizer.all_special_tokens)]
    found: list[Any] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)]
    found.append(sorted(tokenizer("x")))
    if tokenizer.chat_template:
        texts.append(chat_text(tokenizer, SAMPLES[1]))
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [text, ids, tokenizer(text)["input_ids"]]
        found += [tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)]
    return found


def chat_text(tokenizer: Any, question: str) -> str:
    """A question as the model's chat template puts it, up to where the answer begins."""
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
