"""The journal of an unfinished run: it is read or refused, and nothing beside its folder changes."""

from __future__ import annotations

import shutil
from pathlib import Path

from json_mutator import mutate_json

from optimum_comp.files import JOURNAL
from optimum_comp.sweep.journal import Journal


mutate = mutate_json

RESULT = ("config.json", "model.safetensors")


def check(data: bytes, scratch: Path) -> bool:
    """Take bytes as a journal, and go through all that one leads to before a model is opened, and behind its end.

    Returns:
        Whether it was read.
    """
    output, victim = scratch / "out", scratch / "victim"
    _prepare(output, victim)
    (output / JOURNAL).write_bytes(data)
    try:
        journal = Journal.find(output)
    except ValueError:
        journal = None
    if journal is not None:
        _use(journal)
    assert sorted(scratch.iterdir()) == [output, victim]
    assert [path.name for path in victim.iterdir()] == ["notes.txt"]
    assert (victim / "notes.txt").read_bytes() == b"precious"
    return journal is not None


def _use(journal: Journal) -> None:
    assert "--resume" in journal.hint() and journal.finished >= 0
    assert journal.identity is None or journal.identity == journal.run["record"]
    # What has been read has a config that is one, whatever else is wrong.
    journal.config(journal.config(None))
    assert not {"trust_remote_code", "use_safetensors", "token", "cache_dir"} & set(journal.run["arguments"])
    for step in (
        journal.calibration,
        journal.reports,
        lambda: journal.opening(None, {}),
        lambda: journal.go_on({**journal.run, "record": {"of": "another"}}, layers=4, removed={1}),
    ):
        try:
            step()
        except ValueError:
            continue
    assert Journal.read(journal.output).state == journal.state
    if journal.is_finishing:
        try:
            journal.publish()
        except ValueError:
            return
        assert not (journal.output / JOURNAL).exists() and not journal.work.exists()
        assert any((journal.output / name).exists() for name in journal.state["files"])


def _prepare(output: Path, victim: Path) -> None:
    """An output folder that holds an old file and a finished result, with something precious beside it."""
    final = output / "comp_work" / "final"
    if victim.is_dir() and final.is_dir() and all((final / name).is_file() for name in RESULT):
        (output / "old.txt").write_text("old")
        return
    shutil.rmtree(output, ignore_errors=True)
    final.mkdir(parents=True)
    for name in RESULT:
        (final / name).write_text("{}")
    (output / "old.txt").write_text("old")
    victim.mkdir(exist_ok=True)
    (victim / "notes.txt").write_text("precious")
