"""What the fuzzer of headers has found, and where it began, without the fuzzer."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from fuzz.fuzz_header import HEADER, LAYOUTS, check, safetensors, write_file

from optimum_comp.checkpoint.parts import _ranges
from optimum_comp.checkpoint.reader import Checkpoint


CORPUS = sorted((Path(__file__).parent / "fuzz" / "corpus" / "header").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_corpus(path):
    check(path.read_bytes())


def test_the_corpus_has_every_layout():
    assert {path.read_bytes()[0] % len(LAYOUTS) for path in CORPUS} == set(range(len(LAYOUTS)))


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 2**31, len(HEADER) + 27])
def test_a_header_that_lies_about_its_length_is_not_read(length, tmp_path):
    write_file(tmp_path, struct.pack("<Q", length) + safetensors(HEADER, bytes(26))[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        _ranges(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        Checkpoint.open(tmp_path)
