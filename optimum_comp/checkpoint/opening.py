"""Opening a model: as a stream of decoder layers from safetensors files, or as a whole in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from optimum_comp.checkpoint.reader import Checkpoint, require_safetensors, resolve_folder, weight_files
from optimum_comp.checkpoint.rope import require_portable
from optimum_comp.checkpoint.source import ModelSource, ResidentModel, StreamedModel, empty_model
from optimum_comp.families import Family, family_of
from optimum_comp.files import check_model
from optimum_comp.sweep.ranks import device_of, place_on_machine
from optimum_comp.utils import explaining, get_logger, shown


logger = get_logger(__name__)

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

_STREAMABLE = {"dtype", "torch_dtype", "attn_implementation", "config", "use_safetensors"}
"""Arguments of `from_pretrained`, beside those that say where the model is, that a skeleton can be made with."""


def open_source(
    name: str, config: Any, device: torch.device, lookup: dict[str, Any], kwargs: dict[str, Any]
) -> ModelSource:
    """A dense model by its name.

    Args:
        name: hub id or local folder.
        config: its config.
        device: where layers are to run.
        lookup: those of `kwargs` that say where the model is.
        kwargs: as for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: it isn't a decoder-only language model of a supported family, or is quantized; its weights are a
            pickle, or its files don't fit together (names file and tensor); its rotary settings can't be said in the
            words of both major versions of transformers.
        OSError: there are no weights.
    """
    from transformers import AutoModelForCausalLM

    # By the config alone, before gigabytes of weights are downloaded or read.
    family = family_of(config)
    require_portable(config.to_dict(), name)
    asked = _dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantized already; give the checkpoint that it was made from.")
    trusts_pickle = kwargs.get("use_safetensors") is False
    beyond = sorted(set(kwargs) - set(lookup) - _STREAMABLE)
    folder = None if "gguf_file" in kwargs else resolve_folder(name, lookup)
    if folder is not None and not (trusts_pickle and not weight_files(folder)):
        require_safetensors(name, folder, lookup)
        if not beyond:
            return _streamed(folder, config, family, device, asked, kwargs)
    if beyond:
        logger.info("The whole model is loaded into memory (because of %s).", ", ".join(beyond))
    arguments = dict(kwargs)
    if "gguf_file" not in kwargs:
        # What is half precision on disk stays it.
        arguments.setdefault("dtype", "auto")
        arguments["use_safetensors"] = not trusts_pickle or None
    with explaining(f"{shown(name)} can't be loaded"):
        model = AutoModelForCausalLM.from_pretrained(name, **arguments)
    return ResidentModel(model.to(device).eval(), family)


def open_config(name: str, lookup: dict[str, Any]) -> Any:
    """A model's config.

    Args:
        name: folder or hub id.
        lookup: how it is found (see `lookup_arguments`).

    Raises:
        ValueError: it is damaged, or of a kind that this version of transformers doesn't know.
        OSError: there is none, or it can't be reached.
    """
    from transformers import AutoConfig

    if Path(name).is_dir():
        folder, wanted = Path(name) / (lookup.get("subfolder") or ""), lookup.get("gguf_file") or CONFIG
        path = folder / wanted
        if not path.is_file():
            raise FileNotFoundError(f"{shown(folder)} is not a model folder: it has no {shown(wanted)}.")
        problem = f"{shown(path)} can't be used; get it anew"
    else:
        problem = f"there is no folder {shown(name)} here, and from the hub its config can't be read"
    with explaining(problem):
        return AutoConfig.from_pretrained(name, **lookup)


def trusted(name: str | Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which transformers may load a whole model.

    Raises:
        ValueError: the folder is an unfinished run's, or its weights are a pickle and `use_safetensors=False` isn't
            given; or there is no such dtype.
    """
    check_model(name)
    _dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))
    if "gguf_file" in kwargs or kwargs.get("use_safetensors") is False:
        return kwargs
    if Path(name).is_dir():
        require_safetensors(str(name), Path(name) / kwargs.get("subfolder", ""))
    return {**kwargs, "use_safetensors": True}


def _streamed(
    folder: Path,
    config: Any,
    family: Family,
    device: torch.device,
    asked: torch.dtype | None,
    kwargs: dict[str, Any],
) -> StreamedModel:
    from transformers import GenerationConfig

    checkpoint = Checkpoint.open(folder)
    sizes: Counter[torch.dtype] = Counter()
    for stored in checkpoint.tensors.values():
        sizes[stored.dtype] += stored.num_bytes
    dtype = asked or sizes.most_common(1)[0][0]
    arguments = {key: kwargs[key] for key in ("trust_remote_code", "attn_implementation") if key in kwargs}
    with explaining(f"by {CONFIG}, no model can be built for {shown(folder)}"):
        skeleton = empty_model(config, dtype, **arguments)
    skeleton.config.dtype = dtype
    skeleton.config.architectures = [type(skeleton).__name__]
    if (folder / GENERATION_CONFIG).is_file():
        with explaining(f"{folder / GENERATION_CONFIG} can't be read"):
            skeleton.generation_config = GenerationConfig.from_pretrained(folder)
    return StreamedModel(skeleton, family, checkpoint, device, asked)


def _dtype(given: Any) -> torch.dtype | None:
    """A dtype by name; `None` for `"auto"`.

    Raises:
        ValueError: there is none of that name, or it isn't of floating point.
    """
    if given is None or given == "auto":
        return None
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={given!r} is not valid: it must be auto, float32, bfloat16 or float16.")
    return found


def find_device(given: str | torch.device | None) -> torch.device:
    """A device by name, of several processes on one machine each one's own; the processor for `None`.

    Raises:
        ValueError: there is no such device here, or two processes would share a GPU.
    """
    return device_of(given, *place_on_machine(), torch.cuda.device_count() if torch.cuda.is_available() else 0)
