"""Rotary settings in the words of transformers 4 and of transformers 5.

Version 5 writes `rope_parameters` alone, and version 4 then silently takes the defaults of its own fields. Version 4
writes fields, which version 5 still reads. A folder that has both computes the same in either.
"""

from __future__ import annotations

import json
from typing import Any

import transformers


_THETA, _PARTIAL, _LOCAL_THETA = "rope_theta", "partial_rotary_factor", "rope_local_base_freq"
_POSITIONS = "original_max_position_embeddings"
_ALIASES = {"gpt_neox": {_THETA: "rotary_emb_base", _PARTIAL: "rotary_pct"}}
"""Version 4's own names of fields, by `model_type`; it reads the usual ones too, or makes them."""
_TWO_ROPES = ("gemma3_text",)
"""Where version 4 has a second base, and no other setting, for the layers with a sliding window."""
_STRETCHED = ("yarn", "longrope", "llama3")
"""Types that know the length before stretching."""
_TYPES_OF_4 = ("default", "linear", "dynamic", *_STRETCHED)
_MAJOR = int(transformers.__version__.split(".")[0])


def version_4_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Version 4's fields for the `rope_parameters` of a config; empty if there are none.

    Raises:
        ValueError: version 4 has no words for them.
    """
    parameters = config.get("rope_parameters")
    if not parameters:
        return {}
    model_type = config.get("model_type", "")
    fields: dict[str, Any] = {}
    if any(isinstance(value, dict) for value in parameters.values()):
        parameters, fields[_LOCAL_THETA] = _two_ropes(model_type, parameters)
    if _THETA not in parameters:
        raise ValueError(f"rope_parameters of model_type={model_type!r} names no rope_theta: {parameters}.")
    names = _ALIASES.get(model_type, {})
    for key in (_THETA, _PARTIAL):
        if key in parameters:
            fields |= {key: parameters[key], names.get(key, key): parameters[key]}
    scaling = {key: value for key, value in parameters.items() if key not in (_THETA, _PARTIAL, "type")}
    scaling.setdefault("rope_type", parameters.get("type", "default"))
    kind = scaling["rope_type"]
    if kind not in _TYPES_OF_4:
        raise ValueError(f"rope_type={kind!r} (model_type={model_type!r}) is nothing that transformers 4 knows.")
    if kind in _STRETCHED and config.get(_POSITIONS):
        # Version 5 prefers what is beside `rope_parameters`.
        scaling[_POSITIONS] = config[_POSITIONS]
    if kind == "longrope":
        fields |= _longrope(config, scaling)
    if model_type == "phi3" and kind != "default":
        scaling = _phi3(scaling)
    fields["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    return fields


def _two_ropes(model_type: str, parameters: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The settings of layers with full attention, and the base of those with a sliding window."""
    full, local = (parameters.get(f"{kind}_attention") for kind in ("full", "sliding"))
    if model_type not in _TWO_ROPES or len(parameters) != 2 or not full or not local:
        raise ValueError(f"model_type={model_type!r}: transformers 4 has no rotary settings by kind of layer.")
    rest = {key: value for key, value in local.items() if key not in (_THETA, _PARTIAL, "type", "rope_type")}
    kind = local.get("rope_type", local.get("type", "default"))
    if rest or kind != "default" or local.get(_PARTIAL) != full.get(_PARTIAL) or _THETA not in local:
        raise ValueError(
            f"model_type={model_type!r}: in transformers 4, layers with a sliding window have a rotary base of their "
            f"own and nothing else, and here they have {local}."
        )
    return full, local[_THETA]


def _longrope(config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """Version 4 looks for the original length beside `rope_scaling`, and derives the factor from it."""
    length, positions = scaling.get(_POSITIONS), config.get("max_position_embeddings")
    if not length or not positions:
        raise ValueError(f"rope_type='longrope' needs {_POSITIONS} and max_position_embeddings.")
    factor = scaling.get("factor")
    if factor is not None and scaling.get("attention_factor") is None and factor != positions / length:
        raise ValueError(
            f"rope_type='longrope': transformers 4 takes {positions / length:g} for the factor "
            f"(max_position_embeddings / {_POSITIONS}), and it is {factor:g}."
        )
    return {_POSITIONS: length}


def _phi3(scaling: dict[str, Any]) -> dict[str, Any]:
    """Version 4's Phi-3 takes exactly these three, and the old name of the type."""
    known = ("short_factor", "long_factor")
    if scaling["rope_type"] != "longrope" or set(scaling) - {*known, "rope_type", _POSITIONS}:
        raise ValueError(
            f"model_type='phi3': in transformers 4, rope_scaling is a short_factor and a long_factor, not {scaling}."
        )
    return {"type": "longrope", **{key: scaling[key] for key in known}}


def version_5_parameters(config: dict[str, Any]) -> dict[str, Any] | None:
    """Version 5's `rope_parameters` for the fields of version 4; `None` if there are none.

    Raises:
        ValueError: version 5 reads them as something else.
    """
    model_type = config.get("model_type", "")
    names = _ALIASES.get(model_type, {})
    theta, partial = (config.get(names.get(key, key)) for key in (_THETA, _PARTIAL))
    if theta is None:
        return None
    scaling = dict(config.get("rope_scaling") or {})
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    kind = scaling["rope_type"]
    if kind in _STRETCHED:
        inside, beside = scaling.get(_POSITIONS), config.get(_POSITIONS)
        positions = config.get("max_position_embeddings")
        of_4 = (beside if kind == "longrope" else inside) or positions
        of_5 = beside or inside or positions
        if of_4 != of_5:
            raise ValueError(
                f"rope_type={kind!r}: for {_POSITIONS}, transformers 4 reads {of_4} and transformers 5 reads {of_5}. "
                "Write the same number into rope_scaling and beside it."
            )
        if of_5 is not None:
            scaling[_POSITIONS] = of_5
    parameters = {_THETA: theta, **({} if partial is None else {_PARTIAL: partial}), **scaling}
    if model_type in _TWO_ROPES and config.get(_LOCAL_THETA) is not None:
        local = {_THETA: config[_LOCAL_THETA], "rope_type": "default"}
        return {"full_attention": parameters, "sliding_attention": local}
    return parameters


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """A config with its rotary settings in both tongues.

    Raises:
        ValueError: what it says in one can't be said in the other.
    """
    if not config.get("rope_parameters"):
        parameters = version_5_parameters(config)
        if parameters is None:
            return config
        config = {**config, "rope_parameters": parameters}
    return {**config, **version_4_fields(config)}


def require_portable(config: dict[str, Any], name: str) -> None:
    """Refuse a model before any work whose rotary settings would get lost.

    Args:
        config: as its `config.json` has it, or as transformers has read it.
        name: what to call it.

    Raises:
        ValueError: they can't be said in both tongues; or this is transformers 4, and its fields aren't there or say
            something else than `rope_parameters`.
    """
    both = portable(config)
    if _MAJOR >= 5 or not config.get("rope_parameters"):
        return
    lines = {key: value for key, value in both.items() if _plain(config.get(key)) != _plain(value)}
    if lines:
        missing = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in lines.items())
        raise ValueError(
            f"{name} has the rotary settings (rope_theta, ...) of transformers 5 in rope_parameters, and transformers "
            f"{transformers.__version__} would silently read others. Write to its config.json: {missing}"
        )


def _plain(value: Any) -> Any:
    """`rope_scaling` whichever name it has for its type; `None` where it scales nothing."""
    if not isinstance(value, dict):
        return value
    kind = value.get("rope_type", value.get("type", "default"))
    return {**{k: v for k, v in value.items() if k != "type"}, "rope_type": kind} if kind != "default" else None
