"""A checkpoint's safetensors files, checked as a whole and read a tensor at a time."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import constants, list_repo_files
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from optimum_comp.strict_json import read_object
from optimum_comp.utils import progress_disabled, shown


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_FILES = (WEIGHTS, INDEX, "model-*.safetensors", "config.json", "generation_config.json")
_PICKLE = "pytorch_model.bin"
_PICKLES = (_PICKLE, f"{_PICKLE}.index.json")
"""Names under which transformers looks for a pickle."""
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
"""Endings of weights that aren't safetensors, pickles for the most part."""
_PIECE = 2**18
"""Values that are looked at at a time: they fit into a processor's cache."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, without its values.

    Attributes:
        file: the safetensors file that holds it.
        dtype: of its values on disk.
        shape: its shape.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass
class Checkpoint:
    """A folder's weights.

    Attributes:
        folder: where they are.
        tensors: by the names that the files give them.
    """

    folder: Path
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read and check the headers of all files, and no values.

        Raises:
            ValueError: the index points outside the folder, names a file that isn't there or a tensor that its file
                doesn't hold; a file is truncated or its header lies; a tensor isn't of floating point. Names file and
                tensor.
        """
        checkpoint = cls(folder)
        for file, names in _files(folder).items():
            checkpoint._add(file, names)
        return checkpoint

    def _add(self, file: Path, names: list[str] | None) -> None:
        with open_weights(file) as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - no dict
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        for name in names if names is not None else found:
            if name not in found:
                raise ValueError(
                    f"{INDEX} says that {file.name} holds {shown(name)}, which it doesn't. Get both anew."
                )
            dtype, shape = found[name]
            if dtype not in _FLOATS:
                raise ValueError(
                    f"{file.name}: {shown(name)} has dtype {dtype}; COMP prunes weights of {', '.join(_FLOATS)}. Of a "
                    "quantized checkpoint, give the one that it was made from."
                )
            if math.prod(max(size, 1) for size in shape) >= 2**60:
                # One of its sizes is 0, and so it fits into the file, but not into torch.
                raise ValueError(
                    f"{file.name}: {shown(name)} has shape {shown(list(shape))}, which is too large. Get it anew."
                )
            self.tensors[name] = StoredTensor(file, _FLOATS[dtype], shape)

    def read(self, name: str) -> Tensor:
        """A tensor's values as they are on disk, mapped into memory where the platform can."""
        with safe_open(self.tensors[name].file, "pt") as weights:
            return weights.get_tensor(name)

    def require_finite(self, names: Iterable[str]) -> str:
        """Look at every value once.

        Returns:
            A digest of names, dtypes, shapes and values: an interrupted run goes on only with the weights that it
            began with.

        Raises:
            ValueError: a NaN or an infinity; names file and tensor.
        """
        digest = hashlib.sha256()
        for name in tqdm(sorted(names), desc="Checking weights", unit="tensor", disable=progress_disabled()):
            stored = self.tensors[name]
            digest.update(repr((name, stored.dtype, stored.shape)).encode())
            # Both looks at a piece while it is in the processor's cache; no piece is a copy.
            for piece in self.read(name).flatten().split(_PIECE):
                if piece.numel() and not all(map(math.isfinite, piece.aminmax())):
                    raise ValueError(
                        f"{stored.file.name}: {shown(name)} holds NaN or infinite weights; the checkpoint is damaged, "
                        "nothing was pruned."
                    )
                digest.update(memoryview(piece.view(torch.uint8).numpy()))
        return digest.hexdigest()


@contextlib.contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """A safetensors file whose header has been checked: its tensors fill the file, in place and size.

    Raises:
        ValueError: it is truncated, or its header lies.
    """
    try:
        with safe_open(file, "pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(
            f"{file.name} is not a whole safetensors file ({shown(error)}): it is damaged or was not downloaded "
            "to its end. Get it anew."
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index has them; empty if there is none."""
    return sorted(_files(folder)) if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() else []


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Each weight file, and the names that the index says it holds (`None`: all of them)."""
    if not (folder / INDEX).is_file():
        return {folder / WEIGHTS: None}
    try:
        placed = read_object(folder / INDEX)["weight_map"]
        pairs = [(str(name), str(file)) for name, file in placed.items()]
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{INDEX} is damaged: it has no readable weight_map ({shown(error)}).") from error
    # By the list of names, since some that an index can hold are too long to be looked for.
    there = {path.name for path in folder.iterdir() if path.is_file()}
    files: dict[Path, list[str] | None] = {}
    for name, file in pairs:
        # Both notations: a backslash is a separator on Windows and a letter elsewhere.
        if file != PurePosixPath(file).name or file != PureWindowsPath(file).name or file in ("", ".", ".."):
            raise ValueError(
                f"{INDEX} places {shown(name)} in {shown(file)!r}, outside the model's folder; such an index is not "
                "followed."
            )
        path = folder / file
        if path not in files:
            if path.suffix != ".safetensors":
                raise ValueError(f"{INDEX} places {shown(name)} in {shown(file)!r}, which isn't a safetensors file.")
            if file not in there:
                raise ValueError(
                    f"{shown(file)} is missing: {INDEX} places {shown(name)} in it. Get it, or get the model anew."
                )
            files[path] = []
        named = files[path]
        if named is not None:
            named.append(name)
    return files


def require_safetensors(source: str, folder: Path, lookup: Mapping[str, Any] | None = None) -> None:
    """Refuse a model whose weights don't come as safetensors.

    Args:
        source: folder or hub id.
        folder: where its files are (see `resolve_folder`).
        lookup: how it was found; for a look at what a model on the hub has beside them.

    Raises:
        ValueError: there are others: a pickle, as a rule; tells how to convert it.
        OSError: there are no weights at all.
    """
    if weight_files(folder):
        return
    names = {path.name for path in folder.glob("*")} | _names_on_hub(source, lookup or {})
    pickled = [name for name in _PICKLES if name in names]
    if pickled:
        raise ValueError(
            f"{source} holds its weights as a pickle ({pickled[0]}), and reading a pickle can run whatever code is in "
            "it. If you trust it, convert it once with\n"
            f'  python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{source}', use_safetensors=False, dtype='auto').save_pretrained('NEW_FOLDER')\"\n"
            "or give --allow-pickle (use_safetensors=False)."
        )
    others = sorted(name for name in names if name.endswith(_OTHER_WEIGHTS))
    if others:
        raise ValueError(
            f"{source} holds no safetensors weights, but {', '.join(map(shown, others[:3]))}. Most such files are "
            "pickles, and reading a pickle can run whatever code is in it. If you trust it, load the model with what "
            "wrote it and save it with save_pretrained. --allow-pickle doesn't help: transformers reads no other "
            f"pickle than {_PICKLE}, or the shards that {_PICKLES[1]} names."
        )
    raise OSError(f"{source} holds no weights: neither {WEIGHTS} nor {INDEX} is there.")


def _names_on_hub(source: str, lookup: Mapping[str, Any]) -> set[str]:
    """Names of a model's files on the hub; empty for a local folder, or where the hub isn't to be asked."""
    if Path(source).is_dir() or lookup.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return set()
    paths = list_repo_files(source, revision=lookup.get("revision"), token=lookup.get("token"))
    subfolder = PurePosixPath(lookup.get("subfolder") or "")
    return {path.name for path in map(PurePosixPath, paths) if path.parent == subfolder}


def resolve_folder(source: str, lookup: dict[str, Any], files: Iterable[str] = MODEL_FILES) -> Path:
    """The local folder of a model; of one on the hub, the cache's.

    Args:
        source: folder or hub id.
        lookup: how it is found (see `lookup_arguments`).
        files: patterns of those that are wanted; what of them the cache lacks is downloaded.

    Raises:
        OSError: there is no such model, or it can't be reached.
    """
    if Path(source).is_dir():
        return Path(source) / lookup.get("subfolder", "")
    from huggingface_hub import snapshot_download

    known = {k: v for k, v in lookup.items() if k in ("revision", "token", "cache_dir", "local_files_only")}
    subfolder = f"{lookup['subfolder']}/" if lookup.get("subfolder") else ""
    return Path(snapshot_download(source, allow_patterns=[subfolder + name for name in files], **known)) / subfolder
