"""What ``module:Name`` in a recipe may reach: what an allowed package offers, of the kind that its place asks for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from unmoved import models, terms
from unmoved.core.errors import UnmovedError
from unmoved.data import DataSet
from unmoved.runs import third_party
from unmoved.runs.components import PLACES

MARK = "called"
LAB = f"""
import functools, os, subprocess, sys, threading
import shutil as tools
from collections.abc import Callable
from os import system
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Linear
from unmoved import Method
from unmoved.data import DataSet
from unmoved.models import mlp
from unmoved.protocols import Attack, ParameterDefense, Term
from other_lab import Net as TheirNet, build as their_build, Loss as TheirLoss, call

if TYPE_CHECKING:
    from nowhere import Thing

__all__ = ["Popen", "system", "TheirNet", "mlp", "their_build", "call", "partial_of_popen"]

def note(*given, **more):
    Path({MARK!r}).touch()

partial_of_system = functools.partial(os.system)
partial_of_partial = functools.partial(functools.partial(os.system), "true")
partial_of_popen = functools.partial(subprocess.Popen, shell=True)
cached_system = functools.lru_cache(os.system)
wrapped_system = functools.wraps(os.system)(lambda *given: note())
bound = threading.Thread(target=note).start
instance = subprocess.CompletedProcess([], 0)
number, text, nothing = 3, "os", None
sub = os
other = sys.modules["other_lab"]

class Note(subprocess.CompletedProcess):
    def __init__(self, **given):
        note()

class Meta(type):
    def __call__(cls, **given):
        note()

class Made(metaclass=Meta):
    pass

class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()

    def forward(self, x):
        return x

class Loss:
    def __call__(self, views):
        return views.y

class LooseLoss:
    def __call__(self, *views, scale=1.0):
        return views

class LearnedLoss(nn.Module):
    def forward(self, views):
        return views.y

class Move:
    def __call__(self, model, batch):
        return batch.x

class Step:
    def __call__(self, model, optimizer, backward):
        return backward()

def net(width=3):
    return Net(width)

def annotated_net(width=3) -> nn.Module:
    return Net(width)

def quoted_net(width=3) -> "Net | None":
    return Net(width)

def unreadable_net(width=3) -> "Thing":
    return Net(width)

def any_net(width=3) -> Any:
    return Net(width)

def clean_up(**given) -> None:
    note()

def count(**given) -> int:
    note()

def loss(**given) -> Callable[[object], torch.Tensor]:
    return Loss()

def loss_by_name(**given) -> Term:
    return Loss()

def move(**given) -> Attack:
    return Move()

def images(**given) -> DataSet:
    return None

class Factory:
    def __call__(self, width=3) -> nn.Module:
        return Net(width)

class Cleaner:
    def __call__(self, **given) -> None:
        note()

factory, cleaner = Factory(), Cleaner()
short = functools.partial(net, 4)
short_cleaner = functools.partial(clean_up, folder="x")
anonymous = lambda width=3: Net(width)
cached = functools.lru_cache(net)
"""
OTHER = """
from torch import nn

class Net(nn.Module):
    def forward(self, x):
        return x

class Loss:
    def __call__(self, views):
        return views.y

def build() -> nn.Module:
    return Net()

def call(**given):
    open("called", "w").close()
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a package my_lab that has imported much, and a module other_lab that nobody allowed."""
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").write_text(LAB)
    (tmp_path / "my_lab" / "deep.py").write_text(
        "from os import system\nfrom my_lab import Net\nclass Own(Net): pass\n"
    )
    (tmp_path / "other_lab.py").write_text(OTHER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("my_lab", "other_lab", "wave", "my_own"):
            del sys.modules[name]


def found(use: str, place: str, *allow: str) -> Any:
    return third_party.find(use, allow or ("my_lab",), PLACES[place])


OFFERED = {
    "models": "Net net annotated_net quoted_net unreadable_net any_net factory short anonymous cached",
    "terms": "Loss LooseLoss LearnedLoss loss loss_by_name",
    "attacks": "Move move",
    "defenses": "Step",
    "data": "images",
}
OFFERED["models"] += " TheirNet mlp their_build"  # by __all__


@pytest.mark.parametrize(("place", "name"), [(place, name) for place in OFFERED for name in OFFERED[place].split()])
def test_what_a_package_offers_is_found_where_its_kind_is_asked_for(lab: Path, place: str, name: str) -> None:
    assert found(f"my_lab:{name}", place) is getattr(sys.modules["my_lab"], name)
    assert found("my_lab.deep:Own", "models").__name__ == "Own"


IMPORTED = (
    "system partial_of_system partial_of_partial cached_system wrapped_system bound instance Popen os subprocess "
)
IMPORTED += "tools sub other number text nothing Path Any Linear TheirLoss __builtins__ __class__ __loader__ __spec__"
IMPORTED += " partial_of_popen call"


@pytest.mark.parametrize("place", PLACES)
def test_what_a_package_merely_imported_is_called_nowhere(lab: Path, place: str) -> None:
    """Not what it lists in ``__all__`` either, where nothing says that it makes what the place asks for."""
    for name in IMPORTED.split():
        with pytest.raises(UnmovedError, match=f"my_lab:{name}': expected"):
            found(f"my_lab:{name}", place)
    with pytest.raises(UnmovedError, match=r"system of posix, which it has imported; .* list it in __all__"):
        found("my_lab.deep:system", place)
    assert not (lab / MARK).exists()


WRONG = {
    "models": "Note Made Loss clean_up count loss cleaner short_cleaner images",
    "terms": "Note Made Move Step clean_up count images move",
    "attacks": "Note Made Loss Step Net clean_up loss loss_by_name images",
    "stops": "Note Made Loss Move clean_up loss",
    "defenses": "Note Made Loss Move clean_up loss move",
    "data": "Note Made Net Loss clean_up count annotated_net",
    "optimizer": "Note Made Move clean_up move",
    "schedule": "Note Made Loss clean_up loss",
    "average": "Note Made Loss Step clean_up loss",
}


@pytest.mark.parametrize("place", WRONG)
def test_what_makes_something_else_is_refused_before_it_is_called(lab: Path, place: str) -> None:
    for name in WRONG[place].split():
        with pytest.raises(UnmovedError, match=f"my_lab:{name}': expected {PLACES[place].noun}"):
            found(f"my_lab:{name}", place)
    assert not (lab / MARK).exists()


def test_another_module_under_an_allowed_name_offers_nothing(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a package does that keeps an old name alive; ``os.__all__`` lists system."""
    import os

    monkeypatch.setitem(sys.modules, "my_lab.os", os)
    with pytest.raises(UnmovedError, match="system of posix"):
        found("my_lab.os:system", "models")
    with pytest.raises(UnmovedError, match=r"cannot import 'my_lab\.subprocess'"):
        found("my_lab.subprocess:run", "models")


def test_what_is_defined_in_another_allowed_package_is_found(lab: Path) -> None:
    assert found("my_lab:TheirLoss", "terms", "my_lab", "other_lab").__module__ == "other_lab"


def test_the_current_folder_stands_behind_what_is_installed(lab: Path) -> None:
    """A module of the standard library that nobody imports: the one that lies here does not run, allowed or not."""
    sys.modules.pop("wave", None)
    for name in ("wave", "my_own"):
        (lab / f"{name}.py").write_text(f"open({MARK!r}, 'w').close()\ndef net(): pass\n")
    with pytest.raises(UnmovedError, match=r"wave has no 'net'.*imported from .*wave\.py"):
        found("wave:net", "models", "wave")
    assert not (lab / MARK).exists()
    assert found("my_own:net", "models", "my_own").__name__ == "net"
    assert (lab / MARK).exists()
    assert sys.path.index(str(lab)) == len(sys.path) - 1


def test_ours_are_of_the_kinds_that_places_ask_for() -> None:
    """The rules would admit the package's own parts."""
    assert PLACES["models"].fits(nn.Linear)
    assert PLACES["data"].fits(DataSet)
    assert not PLACES["models"].fits(DataSet)
    for name in terms.__all__:
        thing = getattr(terms, name)
        if isinstance(thing, type):
            assert PLACES["terms"].fits(thing), name
    for name in ("mlp", "small_cnn"):
        assert third_party.find(f"unmoved.models:{name}", ["unmoved"], PLACES["models"]) is getattr(models, name)


def test_a_module_of_the_same_name_from_another_folder_is_not_taken_for_the_one_of_here(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lab / "my_own.py").write_text("def net(): pass\n")
    assert found("my_own:net", "models", "my_own").__name__ == "net"
    other = tmp_path / "other"
    other.mkdir()
    (other / "my_own.py").write_text("def other(): pass\n")
    monkeypatch.chdir(other)
    with pytest.raises(UnmovedError, match=r"expected my_own from .*other.*, came .*start a new process"):
        found("my_own:other", "models", "my_own")
    del sys.modules["my_own"]
    assert found("my_own:other", "models", "my_own").__name__ == "other"
    assert str(lab) not in sys.path, "of two folders only the current one is on the path"
