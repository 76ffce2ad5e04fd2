"""What fuzzing has found worth keeping, once more; see `fuzz/run.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))

import fuzz_journal  # noqa: E402


@pytest.mark.parametrize("name", sorted(path.name for path in (FUZZ / "corpus" / "journal").iterdir()))
def test_journal_corpus(name, tmp_path):
    read = fuzz_journal.check((FUZZ / "corpus" / "journal" / name).read_bytes(), tmp_path)
    assert read == name.startswith("read-")
