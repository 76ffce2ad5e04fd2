"""What distilling needs, and what can be refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import is_peft_available

from optimum_comp.chain_memory import BASE_BYTES, available_memory
from optimum_comp.checkpoint.source import empty_model
from optimum_comp.distillation.rounding import rounds_head
from optimum_comp.distillation.settings import DistilSettings
from optimum_comp.distillation.translation import unlike
from optimum_comp.families import family_of
from optimum_comp.utils import parameter_count


TOGETHER = 32
"""Samples that the teacher writes side by side."""
_MOST_LOGITS = 2**29
"""Bytes of the student's logits that are made at a time; the teacher's, and a gradient, are as large."""
_LORA_RANK = 16


def memory_of(student: Any, teacher: Any, settings: DistilSettings, lora_rank: int, *, written: bool) -> int:
    """About what distilling takes at its worst, in bytes; rather too much than too little.

    Weights, gradients and Adam's two moments of the student, in float32; the teacher's weights; activations that wait
    for the way back; logits of both and a gradient.

    Args:
        student: a model, which may be on the meta device.
        teacher: likewise.
        settings: how.
        lora_rank: of additions that are trained in place of the weights; 0 for none.
        written: the teacher writes text.
    """
    config = student.config
    weights, embedding = parameter_count(student), student.get_input_embeddings().weight.numel()
    trained = weights - (0 if rounds_head(settings.rounding) else embedding)
    if lora_rank:
        trained = weights * lora_rank // 200
    # Of a large vocabulary a part may be enough, and all samples of a step are then looked at together.
    tokens = settings.tokens_of_a_step
    family = family_of(config)
    layers = family.get_layers(student)
    hidden, width = family.ffn.consumer.matrix(layers[0]).shape
    activations = len(layers) * tokens * (16 * hidden + 5 * width) * 4
    # Of a smaller vocabulary than the teacher's, the teacher's is the one that counts.
    rows = int(teacher.config.vocab_size)
    logits = 4 * 3 * micro_batch(settings, rows) * settings.sequence_length * rows
    checkpoint = 4 * weights if lora_rank == 0 else 0
    rounding = 2 * 4 * weights + 4 * len(layers) * (3 * hidden**2 + width**2) if settings.rounding is not None else 0
    training = activations + logits + 12 * trained + max(checkpoint, rounding)
    writing = TOGETHER * 2 * settings.sequence_length * 4 * hidden * len(layers) if written else 0
    return BASE_BYTES + 4 * weights + 4 * parameter_count(teacher) + max(training, writing)


def choose_rank(
    student: Any, teacher: Any, settings: DistilSettings, max_memory: int | None, *, written: bool
) -> tuple[int, int]:
    """The rank of low-rank additions, 0 to train the weights themselves, and the bytes that it takes.

    Args:
        student: a model, which may be on the meta device.
        teacher: likewise.
        settings: how; their rank, if they have one.
        max_memory: bytes that the process may take; what it takes and what is free, if `None`.
        written: the teacher writes text.
    """
    rank = settings.lora_rank or 0
    needed = memory_of(student, teacher, settings, rank, written=written)
    room = available_memory() if max_memory is None else max_memory
    is_open = settings.lora_rank is None and settings.rounding is None and (settings.device or "cpu") == "cpu"
    if is_open and needed > room and is_peft_available():
        rank = _LORA_RANK
        needed = memory_of(student, teacher, settings, rank, written=written)
    return rank, needed


def disk_of(parameters: int, lora_rank: int) -> int:
    """Bytes on the disk: checkpoints with Adam's moments, of which the best, the last and a new one lie there at once.

    When the result is written, two of them are left.

    Args:
        parameters: of the student.
        lora_rank: of low-rank additions, whose checkpoints are small; 0 for none.
    """
    return (36 if lora_rank == 0 else 8) * parameters


def check_settings(student: Any, teacher: Any, settings: DistilSettings) -> None:
    """Refuse what can be refused by the configs of both models.

    Raises:
        ValueError: the family isn't supported, the student knows more tokens than the teacher, samples are too long
            for the student, or its weights can't be rounded.
        ImportError: LoRA without `peft`.
    """
    family = family_of(student)
    theirs = getattr(teacher, "vocab_size", None)
    if theirs is None or student.vocab_size > theirs:
        raise ValueError(unlike(student.vocab_size, theirs or 0))
    limit = getattr(student, "max_position_embeddings", None)
    if limit is not None and settings.sequence_length > limit:
        raise ValueError(
            f"sequence_length={settings.sequence_length} is more than the {limit} tokens that the model can read."
        )
    if settings.lora_rank and not is_peft_available():
        raise ImportError("lora_rank needs peft: pip install 'optimum-comp[distil]'.")
    if settings.rounding is not None:
        layer = family.get_layers(empty_model(student, torch.float32))[0]
        if not any(isinstance(module, nn.Linear) for module in layer.modules()):
            raise ValueError(
                f"rounding={settings.rounding!r} isn't possible here: {student.model_type} has dense layers of its "
                "own kind. Leave it away."
            )


def micro_batch(settings: DistilSettings, vocabulary: int) -> int:
    """Samples that are looked at together: all of a step's whose logits have room, and a divisor of their number."""
    most = max(1, _MOST_LOGITS // (4 * vocabulary * settings.sequence_length))
    return max(each for each in range(1, settings.batch_size + 1) if settings.batch_size % each == 0 and each <= most)
