"""Recipes: whatever is right is read as it is meant, whatever is wrong is answered with file, key and mend."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from helpers.cli import EVERYTHING, RECIPE, RECIPES, recipe

from unmoved import attacks, defenses
from unmoved.core.errors import UnmovedError
from unmoved.core.phases import Ramp
from unmoved.runs import components, train
from unmoved.runs import recipe as config
from unmoved.runs.assembly import Assembly
from unmoved.runs.by_recipe import without_seeds
from unmoved.runs.folder import Run

OURS = sorted(RECIPES.glob("*/*.toml"))
assert OURS


def tables(extra: str = "", without: str = "") -> dict[str, Any]:
    """The tests' recipe as plain data, a table left out and some TOML added."""
    base = tomllib.loads(RECIPE)
    base.pop(without, None)
    return base | tomllib.loads(extra)


def printed(parsed: config.Recipe) -> str:
    return tomli_w.dumps(parsed.tables())


# --- what is right


@pytest.mark.parametrize("path", OURS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_of_ours_parses_and_its_printed_form_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    parsed = config.read(path)
    assert parsed.name == f"{path.parent.name}/{path.stem}"
    again = config.read(recipe(tmp_path, printed(parsed)))
    assert again == parsed
    assert again.tables() == parsed.tables()
    assert printed(again) == printed(parsed)


def test_a_recipe_with_everything_in_it_survives_printing() -> None:
    parsed = config.parse(tomllib.loads(EVERYTHING))
    again = config.parse(tomllib.loads(printed(parsed)))
    assert again == parsed
    assert again.tables() == parsed.tables()
    assert again.phase_parts() == parsed.phase_parts()


def test_the_first_comment_describes_a_recipe_and_decides_nothing(tmp_path: Path) -> None:
    described, silent, own = (tmp_path / name / "at.toml" for name in ("described", "silent", "own"))
    for path, words in (
        (described, "# What it is.\n#   And more.\n\n# Not this.\n"),
        (silent, ""),
        (own, "# No.\ndescription = 'Mine.'\n"),
    ):
        path.parent.mkdir()
        path.write_text(words + RECIPE, encoding="utf-8")
    recipes = [config.read(path, ["name=at"]) for path in (described, silent, own)]
    assert [recipe.description for recipe in recipes] == ["What it is.\nAnd more.", None, "Mine."]
    assert recipes[0].setting() == recipes[1].setting() == recipes[2].setting()
    assert without_seeds(recipes[0].tables()) == without_seeds(recipes[1].tables())
    run = Run.create(tmp_path / "run", recipes[0].tables())
    begun = train._begun(run.path, recipes[1].tables())  # the folder of one is gone on with by the other
    assert begun is not None
    assert begun.path == run.path


def test_what_is_not_said_is_spelled_out() -> None:
    parsed = config.parse(tables(without="optimizer"))
    assert parsed.tables()["optimizer"]["use"] == "sgd"
    assert parsed.tables()["schedule"] == {"use": "constant"}
    assert parsed.tables()["defense"] == {"use": "plain"}
    assert parsed.tables()["attack"]["restarts"] == 1


def test_fractions_are_numbers() -> None:
    extra = '[threat]\neps = "8/255"\n[attack]\nuse = "pgd"\nstep_size = "2 / 255"'
    parsed = config.parse(tables(extra))
    assert parsed.threat.eps == 8 / 255
    assert parsed.attack.step_size == 2 / 255
    for bad in ("8/0", "eight", "8//255", ""):
        with pytest.raises(UnmovedError, match="a number or a fraction"):
            config.parse(tables(f'[threat]\neps = "{bad}"'))


def test_a_bare_name_is_a_component_with_its_defaults() -> None:
    assert config.parse(tables('defense = "awp"')).tables()["defense"] == {"use": "awp", "gamma": 0.01}
    assert config.parse(tables('attack = "none"')).attack is None
    assert config.parse(tables('[attack]\nuse = "none"')).attack is None


def test_term_tables_are_named_by_the_term_unless_they_say_otherwise() -> None:
    parsed = config.parse(tables('[objective.ce]\n[objective.boost]\nuse = "kl"\nweight = 2.0', without="objective"))
    assembly = Assembly(parsed)
    assert repr(assembly.phases.at(0, 2).objective) == "Sum((1.0, CE(view='adv', label_smoothing=0.0)), (2.0, KL()))"


# --- overrides


def test_overrides_change_one_key(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    parsed = config.read(
        path,
        ["training.epochs=5", "threat.eps=8/255", "name=other", "data.test=0.5", "attack.eps={from=0.0, to=0.1}"],
    )
    assert (parsed.training.epochs, parsed.threat.eps, parsed.name, parsed.data.test) == (5, 8 / 255, "other", 0.5)
    assert components.ramp(parsed.attack.eps) == Ramp(0.0, 0.1)
    assert parsed.training.batch_size == 64


def test_an_override_of_use_leaves_the_settings_of_the_old_component_behind(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    assert config.read(path, ["model.use=linear"]).tables()["model"] == {"use": "linear"}
    assert config.read(path, ["model.use=mlp"]).model.hidden == (16,)  # the same component keeps them
    assert config.read(path, ["defense.use=sam", "defense.rho=0.1"]).tables()["defense"] == {"use": "sam", "rho": 0.1}


def test_overrides_reach_into_phases_by_position(tmp_path: Path) -> None:
    path = recipe(tmp_path, RECIPE + "[[phases]]\nfrom_epoch = 1\nattack = { steps = 7 }\n")
    parsed = config.read(path, ["phases.0.attack.steps=3", "phases.0.from_epoch=2"])
    assert parsed.phase_parts()[1][0] == 2
    assert parsed.phase_parts()[1][1]["attack"]["steps"] == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epochs", "expected key=value"),
        ("=5", "expected key=value"),
        ("training.epoch=5", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("trainin.epochs=5", "unknown key 'trainin'; did you mean 'training'?"),
        ("training.epochs.more=5", "'epochs' is a value, not a table"),
        ("training=5", "training: "),
        ("training.epochs=many", "training.epochs: "),
        ("phases.1.attack.steps=3", "expected an index below 1, came '1'"),
        ("phases.first.from_epoch=3", "expected an index below 1, came 'first'"),
        ("phases.0=3", "expected the index of a phase before '0'"),
        ("attack.use=pdg", "unknown name 'pdg'; did you mean 'pgd'?"),
        ("a..b=1", "unknown key 'a'"),
    ],
)
def test_bad_overrides_say_what_is_wrong(tmp_path: Path, override: str, words: str) -> None:
    path = recipe(tmp_path, RECIPE + "[[phases]]\nfrom_epoch = 1\nattack = { steps = 7 }\n")
    with pytest.raises(UnmovedError) as caught:
        config.read(path, [override])
    assert words in str(caught.value)


# --- what is wrong


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs = 2", "epoch = 2", "training: unknown key 'epoch'; did you mean 'epochs'?"),
        ("[training]", "[trainig]", "unknown key 'trainig'; did you mean 'training'?"),
        ("hidden = [16]", "hiden = [16]", "model: unknown key 'hiden'; did you mean 'hidden'?"),
        ('use = "mlp"', 'use = "mpl"', "model: unknown name 'mpl'; did you mean 'mlp'?"),
        ('use = "adam"', 'use = "adan"', "optimizer: unknown name 'adan'; did you mean 'adam'?"),
        ("[objective.ce]", "[objective.cee]", "objective.cee: unknown name 'cee'; did you mean 'ce'?"),
        ("[objective.ce]", "[objective]", "objective: "),
        ("[objective.ce]", '[objective]\nuse = "ce"', "objective: expected named terms, such as [objective.ce]"),
        ("eps = 0.1", "eps = -0.1", "threat.eps: expected a finite number >= 0, came -0.1"),
        ("eps = 0.1", "eps = 8", 'threat.eps: expected at most 1 for linf on images in [0.0, 1.0], came 8; if it is in '
         '0..255 units write "8/255"'),
        ("eps = 0.1", "eps = nan", "threat.eps: "),
        ('norm = "linf"', 'norm = "l3"', "threat.norm: unknown value 'l3'"),
        ("epochs = 2", 'epochs = "two"', "training.epochs: "),
        ("epochs = 2", "epochs = 0", "training.epochs: "),
        ("epochs = 2", "epochs = 2.5", "training.epochs: "),
        ("batch_size = 64", "batch_size = -1", "training.batch_size: "),
        ("hidden = [16]", "hidden = 16", "model.hidden: "),
        ("lr = 0.01", "lr = [0.01]", "optimizer.lr: "),
        ("epochs = 2", "epochs = 2\nvalidation = -0.1", "training.validation: "),
        ("epochs = 2", "epochs = 2\nseed = -1", "training.seed: "),
        ('precision = "float32"', 'precision = "fp32"', "training.precision: unknown value 'fp32'; did you mean"),
        ("epochs = 2", 'epochs = 2\naugment = "crops"', "training.augment: "),
        ("steps = 2", "steps = 2\neps = { from = 0.0 }", "attack.eps.to: "),
        ("steps = 2", "steps = 2\neps = { from = 0, to = 0.1, ower = 1 }", "unknown key 'ower'; did you mean 'over'?"),
        ("steps = 2", 'steps = 2\nloss = "kll"', "attack.loss: unknown name 'kll'; did you mean 'kl'?"),
        ("steps = 2", 'steps = 2\nthreat = "l2"', "attack: unknown key 'threat'"),
        ('[attack]\nuse = "pgd"', "[attack]", "attack: expected a table with use"),
        ('[data]\nuse = "digits"\ntest = 1500', "", "data: "),
        ('use = "mlp"', 'use = "my lab:model"', "model.use: "),
    ],
)  # fmt: skip
def test_mistakes_name_the_file_the_key_and_the_mend(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in RECIPE
    path = recipe(tmp_path, RECIPE.replace(old, new, 1))
    with pytest.raises(UnmovedError) as caught:
        config.read(path)
    assert f"{path}: " in str(caught.value)
    assert words in str(caught.value)
    assert "<" not in str(caught.value).replace(">= ", "")  # tags of unions are not for readers


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    text = RECIPE.replace("epochs = 2", "epochs = 0").replace('"adam"', '"adan"')
    with pytest.raises(UnmovedError) as caught:
        config.read(recipe(tmp_path, text))
    assert "training.epochs" in str(caught.value)
    assert "optimizer" in str(caught.value)


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ("[[phases]]\nattack = { steps = 1 }", "phases.0.from_epoch: "),
        ("[[phases]]\nfrom_epoch = 0", "phases.0.from_epoch: "),
        ("[[phases]]\nfrom_epoch = 3\n[[phases]]\nfrom_epoch = 2", "from_epoch must increase, came [3, 2]"),
        ("[[phases]]\nfrom_epoch = 1\nattac = {}", "phases.0: unknown key 'attac'; did you mean 'attack'?"),
        ("[[phases]]\nfrom_epoch = 1\nattack = { stepz = 1 }", "from epoch 1: attack: unknown key 'stepz'"),
        ('[[phases]]\nfrom_epoch = 1\ndefense = { use = "apw" }', "unknown name 'apw'; did you mean 'awp'?"),
        ("[[phases]]\nfrom_epoch = 1\nobjective = { kll = {} }", "kll: unknown name 'kll'; did you mean 'kl'?"),
        ("phases = 3", "phases: "),
    ],
)  # fmt: skip
def test_bad_phases(tmp_path: Path, phases: str, words: str) -> None:
    path = recipe(tmp_path, phases + RECIPE if phases.startswith("phases") else RECIPE + phases)
    with pytest.raises(UnmovedError) as caught:
        config.read(path)
    assert f"{path}: " in str(caught.value)
    assert words in str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UnmovedError, match=r"no such file; did you mean 'digits/trades'\?"):
        config.read("recipes/digits/trade.toml")
    with pytest.raises(UnmovedError, match=r"tiny\.toml: not valid TOML: .*line 1"):
        config.read(recipe(tmp_path, "epochs: 5"))
    with pytest.raises(UnmovedError, match="expected a regular file, came a folder"):
        config.read(tmp_path)
    (tmp_path / "image.toml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UnmovedError, match=r"image.toml: expected text in UTF-8"):
        config.read(tmp_path / "image.toml")
    with pytest.raises(UnmovedError, match="data: expected a value, came none"):
        config.read(recipe(tmp_path, ""))


def test_a_recipe_is_read_as_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_bytes(('name = "na\u00efve"\n' + RECIPE).encode())
    assert config.read(path).name == "na\u00efve"


# --- phases and ramps


PHASED = """
[attack]
use = "pgd"
steps = 2
eps = { from = 0.0, to = 0.1, over = 0.5 }

[objective.ce]
[objective.kl]
weight = { from = 0.0, to = 6.0 }

[[phases]]
from_epoch = 2
attack = { steps = 5 }
defense = { use = "awp", gamma = 0.02 }

[[phases]]
from_epoch = 6
attack = { eps = { from = 0.1, to = 0.2 } }
objective = { ce = { view = "clean" } }

[[phases]]
from_epoch = 8
attack = { use = "fgsm" }
defense = { gamma = 0.03 }
"""


def test_changes_of_phases_accumulate() -> None:
    (_, first), (_, second), (_, third), (_, fourth) = config.parse(tables(PHASED)).phase_parts()
    assert first["defense"] == {"use": "plain"}
    assert (first["attack"]["steps"], second["attack"]["steps"], third["attack"]["steps"]) == (2, 5, 5)
    assert second["attack"]["eps"] == {"from": 0.0, "to": 0.1, "over": 0.5}
    # A ramp replaces a ramp: the share of the first one does not leak into the third phase.
    assert third["attack"]["eps"] == {"from": 0.1, "to": 0.2}
    assert third["defense"] == second["defense"]
    assert (second["objective"]["ce"]["view"], third["objective"]["ce"]["view"]) == ("adv", "clean")
    assert third["objective"]["kl"] == second["objective"]["kl"]
    # Another `use` replaces the table: nothing of the old attack is left.
    assert fourth["attack"] == {"use": "fgsm"}
    assert fourth["defense"] == {"use": "awp", "gamma": 0.03}


def test_ramps_resolve_to_the_number_in_the_middle_of_a_phase() -> None:
    phases = Assembly(config.parse(tables(PHASED))).phases
    eps = {epoch: phases.at(epoch, 10).attack.threat.radius for epoch in (0, 0.25, 1, 1.5, 2, 3, 4, 6, 7)}
    expected = {0: 0.0, 0.25: 0.025, 1: 0.1, 1.5: 0.1, 2: 0.0, 3: 0.05, 4: 0.1, 6: 0.1, 7: 0.15}
    assert eps == pytest.approx(expected)
    assert phases.at(8, 10).attack == attacks.FGSM(phases.at(8, 10).attack.threat)
    assert phases.at(8, 10).attack.threat.radius == 0.1  # of the recipe's own threat model
    weights = {epoch: dict(phases.at(epoch, 10).objective.named())["kl"][0] for epoch in (0.5, 4, 9)}
    assert weights == pytest.approx({0.5: 1.5, 4: 3.0, 9: 3.0})
    assert phases.at(1, 10).defense == defenses.Plain()
    assert phases.at(2, 10).defense == defenses.AWP(gamma=0.02)


def test_one_term_in_two_phases_is_one_object() -> None:
    extra = "[[phases]]\nfrom_epoch = 1\nobjective = { ce = { weight = 2.0 } }"
    phases = Assembly(config.parse(tables(extra))).phases
    (_, before), (_, after) = phases.phases
    assert before.objective.terms[0][1] is after.objective.terms[0][1]
    assert after.objective.terms[0][0] == 2.0


def test_attacks_are_built_with_the_recipes_threat_and_seed() -> None:
    extra = """
[evaluation.attacks.near]
use = "pgd"
eps = 0.05
seed = 9
[evaluation.attacks.far]
use = "apgd"
"""
    assembly = Assembly(config.parse(tables(extra) | {"training": {"seed": 4}}))
    assert assembly.attacks["near"].threat.eps == 0.05
    assert assembly.attacks["near"].seed == 9
    assert assembly.attacks["far"].threat == assembly.threat
    assert assembly.attacks["far"].seed == 4
    plain = Assembly(config.parse(tables(without="evaluation")))
    assert list(plain.attacks) == ["pgd", "apgd"]
    assert plain.attacks["pgd"].steps == 20


def test_models_are_drawn_by_the_seed_alone() -> None:
    assembly = Assembly(config.parse(tables()))
    before = torch.random.get_rng_state()
    one = assembly.model().state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    two = assembly.model().state_dict()
    other = Assembly(config.parse(tables() | {"training": {"seed": 1}})).model().state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["linear.weight"], other["linear.weight"])


# --- the schema


def test_the_schema_is_json_and_every_recipe_obeys_it() -> None:
    schema = config.Recipe.model_json_schema()
    assert json.loads(json.dumps(schema)) == schema
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    for path in OURS:
        validator(schema).validate(config.read(path).tables())
    wrong = config.parse(tables()).tables() | {"threat": {"norm": "linf", "epsilon": 0.1}}
    with pytest.raises(jsonschema.ValidationError):
        validator(schema).validate(wrong)


def test_what_a_recipe_can_name_is_what_the_namespaces_export() -> None:
    names = {kind: set(members) for kind, members in components.KINDS.items()}
    assert {"ce", "kl", "trades", "mart"} <= names["terms"]
    assert {"pgd", "apgd", "fgsm"} <= names["attacks"]
    assert names["stops"] == {"friendly", "sensible"}
    assert {"plain", "sam", "awp"} <= names["defenses"]
    assert not names["attacks"] & names["stops"]
    for kind, members in components.KINDS.items():
        for name, factory in members.items():
            assert callable(factory), (kind, name)
            assert factory.__doc__, (kind, name)  # what `unmoved list` prints


def test_a_recipe_in_the_current_folder_is_called_by_its_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (RECIPES / "digits" / "at.toml").read_text()
    (tmp_path / "mine.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert config.read(Path("mine.toml")).name == "mine"
    assert config.read(tmp_path / "mine.toml").name == f"{tmp_path.name}/mine"
