"""What is wrong in a recipe is said in the recipe's words, whatever the type of a key is."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from unmoved.core.errors import UnmovedError
from unmoved.runs import recipe
from unmoved.runs.components import SETTINGS
from unmoved.runs.recipe_errors import messages

RECIPE: dict[str, Any] = {
    "name": "mine",
    "data": "digits",
    "model": "linear",
    "threat": {"norm": "linf", "eps": 0.1},
    "objective": {"ce": {}},
}
FOLDER = {"use": "folder", "path": "pets"}


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"data": FOLDER | {"size": "a"}}, "data.size: expected a whole number or a list, came 'a'"),
        ({"data": FOLDER | {"size": [1, "b"]}}, "data.size.1: expected a whole number, came 'b'"),
        ({"data": FOLDER | {"cache": 3.5}}, "data.cache: expected true or false or a text or a path, came 3.5"),
        (
            {"data": FOLDER | {"test": "some"}},
            "data.test: expected a number or a fraction such as \"8/255\" or 'all', came 'some'",
        ),
        ({"training": {"epochs": "many", "validation": []}}, "training.epochs: expected a whole number, came 'many'"),
        ({"training": {"validation": []}}, "training.validation: expected a number, came []"),
        ({"evaluation": {"attacks": 3}}, "evaluation.attacks: expected a table, came 3"),
        ({"defense": {"use": "awp", "gamma": []}}, "defense.gamma: expected a number, came []"),
    ],
)
def test_the_key_what_was_expected_and_what_came(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(UnmovedError) as told:
        recipe.parse(RECIPE | tables, "mine.toml")
    assert f"mine.toml: {said}" in str(told.value).splitlines()


@pytest.mark.parametrize("wrong", [[[]], "no such thing", {"no": "such"}])
def test_no_key_of_any_component_speaks_of_the_types_behind_it(wrong: object) -> None:
    said = []
    for kind in SETTINGS.values():
        for name, settings in kind.items():
            for key in settings.model_fields.keys() - {"use"}:
                try:
                    TypeAdapter(settings).validate_python({"use": name, key: wrong})
                except ValidationError as error:
                    said += messages(error, recipe.Recipe, {})
    assert len(said) > 100
    internal = ("Input", "valid", "function-", "[path", "literal[", "tuple[", "union[", "is-instance", "Annotated")
    assert [line for line in said if any(word in line for word in internal)] == []
