"""Model families: one declarative spec each, found by `config.model_type`."""

from optimum_comp.families.catalogue import FAMILIES, family_of
from optimum_comp.families.spec import FFN, HEADS, KV, LAYERS, Axis, Family, Fold, Refusal, Slot, renumber


__all__ = [
    "FAMILIES",
    "FFN",
    "HEADS",
    "KV",
    "LAYERS",
    "Axis",
    "Family",
    "Fold",
    "Refusal",
    "Slot",
    "family_of",
    "renumber",
]
