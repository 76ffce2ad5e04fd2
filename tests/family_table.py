"""docs/families.md: what the contract tests found, as a table."""

from __future__ import annotations

from pathlib import Path

from tiny_families import CONFIGS


COLUMNS = ("ffn", "kv", "heads", "layers", "onnx", "int8", "transformers 4", "transformers 5")
_HEAD = """# Families

What the contract tests found (`tests/test_contract.py`; `make families` writes this page): each row is a tiny random
model of a family, pruned along every axis and along all of them at once, saved, opened in plain transformers in a
process of its own, where cached and uncached generation agree, exported with Optimum (logits equal to PyTorch's to
1e-3, through `ORTModelForCausalLM`), and quantized to 8 bits, which answers.

- **ffn**: neurons of the feed-forward layer. **kv**: key-value groups with their query heads. **heads**: query heads
  within groups. **layers**: whole decoder layers. A dash: it can't be pruned; `optimum-cli comp families` says why.
- Mixture-of-experts and encoder-decoder models are refused by name.

"""


def read(path: Path) -> dict[str, dict[str, bool]]:
    """Config -> column -> what the page says; columns that it says nothing of are left out."""
    if not path.is_file():
        return {}
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
    found = {}
    for row in rows:
        name, _, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        found[name] = {column: cell == "yes" for column, cell in zip(COLUMNS, cells, strict=True) if cell}
    return found


def written(rows: dict[str, dict[str, bool]], known: dict[str, dict[str, bool]]) -> str:
    """The page, with new rows over what is known."""
    lines = [f"| model | family | {' | '.join(COLUMNS)} |", f"| --- | --- | {' | '.join([':---:'] * len(COLUMNS))} |"]
    for name, (model_type, _) in CONFIGS.items():
        row = {**known.get(name, {}), **rows.get(name, {})}
        cells = ["" if column not in row else "yes" if row[column] else "—" for column in COLUMNS]
        lines.append(f"| {name} | {model_type} | {' | '.join(cells)} |")
    return _HEAD + "\n".join(lines) + "\n"
