"""Evaluations side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimum_comp.evaluation import Evaluation
from optimum_comp.utils import format_bytes


_HEADER = (
    "",
    "parameters",
    "file size",
    "perplexity",
    "bits/byte",
    "prefill tok/s",
    "long prefill tok/s",
    "decode tok/s",
    "first token",
    "load",
    "peak memory",
)


def evaluation_table(results: Mapping[str, Evaluation]) -> str:
    """A Markdown table with a row a model, what the numbers mean below it, and the models' answers.

    Where there are several perplexities, each has its ratio to the first row's, if both have one vocabulary.
    """
    parts = (markdown_table(comparison_rows(results)), _legend(results), _answers(results))
    return "\n\n".join(part for part in parts if part)


def comparison_rows(results: Mapping[str, Evaluation]) -> list[tuple[str, ...]]:
    """The table's cells, its header first; columns that nobody has measured are left out."""
    base = next(iter(results.values()))
    rows = [_HEADER, *(_row(name, result, base, len(results) > 1) for name, result in results.items())]
    told = [any(row[column] != "-" for row in rows[1:]) for column in range(len(_HEADER))]
    return [tuple(cell for cell, shown in zip(row, told, strict=True) if shown) for row in rows]


def _row(name: str, result: Evaluation, base: Evaluation, compare: bool) -> tuple[str, ...]:
    perplexity = "-"
    if result.perplexity is not None:
        perplexity = f"{result.perplexity:.2f}"
        if compare and base.perplexity and result.vocabulary == base.vocabulary:
            perplexity += f" ({result.perplexity / base.perplexity:.3f}x)"
    return (
        name,
        f"{result.parameters / 1e6:.1f} M",
        format_bytes(result.size_bytes),
        perplexity,
        "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}",
        _number(result.prefill_tokens_per_second),
        _number(result.long_prefill_tokens_per_second),
        _number(result.decode_tokens_per_second),
        "-" if result.first_token_seconds is None else f"{1000 * result.first_token_seconds:.0f} ms",
        "-" if result.load_seconds is None else f"{result.load_seconds:.1f} s",
        format_bytes(result.peak_memory_bytes) if result.peak_memory_bytes else "-",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table, the header first; columns but for the first are aligned on the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def _legend(results: Mapping[str, Evaluation]) -> str:
    result = next(iter(results.values()))
    notes = []
    if result.perplexity is not None:
        notes.append(
            f"Perplexity on {result.text}: {result.predictions:,} predicted tokens in windows of {result.window} that "
            "don't overlap"
            + (f" and begin with {result.start!r}, which isn't predicted." if result.begins_with else ".")
        )
        if len({each.vocabulary for each in results.values()}) > 1:
            notes.append("Vocabularies differ, so perplexities aren't comparable; bits per byte of text are.")
    if result.prompt_tokens:
        notes.append(
            f"Throughput and time to the first token at batch 1 with a prompt of {result.prompt_tokens} tokens"
            + (f" (long: {result.long_prompt_tokens})" if result.long_prompt_tokens else "")
            + f", {result.threads} threads; peak memory of loading, prefill and decoding."
        )
        notes.append(fastest(results))
    return " ".join(note for note in notes if note)


def fastest(results: Mapping[str, Evaluation]) -> str:
    """Which model answers soonest, by how long a prompt is beside its answer, in a sentence; empty for fewer than two.

    A model that reads `p` and writes `d` tokens a second takes `r / p + 1 / d` seconds for a token of the answer
    behind a prompt that is `r` times as long as the answer: a straight line in `r`, and the lowest of all wins.
    """
    lines = {
        name: (1 / result.prefill_tokens_per_second, 1 / result.decode_tokens_per_second)
        for name, result in results.items()
        if result.prefill_tokens_per_second and result.decode_tokens_per_second
    }
    if len(lines) < 2:
        return ""
    best = min(lines, key=lambda name: lines[name][::-1])
    text, ratio = f"Soonest with an answer: {best}", 0.0
    while True:
        slope, start = lines[best]
        # Where a flatter line crosses the best one, it takes over.
        crossings = {
            name: (other - start) / (slope - flatter) for name, (flatter, other) in lines.items() if flatter < slope
        }
        if not crossings:
            break
        best = min(crossings, key=lambda name: (crossings[name], lines[name][0]))
        ratio = crossings[best]
        text += f"; with a prompt more than {ratio:.3g} times as long as the answer, {best}"
    return f"{text}."


def _answers(results: Mapping[str, Evaluation]) -> str:
    said: dict[str, list[str]] = {}
    for name, result in results.items():
        for each in result.answers:
            said.setdefault(each["prompt"], []).append(f"{name}: {each['answer']}")
    return "\n\n".join("\n".join([f"Asked: {prompt}", *lines]) for prompt, lines in said.items())
