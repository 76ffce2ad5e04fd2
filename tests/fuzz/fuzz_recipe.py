"""A recipe: it is read or refused, and what is read means the same when it is written and read again."""

from __future__ import annotations

from pathlib import Path

from json_mutator import mutate_json

from optimum_comp.stages.recipe import STAGES, Recipe


# YAML reads JSON, too.
mutate = mutate_json


def check(data: bytes, scratch: Path) -> bool:
    """Take bytes as a recipe.

    Returns:
        Whether it was read.
    """
    path = scratch / "recipe.yaml"
    path.write_bytes(data)
    try:
        recipe = Recipe.read(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 1000 and "\n" not in str(error), str(error)
        return False
    assert [stage.name for stage in recipe.stages] == [name for name in STAGES if recipe.stage(name) is not None]
    assert not {"trust_remote_code", "use_safetensors", "token", "cache_dir"} & set(recipe.loading)
    recipe.write(path)
    assert Recipe.read(path).to_dict() == recipe.to_dict() == recipe.changed({}).to_dict()
    assert [each.name for each in scratch.iterdir()] == ["recipe.yaml"]
    return True
