"""What a command line says of a model, data and attacks means the tables of a recipe."""

from __future__ import annotations

from typing import Any

import pytest

from unmoved.core.errors import UnmovedError
from unmoved.runs.shorthand import attack_tables, data_table, model_table


@pytest.mark.parametrize(
    ("text", "settings", "table"),
    [
        ("digits", [], {"use": "digits"}),
        ("digits", ["test=500"], {"use": "digits", "test": 500}),
        ("mnist:some/folder", [], {"use": "mnist", "path": "some/folder"}),
        ("mnist:C:\\folder", [], {"use": "mnist", "path": "C:\\folder"}),
        ("arrays:x.npz", ["layout=NHWC"], {"use": "arrays", "path": "x.npz", "layout": "NHWC"}),
        ("my_lab:images", ["size=8"], {"use": "my_lab:images", "size": 8}),
    ],
)
def test_data(text: str, settings: list[str], table: dict[str, Any]) -> None:
    assert data_table(text, settings) == table


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mnist", "--data: expected mnist:PATH, came 'mnist' without it"),
        ("mnits:a/folder", "did you mean 'mnist'"),
        ("my lab", "expected NAME:PATH with one of"),
    ],
)
def test_data_that_is_none(text: str, words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        data_table(text)


@pytest.mark.parametrize(
    ("text", "given", "table"),
    [
        ("my_models:Net", {}, {"use": "my_models:Net"}),
        ("timm:resnet18", {}, {"use": "timm", "model": "resnet18"}),
        ("timm:hf-hub:owner/name", {}, {"use": "timm", "model": "hf-hub:owner/name"}),
        ("mlp", {"settings": ["hidden=[16, 8]"]}, {"use": "mlp", "hidden": [16, 8]}),
        ("small_cnn", {"mean": "0.1307", "std": "0.3081"}, {"use": "small_cnn", "mean": [0.1307], "std": [0.3081]}),
        (
            "my_models:Net",
            {"mean": "0.5,1/2,.5", "std": "0.1, 0.2,0.3", "settings": ["depth=18", "kind=wide"]},
            {
                "use": "my_models:Net",
                "depth": 18,
                "kind": "wide",
                "normalize": {"mean": [0.5, 0.5, 0.5], "std": [0.1, 0.2, 0.3]},
            },
        ),
        ("linear", {"weights": {"file": "a.pt"}}, {"use": "linear", "weights": {"file": "a.pt"}}),
    ],
)
def test_models(text: str, given: dict[str, Any], table: dict[str, Any]) -> None:
    assert model_table(text, **given) == table


@pytest.mark.parametrize(
    ("text", "given", "words"),
    [
        ("smal_cnn", {}, "expected module:Name, timm:NAME or one of .*did you mean 'small_cnn'"),
        ("my_models.MyNet", {}, "came 'my_models.MyNet'; did you mean 'my_models:MyNet'"),
        ("./lab/my_models.py", {}, "did you mean 'lab.my_models:Name'"),
        ("my_models.py:MyNet", {}, "came 'my_models.py:MyNet'; did you mean 'my_models:MyNet'"),
        ("linear", {"mean": "0.1"}, "--std: expected a value because --mean is given"),
        ("linear", {"mean": "a", "std": "b"}, "--mean: expected numbers such as"),
        ("linear", {"settings": ["use=os:system"]}, "expected key=value"),
        ("linear", {"settings": ["depth"]}, "--model-set 'depth': expected key=value"),
    ],
)
def test_models_that_are_none(text: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        model_table(text, **given)


def test_attacks() -> None:
    text = "pgd(steps=100, loss = dlr),square( queries=1000 ) , my_lab.attacks:Mine(a=[1, 2])"
    text += ",standard,transfer:runs/a(b),pgd"
    assert attack_tables(text) == [
        ("pgd(steps=100, loss = dlr)", {"use": "pgd", "steps": 100, "loss": "dlr"}),
        ("square( queries=1000 )", {"use": "square", "queries": 1000}),
        ("my_lab.attacks:Mine(a=[1, 2])", {"use": "my_lab.attacks:Mine", "a": [1, 2]}),
        ("standard", {"use": "standard"}),
        ("transfer:runs/a(b)", {"use": "transfer:runs/a(b)"}),
        ("pgd", {"use": "pgd"}),
    ]
    assert attack_tables("") == []
    assert attack_tables('pgd(loss="a,b)")') == [('pgd(loss="a,b)")', {"use": "pgd", "loss": "a,b)"})]


@pytest.mark.parametrize(
    "text",
    ["pgd(steps=3", "pgd)", "pgd(steps)", "pgd(1=2)", "(steps=3)", "pgd(a=1)b", "pgd(use=apgd)", "pgd(a=1, a=2)"],
)
def test_attacks_that_are_none(text: str) -> None:
    with pytest.raises(UnmovedError, match="--attacks"):
        attack_tables(text)
