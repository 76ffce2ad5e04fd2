"""What `try_in_genai` runs in a process of its own: `python -m optimum_comp.onnx.genai_trial JOB`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any


MARK = "found: "
"""Begins the lines of the output that are a result."""


def main(job: dict[str, Any]) -> None:
    """Say what each part of the trial has found as soon as it has, since a later one may end the process."""
    for found in try_out(job):
        print(MARK + json.dumps(found), flush=True)


def try_out(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Greedy tokens, then the ids of texts.

    Args:
        job: `folder`; `prompt`, ids; `new_tokens`, how many to generate; `texts`.

    Yields:
        `tokens`; then `encodings`, `None` if GenAI refuses the tokenizer.
    """
    import onnxruntime_genai as genai

    model = genai.Model(job["folder"])
    length = len(job["prompt"]) + job["new_tokens"]
    settings = genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = genai.Generator(model, settings)
    generator.append_tokens(job["prompt"])
    for _ in range(job["new_tokens"]):
        generator.generate_next_token()
    yield {"tokens": [int(token) for token in generator.get_sequence(0)][len(job["prompt"]) :]}
    try:
        tokenizer = genai.Tokenizer(model)
        yield {"encodings": [[int(token) for token in tokenizer.encode(text)] for text in job["texts"]]}
    # Of no narrower class.
    except Exception as error:
        print(error, file=sys.stderr)
        yield {"encodings": None}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
