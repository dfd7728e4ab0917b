"""Build the objects that a recipe describes: model, data, phases, attacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from unmoved import data, models
from unmoved.attacks import APGD, PGD
from unmoved.core.errors import UnmovedError
from unmoved.core.phases import Phases
from unmoved.core.protocols import Attack, Method, Term, require_in_ball
from unmoved.core.threat import ThreatModel
from unmoved.core.untrusted import Json
from unmoved.runs import components
from unmoved.runs import recipe as config
from unmoved.runs.third_party import find, is_foreign
from unmoved.terms import Sum

IN_PYTHON = "python:data"  # what the recipe of a judgement names where the data was an object


class Assembly:
    """Build and hold the objects of a recipe: model, data, phases and what else training and evaluation need.

    Args:
        recipe: what to build.
        allow: third-party packages whose code may run.
        progress: called with (done, total) images while they are decoded.
        source: the data, where it was made already for another recipe with the same data.

    Attributes:
        source: the data as the recipe names it; ``data`` has the training part that the recipe asks for.

    Raises:
        UnmovedError: whatever a component refuses, before training starts.
    """

    def __init__(
        self,
        recipe: config.Recipe,
        allow: Collection[str] = (),
        progress: Callable[[int, int], None] | None = None,
        source: data.DataSet | None = None,
    ) -> None:
        self.recipe, self._allow = recipe, tuple(allow)
        if source is None and getattr(recipe.data, "use", "") == IN_PYTHON:
            raise UnmovedError(
                f"recipe {recipe.name}: its model and data were objects in Python; call unmoved.judge(model, data, "
                "out=...) there again (`unmoved report` and `unmoved export` need neither)"
            )
        seed = recipe.training.seed
        if source is None and is_foreign(recipe.model.use):
            find(recipe.model.use, allow, components.PLACES["models"])  # before images are decoded, which takes a while
        self.threat = ThreatModel(recipe.threat.norm, recipe.threat.eps)
        self.source: data.DataSet = (
            self._build("data", recipe.data, progress=progress, lazily=True) if source is None else source
        )
        if not isinstance(self.source, data.DataSet):
            came = type(self.source).__name__
            raise UnmovedError(f"data.use: expected a function that returns a DataSet, came {came}")
        part = recipe.training.part
        self.data = self.source if part is None else self.source.part_of_train(part.number, part.of, part.permutation)
        self.shape, self.num_classes = self.data.shape, len(self.data.classes)
        self.given = {"threat": self.threat, "seed": seed, "num_classes": self.num_classes, "shape": self.shape}
        self._terms: dict[str, Term] = {}
        self._phases = (
            [(start, self._method(tables)) for start, tables in recipe.phase_parts()] if recipe.trained else []
        )
        self.optimizer = self._build("optimizer", recipe.optimizer)
        self.schedule = self._build("schedule", recipe.schedule)
        self.average = self._build("average", recipe.average)
        self.augment = data.augmentation(recipe.training.augment)
        self.check: Attack = (
            PGD(self.threat, steps=10, keep="best", seed=seed)
            if recipe.validation is None
            else self._build("attacks", recipe.validation, **self.given)
        )
        self.attacks: dict[str, Attack] = {
            name: self._build("attacks", table, **self.given) for name, table in recipe.evaluation.attacks.items()
        } or {"pgd": PGD(self.threat, steps=20, keep="best", seed=seed), "apgd": APGD(self.threat, seed=seed)}
        for key, judging in {"validation": self.check, **self.attacks}.items():
            require_in_ball(key if judging is self.check else f"evaluation.attacks.{key}", judging)

    @cached_property
    def phases(self) -> Phases:
        """Return the phases of the training.

        Raises:
            UnmovedError: the recipe is of a model that is judged only.
        """
        if not self._phases:
            raise UnmovedError(
                f"recipe {self.recipe.name}: expected one that trains, came trained = false: its model was trained "
                "elsewhere; write a recipe with an objective and [model] weights to train it further"
            )
        return Phases(*self._phases)

    def parts(self) -> tuple[data.ArraySplit | data.Selection, data.Selection | None]:
        """Return (training data, what is held out of it to choose an epoch or a setting; None if nothing is).

        Both are in the memory of the training data.
        """
        share, train = self.recipe.training.validation, self.data.train
        if not len(train):
            raise UnmovedError(f"{train.name}: expected samples, came none: with test = 'all' all are test samples")
        if not share:
            return train, None
        chosen = train.held_out(share if share < 1 else int(share), seed=0)
        return train.lent(~chosen), train.lent(chosen, f"{train.name}/validation")

    def attack(self, table: str | Mapping[str, object]) -> Attack:
        """Return the attack of this name with its default settings, or of this table, on the recipe's threat model.

        Raises:
            UnmovedError: settings that it does not have; one of another package that was not allowed.
        """
        attack: Attack = self._build("attacks", config.attack_table(table), **self.given)
        return attack

    def _build(self, kind: str, table: components.Component, **given: object) -> Any:
        try:
            return components.build(kind, table, self._allow, **given)
        except UnmovedError as error:
            raise UnmovedError(f"recipe {self.recipe.name}: {error}") from error

    def model(self) -> nn.Module:
        """Make a new model, its weights drawn by the recipe's seed; the caller's random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.training.seed)
            try:
                model = self._build("models", self.recipe.model, **self.given)
            except (RuntimeError, MemoryError, OverflowError) as error:  # torch's words for what is too large
                raise UnmovedError(
                    f"recipe {self.recipe.name}: model.use = {self.recipe.model.use!r} cannot be made with these "
                    f"settings: {str(error)[:300]}; if it is too large, make it smaller"
                ) from error
        if not isinstance(model, nn.Module):
            raise UnmovedError(f"model.use: expected a function that returns an nn.Module, came {type(model).__name__}")
        normalize = self.recipe.model.normalize
        return model if normalize is None else models.normalized(model, normalize.mean, normalize.std)

    def initial_model(self) -> tuple[nn.Module, models.Loaded | None]:
        """Make the model that training begins with, and say what was read of the weights that the recipe names."""
        model, weights = self.model(), self.recipe.model.weights
        if weights is None:
            return model, None
        inner = model if self.recipe.model.normalize is None else model.get_submodule("model")
        return model, models.load_checkpoint(
            inner, weights.file, match=weights.match, ignore=weights.ignore, key=weights.key
        )

    def _method(self, tables: Json) -> Method:
        """Return the attack, objective and defense of a phase."""
        parts = config.PhaseParts.model_validate(tables)
        pairs = [(components.ramp(term.weight), self._term(term)) for term in parts.objective.values()]
        return Method(
            attack=None if parts.attack is None else self._build("attacks", parts.attack, **self.given),
            objective=Sum(*pairs),
            defense=self._build("defenses", parts.defense),
        )

    def _term(self, table: components.TermTable) -> Term:
        """Return the term of a table; the same table in two phases is one object, so that a term goes on learning."""
        key = repr(table.model_copy(update={"weight": None}))
        if key not in self._terms:
            self._terms[key] = self._build("terms", table, **self.given)
        return self._terms[key]
