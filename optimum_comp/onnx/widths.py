"""Layers at their real widths: neurons of zeros that fill up a checkpoint aren't exported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from optimum_comp.families import family_of
from optimum_comp.families.cutting import drop_dead_units


@contextlib.contextmanager
def real_widths() -> Iterator[None]:
    """Have models that exporters load meanwhile lose the neurons whose output nothing reads.

    Their configs can't say what is left of them, and their code and an exporter's tracing don't ask. The export's
    comparison with PyTorch, which has the neurons, shows that the graph computes the same.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"]

    def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
        model = original.__func__(cls, *args, **kwargs)
        if isinstance(model, nn.Module):
            try:
                family = family_of(model.config)
            except ValueError:
                # Of a model that can't be pruned, nothing is known; it is exported as it is.
                return model
            drop_dead_units(family, model)
        return model

    PreTrainedModel.from_pretrained = classmethod(load)
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original
