"""A checkpoint's safetensors files, checked as a whole and read a tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from optimum_comp.utils import progress_disabled


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
MODEL_FILES = (WEIGHTS, INDEX, "model-*.safetensors", "config.json", "generation_config.json", *_PICKLES[1:])
"""Of a pickle, the index alone: enough to know that there is one."""
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
        try:
            with safe_open(file, "pt") as weights:
                slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - no dict
                found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        except SafetensorError as error:
            raise ValueError(
                f"{file.name} is not a whole safetensors file ({error}): it is damaged or was not downloaded to its "
                "end. Get it anew."
            ) from error
        for name in names if names is not None else found:
            if name not in found:
                raise ValueError(f"{INDEX} says that {file.name} holds {name}, which it doesn't. Get both anew.")
            dtype, shape = found[name]
            if dtype not in _FLOATS:
                raise ValueError(
                    f"{file.name}: {name} has dtype {dtype}; COMP prunes weights of {', '.join(_FLOATS)}. Of a "
                    "quantized checkpoint, give the one that it was made from."
                )
            self.tensors[name] = StoredTensor(file, _FLOATS[dtype], shape)

    def read(self, name: str) -> Tensor:
        """A tensor's values as they are on disk, mapped into memory where the platform can."""
        with safe_open(self.tensors[name].file, "pt") as weights:
            return weights.get_tensor(name)

    def require_finite(self, names: Iterable[str]) -> str:
        """Look at every value once.

        Returns:
            A fingerprint of names, shapes and each tensor's least and greatest value: an interrupted run goes on only
            with the weights that it began with.

        Raises:
            ValueError: a NaN or an infinity; names file and tensor.
        """
        digest = hashlib.sha256()
        for name in tqdm(sorted(names), desc="Checking weights", unit="tensor", disable=progress_disabled()):
            stored, values = self.tensors[name], self.read(name)
            least, greatest = map(float, values.aminmax()) if values.numel() else (0.0, 0.0)
            # A NaN anywhere is the least and the greatest.
            if not (abs(least) < float("inf") and abs(greatest) < float("inf")):
                raise ValueError(
                    f"{stored.file.name}: {name} holds NaN or infinite weights; the checkpoint is damaged, nothing "
                    "was pruned."
                )
            digest.update(repr((name, stored.dtype, stored.shape, least, greatest)).encode())
        return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index has them; empty if there is none."""
    return sorted(_files(folder)) if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() else []


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Each weight file, and the names that the index says it holds (`None`: all of them)."""
    if not (folder / INDEX).is_file():
        return {folder / WEIGHTS: None}
    try:
        placed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in placed.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} is damaged: it has no readable weight_map ({error}).") from error
    files: dict[Path, list[str] | None] = {}
    for name, file in pairs:
        # Both notations: a backslash is a separator on Windows and a letter elsewhere.
        if file != PurePosixPath(file).name or file != PureWindowsPath(file).name or file in ("", ".", ".."):
            raise ValueError(
                f"{INDEX} places {name} in {file!r}, outside the model's folder; such an index is not followed."
            )
        path = folder / file
        if path not in files:
            if path.suffix != ".safetensors":
                raise ValueError(f"{INDEX} places {name} in {file!r}, which isn't a safetensors file.")
            if not path.is_file():
                raise ValueError(f"{file} is missing: {INDEX} places {name} in it. Get it, or get the model anew.")
            files[path] = []
        named = files[path]
        if named is not None:
            named.append(name)
    return files


def require_safetensors(source: str, folder: Path) -> None:
    """Refuse a model whose weights only come as a pickle.

    Raises:
        ValueError: as said; tells how to convert it.
        OSError: there are no weights at all.
    """
    if weight_files(folder):
        return
    pickled = [name for name in _PICKLES if (folder / name).is_file()]
    if pickled:
        raise ValueError(
            f"{source} holds its weights as a pickle ({pickled[0]}), and reading a pickle can run whatever code is in "
            "it. If you trust it, convert it once with\n"
            f'  python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{source}', use_safetensors=False, dtype='auto').save_pretrained('NEW_FOLDER')\"\n"
            "or give --allow-pickle (use_safetensors=False)."
        )
    raise OSError(f"{source} holds no weights: neither {WEIGHTS} nor {INDEX} is there.")


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
