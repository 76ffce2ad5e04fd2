from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimum_comp.files import LOCK, atomic_folder, check_folder, clear_debris, durably, hold


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_made_with_its_parents_and_nothing_else(tmp_path):
    target = tmp_path / "a" / "b"
    with atomic_folder(target) as folder:
        assert folder.parent == target.parent
        assert folder.name.startswith(".b.partial-")
        assert not target.exists()
        (folder / "x").write_text("new")
    assert names(target) == ["x"]
    assert names(target.parent) == ["b"]
    assert target.stat().st_mode == target.parent.stat().st_mode


def test_empty_folder_is_filled(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target) as folder:
        (folder / "x").write_text("new")
    assert names(tmp_path) == ["out"]
    assert names(target) == ["x"]


def test_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere", target_is_directory=True)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "elsewhere") == ["x"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_leaves_things_as_they_were(tmp_path, error, overwrite):
    target = tmp_path / "out"
    if overwrite:
        model_folder(target)
    before = names(tmp_path)
    with pytest.raises(error), atomic_folder(target, overwrite=overwrite) as folder:
        (folder / "x").write_text("half")
        raise error
    assert names(tmp_path) == before
    if overwrite:
        assert names(target) == ["config.json"]


def test_replaces_a_model(tmp_path):
    target = model_folder(tmp_path / "out")
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "x").write_text("new")
        assert names(target) == ["config.json"]
    assert names(tmp_path) == ["out"]
    assert names(target) == ["x"]


def test_refuses_without_overwrite(tmp_path):
    target = model_folder(tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"), atomic_folder(target):
        pytest.fail("the block ran")
    assert names(target) == ["config.json"]


def test_never_replaces_what_is_no_model(tmp_path):
    target = tmp_path / "documents"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"config\.json"):
        check_folder(target, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        check_folder(target / "thesis.tex", overwrite=True)
    assert names(target) == ["thesis.tex"]


def test_keeps_what_appeared_meanwhile(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(FileExistsError), atomic_folder(target):
        model_folder(target)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["config.json"]


@pytest.mark.parametrize("target", ["in", "in/sub", "in/../in", "."])
def test_keeps_away_from_sources(tmp_path, target):
    model_folder(tmp_path / "in")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Choose"):
        check_folder(tmp_path / target, overwrite=True, sources=[tmp_path / "in"])
    assert check_folder(tmp_path / "in-2", sources=[tmp_path / "in"]) == (tmp_path / "in-2").resolve()


@pytest.fixture
def somebody() -> Iterator[Path]:
    """A folder of its own, seen by a user who isn't the superuser."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


def test_refuses_what_cannot_be_written_before_any_work(somebody):
    superuser = somebody.stat().st_uid
    if superuser == os.geteuid():
        somebody.chmod(0o555)
    for target in (somebody / "out", somebody / "deep" / "out"):
        with pytest.raises(PermissionError, match=r"out can't be written: you may not write to .*Choose another"):
            check_folder(target)
    # Files may go into a folder beside which none can be made.
    with as_owner(somebody):
        inside = model_folder(somebody / "inside")
        inside.chmod(0o777)
    check_folder(inside, overwrite=True, in_place=True)
    with pytest.raises(PermissionError):
        check_folder(inside, overwrite=True)


@contextlib.contextmanager
def as_owner(folder: Path) -> Iterator[None]:
    """As who made a folder, who may write to it."""
    user, mode = os.geteuid(), folder.stat().st_mode
    os.seteuid(folder.stat().st_uid)
    folder.chmod(0o755)
    yield
    folder.chmod(mode)
    os.seteuid(user)


def test_refuses_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match=r"deep/out can't be made: .*file is a file"):
        check_folder(tmp_path / "file" / "deep" / "out")


HOLD = """
import sys, time
from pathlib import Path
from optimum_comp.files import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holding(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_one_process_alone_holds_a_folder(tmp_path):
    process = holding(tmp_path / "deep" / "out")
    try:
        said = r"another process is at work in .*out; wait for it, or stop it"
        with pytest.raises(BlockingIOError, match=said), hold(tmp_path / "deep" / "out"):
            pytest.fail("both hold it")
        assert names(tmp_path / "deep" / "out") == [LOCK]
    finally:
        process.kill()
        process.wait()
    # What a kill leaves is in nobody's way.
    check_folder(tmp_path / "deep" / "out")
    with hold(tmp_path / "deep" / "out"):
        pass
    assert names(tmp_path / "deep" / "out") == []


def test_a_held_folder_is_left_as_it_was(tmp_path):
    for error in (None, RuntimeError):
        with pytest.raises(error) if error else contextlib.nullcontext(), hold(tmp_path / "deep" / "out"):
            if error:
                raise error
        assert names(tmp_path) == []
    (tmp_path / "empty").mkdir()
    with hold(tmp_path / "empty"):
        assert names(tmp_path / "empty") == [LOCK]
    with hold(model_folder(tmp_path / "model")):
        pass
    assert names(tmp_path / "empty") == [] and names(tmp_path / "model") == ["config.json"]
    # Nothing is written through a link.
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "empty" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), hold(tmp_path / "empty"):
        pytest.fail("held by a link")
    assert (tmp_path / "victim").read_text() == "precious"


KILLED = """
import os, sys
from pathlib import Path
from optimum_comp.files import atomic_folder
renames, rename = [], Path.rename
def killing(self, target):
    if len(renames) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    renames.append(target)
    return rename(self, target)
Path.rename = killing
with atomic_folder(sys.argv[1], overwrite=True) as folder:
    (folder / "config.json").write_text("new")
"""


@pytest.mark.parametrize("after", [0, 1])
def test_debris_of_a_kill_is_cleared(after, tmp_path):
    target = model_folder(tmp_path / "out")
    precious = [model_folder(tmp_path / name) for name in (".out.partial-notes", ".out-2.partial-0123abcd")]
    (tmp_path / ".out.old-00000000").symlink_to(precious[0])
    assert subprocess.run([sys.executable, "-c", KILLED, str(target), str(after)]).returncode == -9
    assert target.exists() == (after == 0) and len(names(tmp_path)) == 5
    clear_debris(target)
    assert names(tmp_path) == sorted(["out", ".out.old-00000000", *(path.name for path in precious)])
    assert (target / "config.json").read_text() == "{}" and all(map(names, precious))
    # What was replaced goes when the new one is there.
    model_folder(tmp_path / ".out.old-01234567")
    clear_debris(target)
    assert not (tmp_path / ".out.old-01234567").exists()
    clear_debris(tmp_path / "nowhere" / "out")


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".file.partial").symlink_to(tmp_path / "victim")
    with durably(tmp_path / "file") as partial:
        partial.write_text("new")
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / "file").read_text() == "new"
