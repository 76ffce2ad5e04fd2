"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from optimum_comp.utils import explaining, is_there, shown


COMPRESSION_SUMMARY = "comp_compress.json"
RECIPE = "comp_recipe.yaml"
FRONTIER = "comp_frontier.json"
"""What `comp compress` does in a folder, from its beginning."""
JOURNAL = "comp_journal.json"
"""While a folder holds it, a pruning run in that folder isn't finished (see `journal`)."""
DISTILLATION = "comp_distil.json"
"""Side-car of a distilled model: settings, texts, and the divergence before and after."""
VOCABULARY = "comp_vocabulary.json"
"""Side-car of a model with fewer tokens: their ids before, and what chose them."""
STAGE_RECORD = "comp_stage.json"
"""What whoever had a folder made wants to know it by; there exactly if the folder is complete."""
LOCK = ".comp_lock"
"""Is in a folder while a process is at work in it; see `hold`."""

_MARKERS = ("config.json", COMPRESSION_SUMMARY, RECIPE, FRONTIER, STAGE_RECORD)
"""A folder is replaced only if it holds one of these: then it is a model, or a compression of ours."""


def check_folder(
    target: str | Path, *, overwrite: bool = False, sources: Sequence[str | Path] = (), in_place: bool = False
) -> Path:
    """Say now what `atomic_folder` would refuse, for work that should fail before it starts.

    Args:
        target: the folder that is to be made.
        overwrite: it may hold a model already.
        sources: what the work reads from; one that isn't there, as the hub's name of a model, is in nobody's way.
        in_place: files are written into the target itself, so that nothing has to be made beside it.

    Returns:
        The target, absolute and with symbolic links followed.

    Raises:
        FileExistsError: the target is a file; or a folder with something in it and `overwrite` is off; or a folder
            that isn't a model.
        NotADirectoryError: a file is where a folder above the target has to be.
        PermissionError: nothing can be written there.
        ValueError: the target is one of the sources, inside one, or around one.
    """
    shown, target = target, Path(target)
    with explaining(f"the output folder can't be {target!s:.80}; choose another"):
        target.exists()
    target = target.resolve()
    for source in (Path(source).resolve() for source in sources if Path(source).exists()):
        if target == source:
            raise ValueError(f"The output folder {shown} is also the input. Choose another output folder.")
        if target.is_relative_to(source):
            raise ValueError(f"The output folder {shown} is inside the input {source}. Choose a folder outside it.")
        if source.is_relative_to(target):
            raise ValueError(f"The output folder {shown} holds the input {source}. Choose a folder outside it.")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{shown} is a file; the output has to be a folder.")
    _require_writable(target if in_place else target.parent, shown)
    if not target.exists():
        return target
    if _is_empty(target):
        return target
    if (target / JOURNAL).is_file():
        if overwrite:
            return target
        raise FileExistsError(
            f"{shown} holds an unfinished pruning run. Go on with it: --resume; or start anew: --overwrite."
        )
    if not overwrite:
        raise FileExistsError(
            f"{shown} exists and isn't empty. Choose another folder, or replace it with --overwrite."
        )
    if not any((target / marker).is_file() for marker in _MARKERS):
        raise FileExistsError(f"{shown} isn't replaced: without a {_MARKERS[0]} it doesn't look like a model folder.")
    return target


def check_file(target: Path | None) -> None:
    """Refuse a file that can't be written, before the work whose result is to be in it.

    Raises:
        OSError: it is a folder, is under a file, or nothing may be written there.
    """
    if target is not None and target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give a file.")
    if target is not None:
        _require_writable(target.resolve().parent, target)


def _require_writable(folder: Path, shown: str | Path) -> None:
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{shown} can't be made: {there} is a file. Choose another output folder.")
    # Of a file system that is mounted to be read only, this says so to the superuser too.
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(f"{shown} can't be written: you may not write to {there}. Choose another output folder.")


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the system lets go of it when this process ends, however it does.

    The folder is made if it isn't there. At the end, the lock's file is removed, and so are folders that were made
    for it, or left, with nothing in them; one that was empty before stays.

    Raises:
        BlockingIOError: another process holds the folder; nothing is touched.
        OSError: the folder can't be made or written to.
    """
    was_empty = folder.is_dir() and _is_empty(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BlockingIOError(
            f"another process is at work in {folder}; wait for it, or stop it, or choose another output folder."
        ) from error
    try:
        yield
    finally:
        # Before it is let go of: then nobody holds a file without a name. Windows removes only what nobody holds.
        with contextlib.suppress(PermissionError):
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            for each in made if made or was_empty else [folder]:
                each.rmdir()


def clear_debris(target: str | Path) -> None:
    """Remove what an `atomic_folder` that was killed has left beside its target; for who keeps others away from it.

    Killed between its last two steps, it has left no target, and the folder that was to be replaced under another
    name: that one is put back.
    """
    target = Path(target).resolve()
    if not target.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(partial|old)-[0-9a-f]{{8}}")
    debris = {path: found[1] for path in target.parent.iterdir() if (found := pattern.fullmatch(path.name))}
    for path, kind in debris.items():
        if path.is_symlink() or not path.is_dir():
            continue
        if kind == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path)


def check_model(folder: str | Path) -> None:
    """Refuse what can't be a model: a folder that isn't there, or that an interrupted run has left.

    Args:
        folder: a folder, or a model's name on the hub.

    Raises:
        FileNotFoundError: there is no such folder, and no model on the hub can have that name.
        NotADirectoryError: it is a file.
        ValueError: it is no name, or the folder is unfinished; tells how to go on.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"model={folder!r:.80} is not valid: give a folder, or a model's name on the hub.")
    # Of nothing, `Path` makes the folder that one is in.
    if not is_there(folder) or not str(folder):
        try:
            validate_repo_id(str(folder))
        except HFValidationError as error:
            raise FileNotFoundError(
                f"there is no folder {shown(folder) or repr('')}. Give a folder, or a model on the hub as NAME or "
                "NAMESPACE/NAME."
            ) from error
    elif not Path(folder).is_dir():
        raise NotADirectoryError(
            f"{shown(folder)} is a file. Give the model's folder; of a GGUF file, its folder and --gguf-file NAME."
        )
    if (Path(folder) / JOURNAL).is_file():
        raise ValueError(
            f"{folder} is unfinished: a pruning run was interrupted there. Go on with\n"
            f"  optimum-cli comp prune --resume {folder}"
        )


@contextlib.contextmanager
def atomic_folder(
    target: str | Path,
    *,
    overwrite: bool = False,
    sources: Sequence[str | Path] = (),
    record: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """Fill a folder so that it is there complete, or not there.

    ```python
    with atomic_folder(output, sources=[model_dir]) as folder:
        model.save_pretrained(folder)
    ```

    Args:
        target: the folder to make; its parents are made too.
        overwrite: replace a model folder that is there. It stays untouched until the new one is complete.
        sources: folders or files that the work reads from, which the target must neither be nor touch; see
            `check_folder`.
        record: what the folder is to be known by, written into it as `STAGE_RECORD`; `None` for none.

    Yields:
        A new, empty folder beside the target. It takes the target's place at the end of the block, and is removed if
        the block raises anything, `KeyboardInterrupt` included.

    Raises:
        FileExistsError: see `check_folder`.
        ValueError: see `check_folder`.
    """
    target = check_folder(target, overwrite=overwrite, sources=sources)
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    # Beside the target, so that a rename is enough; made with mkdir, since mkdtemp would hide it from other users.
    partial = target.with_name(f".{target.name}.partial-{token}")
    partial.mkdir()
    try:
        yield partial
        if record is not None:
            write_record(partial, record)
        # Once more: hours may have passed, and somebody may have put something there.
        check_folder(target, overwrite=overwrite, sources=sources)
        _replace(target, partial, target.with_name(f".{target.name}.old-{token}"))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write what a folder is to be known by into it."""
    (folder / STAGE_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def durably(path: Path) -> Iterator[Path]:
    """Write a file so that, even after a power cut, it is there with all that was written, or as it was before.

    Yields:
        The path to write to, where nothing is. At the end of the block its content is forced to the disk and it takes
        `path`'s place; it is removed if the block raises.
    """
    partial = path.with_name(f".{path.name}.partial")
    # A link that somebody has put there would be written through.
    partial.unlink(missing_ok=True)
    try:
        yield partial
        sync_file(partial)
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()


def sync_file(path: Path) -> None:
    """Force a file's content to the disk."""
    _sync(path, os.O_RDWR)


def sync_folder(folder: Path) -> None:
    """Force a folder's list of names to the disk; Windows does so by itself."""
    if os.name != "nt":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(target: Path, partial: Path, old: Path) -> None:
    """Put `partial` where `target` is; `target` comes back if that fails."""
    if not target.exists():
        partial.rename(target)
    elif _is_empty(target):
        # Windows doesn't rename onto a folder, not even an empty one.
        shutil.rmtree(target)
        partial.rename(target)
    else:
        target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    # Of a run that was killed before its journal was written, a lock and the journal's beginning may be there.
    return {path.name for path in folder.iterdir()} <= {LOCK, f".{JOURNAL}.partial"}
