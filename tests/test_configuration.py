from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_comp import CompConfig
from optimum_comp.configuration import (
    ALLOCATIONS,
    AXES,
    BEGINS,
    ERROR_NORMS,
    FIELDS,
    LAYER_METRICS,
    NEURON_METRICS,
    PRESETS,
    RECOVERY_METHODS,
)


VALID = {
    "sparsity": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "layer_fraction": st.floats(0, 1) | st.just("auto"),
    "attention_fraction": st.floats(0, 1) | st.just("auto"),
    "allocation": st.sampled_from(ALLOCATIONS),
    "axes": st.lists(st.sampled_from(AXES), min_size=1, unique=True),
    "layer_metric": st.sampled_from(LAYER_METRICS),
    "protected_layers": st.lists(st.integers(-8, 8)),
    "bridge": st.booleans(),
    "neuron_metric": st.sampled_from(NEURON_METRICS),
    "elimination_block": st.integers(0, 512),
    "error_norm": st.sampled_from(ERROR_NORMS),
    "recovery": st.sampled_from(RECOVERY_METHODS),
    "equalize": st.booleans(),
    "alignment": st.floats(0, 1),
    "ridge": st.floats(0, 1, exclude_min=True),
    "num_samples": st.integers(1, 10_000),
    "sequence_length": st.integers(2, 8192),
    "round_to": st.integers(1, 512),
    "seed": st.integers(0, 2**31),
    "begin": st.sampled_from(BEGINS),
}


def goes_together(fields) -> bool:
    """Whether the fields allow each other."""
    layers, attention = (
        0 if fields.get(name, 0) == "auto" else fields.get(name, 0)
        for name in ("layer_fraction", "attention_fraction")
    )
    if fields.get("allocation") == "adaptive":
        measures = fields.get("neuron_metric", "condition").startswith("condition")
        if not measures or fields.get("error_norm") == "euclidean":
            return False
    return layers + attention <= 1 and not (attention and fields.get("axes") == ["ffn"])


INVALID = [
    ("attention_fraction", -0.1),
    ("attention_fraction", 1.5),
    ("axes", []),
    ("axes", "ffn"),
    ("axes", ["ffn", "ffn"]),
    ("axes", ["vocab"]),
    ("sparsity", 0),
    ("sparsity", 1),
    ("sparsity", -0.1),
    ("sparsity", float("nan")),
    ("sparsity", float("inf")),
    ("sparsity", "0.2"),
    ("sparsity", None),
    ("sparsity", True),
    ("layer_fraction", -0.1),
    ("layer_fraction", 1.1),
    ("layer_metric", "sine"),
    ("protected_layers", "0"),
    ("protected_layers", [0.5]),
    ("bridge", "yes"),
    ("neuron_metric", "taylor"),
    ("elimination_block", -1),
    ("recovery", "finetune"),
    ("alignment", 1.5),
    ("ridge", 0),
    ("ridge", 2),
    ("num_samples", 0),
    ("num_samples", 1.5),
    ("sequence_length", 1),
    ("round_to", 0),
    ("seed", -1),
    ("seed", "x"),
    ("begin", "maybe"),
    ("begin", True),
]


def test_every_field_has_a_strategy_here():
    assert set(VALID) == set(FIELDS)


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALID).filter(goes_together))
def test_json_round_trip(tmp_path_factory, fields):
    config = CompConfig(**fields)
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    again = CompConfig.from_pretrained(folder)
    assert {name: getattr(again, name) for name in FIELDS} == {name: getattr(config, name) for name in FIELDS}
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(("field", "value"), INVALID)
def test_an_error_names_field_value_and_range(field, value):
    with pytest.raises(ValueError) as error:
        CompConfig(**{field: value})
    assert f"{field}={value!r} is not valid: {field} must be " in str(error.value)


def test_an_unknown_field_is_refused_with_a_guess():
    with pytest.raises(ValueError, match=r"no field 'sparsty'. Did you mean 'sparsity'"):
        CompConfig(sparsty=0.3)


def test_an_invalid_file_is_refused(tmp_path):
    (tmp_path / "comp_config.json").write_text(json.dumps({"sparsity": 2}))
    with pytest.raises(ValueError, match="sparsity=2"):
        CompConfig.from_pretrained(tmp_path)


def test_presets():
    assert CompConfig.from_preset("comp").to_dict() == CompConfig().to_dict()
    assert CompConfig.from_preset("comp-mask").resolved_neuron_metric == "condition_mask"
    assert CompConfig.from_preset("comp").resolved_neuron_metric == "condition_gram"
    fasp = CompConfig.from_preset("fasp", sparsity=0.3)
    assert (fasp.neuron_metric, fasp.recovery, fasp.sparsity) == ("wanda", "least_squares", 0.3)
    with pytest.raises(ValueError, match="preset='best'"):
        CompConfig.from_preset("best")
    assert set(PRESETS) == {"comp", "comp-mask", "fasp"}


def test_the_file_holds_nothing_but_fields_and_versions(tmp_path):
    CompConfig().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "comp_config.json").read_text())
    assert set(stored) == {*FIELDS, "optimum_version", "transformers_version"}
