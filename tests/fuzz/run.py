"""Feeds a target with inputs that Atheris makes up, for as long as it is let.

A target is a module `fuzz_NAME.py` beside this one with

- `check(data, scratch)`: takes the bytes as what somebody else may have written. It may refuse them in the way that is
  documented; anything else that it raises is a finding. `scratch` is an empty folder for files, the same at each call.
- `mutate = mutate_json` if what it reads is JSON (see `json_mutator`): then most inputs get past the parser.

Its inputs worth keeping are in `corpus/NAME`; `tests/test_fuzz.py` calls `check` with each of them. To look for more
(Atheris isn't in the project's environment: `pip install atheris`):

    python tests/fuzz/run.py NAME -max_total_time=600 NEW tests/fuzz/corpus/NAME

Options are libFuzzer's. Inputs that reach new code go to the folder NEW, which has to be there; what makes `check`
fail is written to `crash-*`, and run again by `python tests/fuzz/run.py NAME crash-...`. Few and small ones that reach
as much: `-merge=1 EMPTY NEW tests/fuzz/corpus/NAME`.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import atheris


def main() -> None:
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["optimum_comp"]):
        target = importlib.import_module(f"fuzz_{name}")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        mutate = getattr(target, "mutate", None)
        more = {} if mutate is None else {"custom_mutator": lambda *given: mutate(*given, atheris.Mutate)}
        atheris.Setup(sys.argv, lambda data: target.check(data, Path(scratch)), **more)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
