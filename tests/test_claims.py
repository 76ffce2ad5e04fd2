"""The tests that docs/claims.md names are there."""

from __future__ import annotations

import re
from pathlib import Path


HERE = Path(__file__).parent


def test_every_claim_has_its_test():
    text = (HERE.parent / "docs" / "claims.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 10 and all("`test_" in row for row in rows)
    for file, test in named:
        content = (HERE / file).read_text(encoding="utf-8")
        assert not test or re.search(rf"^def {test}\(", content, re.MULTILINE), f"{file}::{test}"
