"""What a bundle says of itself, and whether it is so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_comp.files import file_digest
from optimum_comp.utils import format_bytes, shown


MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "optimum-comp-bundle", 1

_MANIFEST_BYTES = 10_000_000
"""A manifest has some hundred bytes a file; more isn't read."""


class BundleError(ValueError):
    """A bundle isn't what its manifest says."""


@dataclass(frozen=True)
class BundleReport:
    """What a bundle holds.

    Attributes:
        output: the folder.
        target: name of the processor it is for.
        recipe: name of the quantization recipe; `None` if the folder it was made from doesn't say.
        files: path in the folder -> size in bytes, the manifest aside.
        genai_graph: the graph that GenAI runs.
        genai_agrees: whether GenAI, when the bundle was made, generated what ONNX Runtime generates; `None` if it
            wasn't tried, since it wasn't installed.
        notes: what a user has to know.
        seconds: it took to write, or 0.
    """

    output: Path
    target: str
    recipe: str | None
    files: dict[str, int]
    genai_graph: str
    genai_agrees: bool | None
    notes: list[str]
    seconds: float = 0.0

    @property
    def size_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(self.files.values())

    def text(self) -> str:
        """What was made, in a few lines."""
        lines = [f"{self.output}: {format_bytes(self.size_bytes)} in {len(self.files)} files for {self.target}."]
        tried = {True: "and gives ONNX Runtime's tokens", False: "but gives other tokens", None: "which wasn't tried"}
        lines.append(f"ONNX Runtime GenAI runs {self.genai_graph}, {tried[self.genai_agrees]}.")
        return "\n".join([*lines, *self.notes])


def verify_bundle(folder: str | Path) -> BundleReport:
    """Check every file of a bundle against its manifest.

    Returns:
        What the bundle holds.

    Raises:
        BundleError: there is no manifest that this version reads, or a file is missing, differs or isn't listed;
            names it.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}.")
    report, digests = _read_manifest(folder)
    for name, size in report.files.items():
        path = folder / name
        try:
            _check_file(folder, path, size, digests[name])
        # Of a name that is too long for the file system, for one.
        except OSError as error:
            raise BundleError(f"{shown(path)} can't be read: {error.strerror}.") from error
    for path in sorted(folder.rglob("*")):
        _check_inside(folder, path)
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in report.files and name != MANIFEST:
            raise BundleError(f"{path} is not in the manifest.")
    return report


def _read_manifest(folder: Path) -> tuple[BundleReport, dict[str, str]]:
    """What a bundle holds by its manifest, and path in the folder -> SHA-256 as the manifest says.

    Raises:
        BundleError: it isn't one that this version reads; says why.
    """
    path = folder / MANIFEST
    try:
        _check_inside(folder, path)
        if path.stat().st_size > _MANIFEST_BYTES:
            raise ValueError(f"it has more than {format_bytes(_MANIFEST_BYTES)}.")
        manifest = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        if _entry(manifest, "format", str) != FORMAT:
            raise BundleError(f"{path} is not of the format {FORMAT}.")
        version = _entry(manifest, "format_version", int)
        if version != FORMAT_VERSION:
            raise BundleError(f"{path} has format version {version}; this package reads {FORMAT_VERSION}.")
        sizes: dict[str, int] = {}
        digests: dict[str, str] = {}
        for entry in _entry(manifest, "files", list):
            name = _entry(entry, "path", str)
            if not _is_inside(name):
                raise BundleError(f"{path} names {name!r}, which is not in the bundle.")
            if name in sizes:
                raise ValueError(f"it names {name!r} twice.")
            sizes[name], digests[name] = _entry(entry, "bytes", int), _entry(entry, "sha256", str)
        if sum(sizes.values()) != _entry(manifest, "total_bytes", int):
            raise ValueError(f"its files have {sum(sizes.values())} bytes, not total_bytes.")
        recipe, genai = _entry(manifest, "recipe", dict), _entry(manifest, "genai", dict)
        notes = _entry(manifest, "notes", list)
        if not all(isinstance(note, str) for note in notes):
            raise ValueError("its notes aren't all texts.")
        report = BundleReport(
            folder,
            _entry(manifest, "target", str),
            _entry(recipe, "name", str, type(None)) if "name" in recipe else None,
            sizes,
            _entry(genai, "graph", str),
            _entry(genai, "agrees", bool, type(None)),
            notes,
        )
    except BundleError:
        raise
    # What isn't UTF-8 or JSON, whole numbers of thousands of digits, lists in lists without end.
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error
    if report.genai_graph not in sizes:
        raise BundleError(f"{path} is damaged: {report.genai_graph!r}, which GenAI runs, is not among its files.")
    return report, digests


def _entry(mapping: Any, key: str, *kinds: type) -> Any:
    """An entry of what was read from JSON, of one of the kinds that are asked for.

    Raises:
        ValueError: there is none, or it is something else.
    """
    if not isinstance(mapping, dict):
        raise ValueError(f"there is {type(mapping).__name__} where an object with {key!r} has to be.")
    if key not in mapping:
        raise ValueError(f"it has no {key!r} where there has to be one.")
    # `True` is an int to isinstance.
    if type(mapping[key]) not in kinds:
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{key!r} is {type(mapping[key]).__name__}, not {wanted}.")
    return mapping[key]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which isn't JSON.")


def _is_inside(name: str) -> bool:
    """Whether a name is the plain relative path, on any system, of something in the bundle."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts)
    # A colon makes a drive or a stream on Windows; what doesn't print is no name of ours, and may not be one at all.
    return plain and name.isprintable() and not set(name) & {"\\", ":"}


def _check_inside(folder: Path, path: Path) -> None:
    is_link, home = path.is_symlink(), folder.resolve()
    places = [home]
    if home.parent.name == "snapshots":
        # In the hub's cache, a snapshot's files are links to blobs beside it.
        places.append(home.parent.parent / "blobs")
    try:
        inside = any(path.resolve(strict=is_link).is_relative_to(place) for place in places)
    # A link to nothing, or to itself.
    except (OSError, RuntimeError):
        inside = False
    if not inside:
        raise BundleError(f"{path} is a link to what is not in the bundle.")


def _check_file(folder: Path, path: Path, size: int, digest: str) -> None:
    _check_inside(folder, path)
    if not path.is_file():
        raise BundleError(f"{path} is missing.")
    if path.stat().st_size != size:
        raise BundleError(f"{path} has {path.stat().st_size} bytes; the manifest says {size}.")
    if file_digest(path) != digest:
        raise BundleError(f"{path} differs from what the manifest says: its SHA-256 is another.")


def sizes_of(folder: Path) -> dict[str, int]:
    """Path in the folder -> size in bytes, the manifest aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {name: size for name, size in names.items() if name != MANIFEST}
