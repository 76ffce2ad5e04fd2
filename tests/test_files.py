from __future__ import annotations

from pathlib import Path

import pytest

from optimum_comp.files import atomic_folder, check_folder


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
