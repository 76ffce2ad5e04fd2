"""What fuzzing has found worth keeping, once more; see `fuzz/run.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))

import fuzz_header  # noqa: E402
import fuzz_journal  # noqa: E402
import fuzz_recipe  # noqa: E402


@pytest.mark.parametrize(
    ("target", "path"),
    [
        pytest.param(target, path, id=f"{path.parent.name}-{path.name}")
        for target in (fuzz_header, fuzz_journal, fuzz_recipe)
        for path in sorted((FUZZ / "corpus" / target.__name__.removeprefix("fuzz_")).iterdir())
    ],
)
def test_corpus(target, path, tmp_path):
    assert target.check(path.read_bytes(), tmp_path) == path.name.startswith("read-")
