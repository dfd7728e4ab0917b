"""Advice fits its cause: a key at the wrong place is named in full, a name in place of a path is found, Ctrl-C told."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.cli import RECIPE, recipe, unmoved
from torch import nn

from unmoved import cli
from unmoved.cli import screen
from unmoved.core.errors import UnmovedError
from unmoved.evaluation.threads import Workers
from unmoved.runs import evaluate, recipe_keys, train
from unmoved.runs import recipe as config
from unmoved.runs.folder import Run

TERM = RECIPE.replace("[objective.ce]", "[objective.trades]\nbeta = 6.0")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("eps=0.1", "unknown key 'eps'; did you mean 'threat.eps' or"),
        ("training.eps=0.1", "training: unknown key 'eps'; did you mean 'threat.eps' or"),
        ("lr=0.1", "did you mean 'optimizer.lr'?"),
        ("threat.lr=0.1", "did you mean 'optimizer.lr'?"),
        ("Epochs=3", "did you mean 'training.epochs'?"),
        ("batch-size=3", "did you mean 'training.batch_size'?"),
        ("part.of=3", "did you mean 'training.part'?"),
        ("beta=3", "did you mean 'objective.trades.beta'?"),
        ("hidden=[3]", "did you mean 'model.hidden'?"),
        ("evaluation.pgd.steps=3", "evaluation: unknown key 'pgd'; did you mean 'evaluation.attacks.pgd'?"),
        ("training.epoch=3", "training: unknown key 'epoch'; did you mean 'epochs'?"),
        ("threat.epsilon=3", "threat: unknown key 'epsilon'; did you mean 'eps'?"),
        ("nothing_like_it=3", "unknown key 'nothing_like_it'; known: attack, average"),
    ],
)
def test_a_key_at_the_wrong_place_is_named_in_full(tmp_path: Path, override: str, said: str) -> None:
    message = unmoved("show", recipe(tmp_path, TERM), "--set", override).mistake()
    assert said in message
    assert "swept" not in message, "which only a command sets"


def test_every_full_key_that_is_offered_may_be_set(tmp_path: Path) -> None:
    path, wrong = recipe(tmp_path, TERM), []
    for full in set(recipe_keys._keys(config.Recipe, config.read(path).tables())):
        try:
            config.read(path, [f"{full}=nonsense"])
        except UnmovedError as error:  # the value is no good, as it may be
            wrong += [full] if "unknown key" in str(error) else []
    assert wrong == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("train", "trades", "--out", "x"), "did you mean 'digits/trades' or 'mnist/trades'?"),
        (("train", "recipes/digits/trades.toml", "--out", "x"), "did you mean 'digits/trades'?"),
        (("show", "home"), "did you mean 'recipes/mine/home.toml'?"),
        (("compare", "TRADES.toml"), "did you mean 'digits/trades' or"),
        (("show", "digits/trade"), "did you mean 'digits/trades'?"),
        (
            ("train", "pgd", "--out", "x"),
            "'pgd' is a name that recipes use, of the kind 'attacks'; expected a recipe: digits/at",
        ),
        (("show", "pdg"), "the nearest name is 'pgd': `unmoved show pgd`"),
        (("show", "nothing-like-it"), "no such file; correct the path, or take a recipe that `unmoved list` shows"),
        (("evaluate", "recipes/mine/home.toml"), "found a file; train it first: unmoved train recipes/mine/home.toml"),
        (("evaluate", "digits/at"), "found a recipe; train it first: unmoved train digits/at --out RUN"),
        (("report", "one"), "found none; did you mean 'runs/grid/one'?"),
        (("doctor", "nothing-like-it"), "found none; correct the path, or train first"),
        (("report", "runs/grid"), "found a folder of runs; did you mean 'runs/grid/one' or 'runs/grid/two'?"),
        (("analyze", "softmax", "runs"), "found a folder of runs; did you mean 'runs/grid/one'"),
    ],
)
def test_a_name_in_place_of_a_path_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], said: str
) -> None:
    recipe(tmp_path / "recipes" / "mine", name="home")
    for name in ("one", "two"):
        Run.create(tmp_path / "runs" / "grid" / name, {"name": name})
    monkeypatch.chdir(tmp_path)
    assert said in unmoved(*command).mistake()


def interrupt(*anything: object, **settings: object) -> None:
    raise KeyboardInterrupt


def test_advice_after_an_interruption_is_of_a_command_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_recipe", interrupt)
        said = unmoved("train", path, "--out", run)
    assert (said.code, said.out) == (130, "")
    assert "--resume" not in said.err, "nothing was saved"
    assert "this begins anew" in said.err
    unmoved("train", path, "--out", run).fine()
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_recipe", interrupt)
        for words in (["train", str(path), f"--out={run}", "--resume"], ["train", str(path), "--out", str(run)]):
            went = ["unmoved", *words] + ["--resume"] * ("--resume" not in words)
            assert f"goes on after the last saved epoch:\n  {shlex.join(went)}\n" in unmoved(*words).err
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_run", interrupt)
        said = unmoved("evaluate", run)
    assert said.code == 130
    assert f"this goes on from there:\n  unmoved evaluate {run}\n" in said.err
    assert "--resume" not in said.err


def test_a_training_of_which_nothing_was_saved_begins_anew(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    Run.create(run, {"name": "killed in its first epoch"})
    unmoved("train", path, "--out", run).fine()
    assert "already holds a run: pass --resume" in unmoved("train", path, "--out", run).mistake()


@pytest.mark.parametrize("command", [one.name or one.callback.__name__ for one in cli.app.registered_commands])
def test_every_command_says_how_it_goes_on_and_only_train_resumes(command: str) -> None:
    words = [command, "x", "--out", "a folder"]
    advice, line = cli.how_to_go_on(words).split(":\n  ")
    assert advice == ("nothing was saved yet; this begins anew" if command == "train" else cli.INTERRUPTED[command])
    assert shlex.split(line) == ["unmoved", *words]


@pytest.mark.parametrize(
    ("nodes", "program"),
    [
        (1, "torchrun --nproc-per-node 2 -m unmoved"),
        (3, "torchrun --nproc-per-node 2 --nnodes 3 ... -m unmoved"),
    ],
)
def test_what_torchrun_started_goes_on_under_torchrun_and_says_so_once(
    nodes: int, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    monkeypatch.setattr(train, "train_recipe", interrupt)
    monkeypatch.setattr(screen.console, "quiet", False)  # put back: processes that are not the first keep silent
    variables = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": str(2 * nodes)}
    for rank in range(2 * nodes):
        for name, value in (variables | {"RANK": str(rank)}).items():
            monkeypatch.setenv(name, value)
        said = unmoved("train", path, "--out", run)
        assert said.code == 130
        line = f"interrupted; nothing was saved yet; this begins anew:\n  {program} train {path} --out {run}\n"
        assert said.err == ("" if rank else line)


def test_an_interruption_waits_for_a_pass_and_not_for_the_attack() -> None:
    ended: list[int] = []

    def attack(model: nn.Module, item: int) -> int:
        for _ in range(20_000):
            model(torch.zeros(1, 1))
        ended.append(item)
        return item

    model: Callable[..., torch.Tensor] = nn.Linear(1, 1)
    with pytest.raises(KeyboardInterrupt), Workers(nn.Linear(1, 1), 2) as pool:
        for _ in pool.map(attack, follow()):
            pass
    assert ended == []
    assert model(torch.zeros(1, 1)).shape == (1, 1), "the caller's own model is left alone"


def follow() -> object:
    yield 0
    yield 1
    raise KeyboardInterrupt
