"""Where decoder layers come from and where pruned ones go: a model in memory, or a checkpoint on disk."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimum_comp.checkpoint.parts import write_part
from optimum_comp.checkpoint.reader import Checkpoint
from optimum_comp.core.surgery import Counts
from optimum_comp.families import Family
from optimum_comp.families.cutting import Cut, cut_layer, cut_parameter, fill_layer, fill_parameter
from optimum_comp.sweep.folding import Factors, multiplied
from optimum_comp.utils import get_logger, shown


logger = get_logger(__name__)

HALF_PRECISION = (torch.bfloat16, torch.float16)

MATMUL_DTYPES = ("auto", "float32", "bfloat16")


class ModelSource(ABC):
    """A dense model, one decoder layer of which is at hand at a time.

    Attributes:
        model: the model; its weights may be on the meta device.
        family: its family.
        device: where layers are run.
        compute_dtype: in which they are run.
        state_dtype: in which hidden states are kept between layers.
        is_resident: whether all weights are in memory. Then each of several processes that work together has a copy
            and has to `commit`; else only the first writes.
    """

    model: Any
    device: torch.device
    compute_dtype: torch.dtype
    state_dtype: torch.dtype
    is_resident: bool

    def __init__(self, family: Family):
        self.family = family

    @property
    def layers(self) -> nn.ModuleList:
        """The dense model's decoder layers."""
        return self.family.get_layers(self.model)

    @abstractmethod
    def outside(self, *, head: bool = False) -> contextlib.AbstractContextManager[None]:
        """What isn't in a decoder layer (embeddings; the language-model head if asked for) is at hand meanwhile."""

    @abstractmethod
    def layer(self, index: int) -> contextlib.AbstractContextManager[nn.Module]:
        """A decoder layer of the dense model, at hand meanwhile."""

    @abstractmethod
    def commit(self, index: int, place: int, cuts: Sequence[Cut], factors: Factors, room: Counts) -> None:
        """Take a layer's pruned form.

        Args:
            index: the layer's place in the dense model.
            place: its place in the pruned one.
            cuts: what goes from it, in the order in which it was found.
            factors: what the pruned layer's parameters are multiplied by.
            room: units that it is then filled up to with zeros, of the kinds whose number differs by layer.
        """

    @abstractmethod
    def whole(self) -> Any:
        """The dense model with all its weights, for what can't be done a layer at a time."""

    @abstractmethod
    def check(self) -> str:
        """Look at every weight.

        Returns:
            A fingerprint of the weights; empty where there is none.

        Raises:
            ValueError: a weight is NaN or infinite; names it.
        """


class ResidentModel(ModelSource):
    """A model that is in memory; pruned in place.

    Args:
        model: a causal language model in evaluation mode.
        family: its family.
    """

    is_resident = True

    def __init__(self, model: Any, family: Family):
        super().__init__(family)
        self.model = model
        self.device, self.state_dtype = model.device, model.dtype
        self.compute_dtype = compute_dtype(model.dtype, model.device)

    @contextlib.contextmanager
    def outside(self, *, head: bool = False) -> Iterator[None]:
        inside = {id(parameter) for parameter in self.layers.parameters()}
        with in_dtype([p for p in self.model.parameters() if id(p) not in inside], self.compute_dtype):
            yield

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        layer = self.layers[index]
        with in_dtype(list(layer.parameters()), self.compute_dtype):
            yield layer

    def commit(self, index: int, place: int, cuts: Sequence[Cut], factors: Factors, room: Counts) -> None:
        layer = self.layers[index]
        cut_layer(self.family, self.model.config, layer, cuts)
        for name, given in factors.items():
            parameter = layer.get_parameter(name)
            parameter.data = multiplied(parameter.data, given)
        fill_layer(self.family, self.model.config, layer, cuts[-1].after, room)

    def whole(self) -> Any:
        return self.model

    def check(self) -> str:
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(
                    f"{name} holds NaN or infinite weights; the checkpoint is damaged, nothing was pruned."
                )
        return ""


class StreamedModel(ModelSource):
    """A checkpoint on disk: the model is a skeleton on the meta device, and a layer is read when its turn comes.

    Args:
        skeleton: the model without weights (see `empty_model`).
        family: its family.
        checkpoint: its weights.
        device: where layers are run.
        store_dtype: of the pruned weights; each keeps its own if `None`.

    Attributes:
        parts: folder that pruned layers are written to; set before the first `commit`.

    Raises:
        ValueError: a weight is missing or has another shape than the config says; names file and tensor.
    """

    is_resident = False

    def __init__(
        self,
        skeleton: Any,
        family: Family,
        checkpoint: Checkpoint,
        device: torch.device,
        store_dtype: torch.dtype | None = None,
    ):
        super().__init__(family)
        self.store_dtype = store_dtype
        self.model = skeleton
        self.device = device
        self.state_dtype = skeleton.dtype
        self.compute_dtype = compute_dtype(skeleton.dtype, device)
        self.checkpoint = checkpoint
        self.parts: Path | None = None
        self.names = stored_names(skeleton, checkpoint)

    def outside_names(self) -> list[str]:
        """Names of the weights that aren't in a decoder layer, as the model has them."""
        prefix = f"{self.family.layers}."
        return [name for name in self.names if not name.startswith(prefix)]

    @contextlib.contextmanager
    def outside(self, *, head: bool = False) -> Iterator[None]:
        wanted = set(self.outside_names())
        embedding = self.model.get_input_embeddings().weight
        output = self.model.get_output_embeddings()
        if output is not None and not head and output.weight is not embedding:
            # A head of its own isn't read where nobody asks for logits.
            heads = {name for name, parameter in self.model.named_parameters() if parameter is output.weight}
            wanted -= heads
        with self._at_hand(self.model, "", sorted(wanted)):
            # Loading gives the embedding a new parameter, which a tied head has to share.
            self.model.tie_weights()
            yield
        self.model.tie_weights()

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        layer = self.layers[index]
        names = [name for name, _ in layer.named_parameters()]
        with self._at_hand(layer, f"{self.family.layers}.{index}.", names):
            yield layer

    @contextlib.contextmanager
    def _at_hand(self, module: nn.Module, prefix: str, names: list[str]) -> Iterator[None]:
        from accelerate.utils import set_module_tensor_to_device

        try:
            for name in names:
                value = self.checkpoint.read(self.names[prefix + name])
                set_module_tensor_to_device(module, name, self.device, value=value, dtype=self.compute_dtype)
            yield
        finally:
            for name in names:
                set_module_tensor_to_device(module, name, "meta")

    def commit(self, index: int, place: int, cuts: Sequence[Cut], factors: Factors, room: Counts) -> None:
        assert self.parts is not None
        layer, prefix = self.layers[index], self.family.layers
        tensors: dict[str, Tensor] = {}
        for name, _ in layer.named_parameters():
            value = cut_parameter(self.family, layer, name, self.read(f"{prefix}.{index}.{name}"), cuts)
            value = multiplied(value, factors.get(name, []))
            value = fill_parameter(self.family, layer, name, value, cuts[-1].after, room)
            tensors[f"{prefix}.{place}.{name}"] = value.contiguous()
        write_part(tensors, self.parts / part_name(place))

    def write_outside(self) -> list[Path]:
        """Write what isn't in a decoder layer, a part for each weight; returns the parts."""
        assert self.parts is not None
        written = []
        for number, name in enumerate(self.outside_names()):
            written.append(self.parts / f"outside-{number:05d}.safetensors")
            write_part({_saved_name(self.model, name): self.read(name).contiguous()}, written[-1])
        return written

    def read(self, name: str) -> Tensor:
        """A weight of the dense model, in the dtype that the pruned one will have."""
        value = self.checkpoint.read(self.names[name])
        return value if self.store_dtype is None else value.to(self.store_dtype)

    def whole(self) -> Any:
        from transformers import AutoModelForCausalLM

        logger.info("Loading the whole model into memory for a moment.")
        trust = {"trust_remote_code": True} if self.model.config.__module__.startswith("transformers_modules") else {}
        folder = self.checkpoint.folder
        return AutoModelForCausalLM.from_pretrained(folder, dtype=self.compute_dtype, **trust).to(self.device).eval()

    def check(self) -> str:
        return self.checkpoint.require_finite(self.names.values())


def part_name(place: int) -> str:
    """File of the pruned model's decoder layer number `place`."""
    return f"layer-{place:05d}.safetensors"


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Processors multiply half-precision matrices slowly or inexactly; there, weights are widened as they are read."""
    return torch.float32 if device.type == "cpu" and stored in HALF_PRECISION else stored


def find_matmul_dtype(given: str, source: ModelSource) -> torch.dtype:
    """What factors of matrix products are rounded to while a model's layers run.

    Args:
        given: `"float32"`, `"bfloat16"`, or `"auto"`: bfloat16 on a processor that has instructions for it and would
            compute in float32 otherwise.
        source: the model.

    Raises:
        ValueError: none of these, or it isn't the source's to choose.
    """
    if given not in MATMUL_DTYPES:
        raise ValueError(f"matmul_dtype={given!r} is not valid: it must be one of {', '.join(MATMUL_DTYPES)}.")
    computes = source.compute_dtype
    if given == "auto":
        return torch.bfloat16 if computes == torch.float32 and multiplies_bfloat16(source.device) else computes
    if source.device.type != "cpu":
        raise ValueError(
            f"matmul_dtype={given!r} is for the CPU; on {source.device.type}, layers are computed in the dtype that "
            "they are loaded in (dtype)."
        )
    return torch.bfloat16 if given == "bfloat16" else computes


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a processor has instructions for products of bfloat16 matrices; without, they are slower than float32.

    Arm's aren't counted: nobody has measured there what is gained.
    """
    # Older versions of torch don't tell.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def empty_model(config: Any, dtype: torch.dtype, *, kind: Any = None, **arguments: Any) -> Any:
    """The model that a config describes, on the meta device; buffers that its code computes are real.

    Args:
        config: the config.
        dtype: of its weights.
        kind: class of the model; the one that the config names, if `None`.
        arguments: as for `AutoModelForCausalLM.from_config`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        build = functools.partial(AutoModelForCausalLM.from_config, dtype=dtype, **arguments) if kind is None else kind
        model = build(config)
    model.tie_weights()
    return model.eval()


def _saved_name(model: Any, name: str) -> str:
    """The name of a weight on disk: transformers 5 renames some as it loads a model, and back as it saves it."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return name
    (saved,) = revert_weight_conversion(model, {name: model.get_parameter(name)})
    return str(saved)


def stored_names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """For each weight of the model (tied ones once), the name that the checkpoint's files give it.

    Raises:
        ValueError: a weight is missing or has another shape than the model's; names file and tensor.
    """
    shared: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
        shapes[id(parameter)] = tuple(parameter.shape)
    # Checkpoints of the bare decoder leave the causal model's prefix away.
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    known: set[str] = set()
    for key, aliases in shared.items():
        saved = [_saved_name(model, name) for name in aliases]
        known |= {*aliases, *saved}
        candidates = [*aliases, *saved, *(name.removeprefix(prefix) for name in aliases)]
        found = next((name for name in candidates if name in checkpoint.tensors), None)
        if found is None:
            raise ValueError(f"{aliases[0]} is missing from the checkpoint in {checkpoint.folder.name}. Get it anew.")
        stored = checkpoint.tensors[found]
        if stored.shape != shapes[key]:
            raise ValueError(
                f"{stored.file.name}: {found} has shape {list(stored.shape)}, and by config.json it is to have "
                f"{list(shapes[key])}."
            )
        names[aliases[0]] = found
    unknown = sorted(set(checkpoint.tensors) - known - {name.removeprefix(prefix) for name in known})
    # Buffers that old versions of transformers stored; today's compute them.
    unknown = [
        name for name in unknown if not name.endswith((".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias"))
    ]
    if unknown:
        logger.warning(
            "%d weights are not the model's and are left out: %s ...", len(unknown), ", ".join(map(shown, unknown[:3]))
        )
    return names


@contextlib.contextmanager
def in_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Parameters or buffers in another dtype meanwhile; widening and narrowing again gives the same values."""
    originals = [(tensor, tensor.data) for tensor in tensors if tensor.dtype != dtype]
    for tensor, data in originals:
        tensor.data = data.to(dtype)
    try:
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data
