"""Small things that several modules need."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from transformers.utils import logging as transformers_logging


if TYPE_CHECKING:
    from torch import nn

_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of glibc's malloc.h."""

_LARGE_BLOCK = 8 * 2**20

ROOT_LOGGER = "transformers.optimum_comp"
"""A child of transformers' logger: its level, its handler and `TRANSFORMERS_VERBOSITY` hold here too."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, `name` being its `__name__`."""
    return transformers_logging.get_logger(f"{ROOT_LOGGER}.{name.rpartition('.')[2]}")


def progress_disabled() -> bool:
    """Whether the user has switched progress bars off in transformers."""
    return not transformers_logging.is_progress_bar_enabled()


def lookup_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of a model's `from_pretrained`, those that say where it is: config and tokenizer share them."""
    shared = ("gguf_file", "revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
    return {key: value for key, value in kwargs.items() if key in shared}


def plain_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` as JSON can hold them, for another process or a file.

    Raises:
        ValueError: it can't hold one; names it.
    """
    plain = {}
    for name, value in kwargs.items():
        # A dtype is written as transformers reads it.
        given = str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else value
        given = os.fspath(given) if isinstance(given, os.PathLike) else given
        try:
            plain[name] = json.loads(json.dumps(given, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name}={value!r:.80} is not valid here: another process loads the model, so give words, numbers or "
                "lists of them."
            ) from error
    return plain


def shown(text: object, longest: int = 200) -> str:
    """A text from a file as an error may show it: in one line, without a terminal's commands, not for ever."""
    text = str(text) if str(text).isprintable() else repr(str(text))
    return text if len(text) <= longest else f"{text[:longest]}..."


@contextlib.contextmanager
def explaining(problem: str, kind: type[Exception] | None = None) -> Iterator[None]:
    """Whatever another library raises over what a user gave, as one line that says what the problem is.

    Libraries that read a model's files raise all kinds of errors when these are damaged, some with lists of all that
    they know. What isn't installed is left to them.

    Args:
        problem: said first, and then their words.
        kind: of the error.

    Raises:
        OSError: something isn't there, or can't be reached; if `kind` is `None`.
        ValueError: anything else; if `kind` is `None`.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        kind = kind or (OSError if isinstance(error, OSError) else ValueError)
        first = next(iter(str(error).strip().splitlines()), "")
        raise kind(f"{problem} ({type(error).__name__}: {shown(first, 400)})") from error


def is_there(path: str | Path) -> bool:
    """Whether there is a file or folder; not, where no file can have that name."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def format_bytes(size: float) -> str:
    """`1234567` -> `1.2 MB` (decimal units, as file managers and disk makers count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def file_bytes(folder: Path, patterns: Iterable[str]) -> int:
    """Size of the files in a folder that match one of several patterns, none of which another one covers."""
    return sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern))


def parameter_count(module: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def keep_large_blocks_apart() -> None:
    """Have every block of memory from 8 MB given back to the system as soon as it is free.

    The C library of Linux raises the size from which it does so to 32 MB, by what it has seen freed; holes between
    activations of that size then add up to hundreds of megabytes that differ from run to run. This holds for the whole
    process, and for good; it is left alone where `MALLOC_MMAP_THRESHOLD_` is set. Smaller blocks are used again faster
    than they are asked for anew.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _call_allocator("mallopt", _MMAP_THRESHOLD, _LARGE_BLOCK)


def release_free_memory() -> None:
    """Give freed memory back to the system, which the C library of Linux may keep to be asked for again."""
    _call_allocator("malloc_trim", 0)


def _call_allocator(name: str, *arguments: int) -> None:
    """Call a function of glibc's allocator; nothing happens where the C library is another."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not `ru_maxrss`: a new process inherits that of the one that started it.
        lines = (line.split() for line in status.read_text(encoding="ascii", errors="replace").splitlines())
        return 1024 * int(next(words[1] for words in lines if words[0] == "VmHWM:"))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
