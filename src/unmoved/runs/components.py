"""Convert tables of a recipe to objects: ``{use = "pgd", steps = 10}`` makes ``attacks.PGD(steps=10)``.

Whatever `unmoved.terms` and its like export can be named in a recipe, in snake case. The settings of a component are
the parameters of its constructor, read from its signature.
"""

from __future__ import annotations

import inspect
import math
import sys
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    Tag,
    create_model,
    model_validator,
)
from torch import nn

from unmoved import attacks, data, defenses, models, terms
from unmoved.core import protocols
from unmoved.core.errors import UnmovedError, did_you_mean
from unmoved.core.phases import Ramp
from unmoved.core.threat import ThreatModel
from unmoved.models.input_layers import Normalize, require_unit_mean
from unmoved.runs import third_party
from unmoved.runs.third_party import Factory, Place
from unmoved.terms.sum import snake_case
from unmoved.training import averaging, optim

ValueT = TypeVar("ValueT")


def parse_number(value: ValueT | str) -> ValueT | float:
    """Parse ``"8/255"`` to a float; return what is no text as it is.

    Raises:
        ValueError: a text that is no number; true or false.
    """
    if isinstance(value, str):
        # Not fractions.Fraction: "1e999999999" keeps it busy for ever.
        top, slash, bottom = value.replace(" ", "").partition("/")
        try:
            number = float(top) / float(bottom) if slash else float(top)
        except (ValueError, ZeroDivisionError):
            number = math.nan
        if not math.isfinite(number) or slash and math.isinf(float(bottom)):
            raise ValueError(f'expected a number or a fraction such as "8/255", came {value!r:.80}')
        return number
    return _no_truth_value(value)


def _no_truth_value(value: ValueT) -> ValueT:
    """Refuse true and false as numbers: Python counts true as 1, a recipe means something else."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, came {str(value).lower()}")
    return value


class UnknownKey(ValueError):
    """A key that a table does not have; the message may name where it belongs."""

    def __init__(self, key: str, known: Collection[str]) -> None:
        super().__init__(f"unknown key {key!r}")
        self.key, self.known = key, sorted(known)


class Settings(BaseModel):
    """A table of a recipe: unknown keys are refused, with the nearest known one."""

    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, arbitrary_types_allowed=True, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, table: object) -> object:
        if isinstance(table, Mapping) and cls.model_config.get("extra") == "forbid":
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for key in table:
                if key not in known:
                    raise UnknownKey(str(key), known)
        return table


Number = Annotated[float, BeforeValidator(parse_number), Field(json_schema_extra={"examples": ["8/255"]})]
Whole = Annotated[int, BeforeValidator(_no_truth_value)]


class RampTable(Settings):
    """A number that goes from ``from`` to ``to`` over the share ``over`` of its phase, and stays there."""

    from_: Number = Field(alias="from")
    to: Number
    over: Number = 1.0


def _number_or_ramp(value: object) -> str:
    return "<ramp>" if isinstance(value, Mapping | RampTable) else "<number>"


NumberOrRamp = Annotated[
    Annotated[Number, Tag("<number>")] | Annotated[RampTable, Tag("<ramp>")], Discriminator(_number_or_ramp)
]


class Component(Settings):
    """The table of a component: its name, and its settings."""

    use: str


class Foreign(Component):
    """A class or function of another package, ``use = "module:Name"``; its other keys are its arguments."""

    model_config = ConfigDict(extra="allow")
    use: str = Field(pattern=f"^{third_party.NAMED}$")


class WeightsFile(Settings):
    """The weights that a model begins with: a file, and how its tensors are matched with the model's."""

    file: str
    match: Literal["names", "order"] = "names"
    ignore: list[str] = []
    key: str | None = None


class Normalization(Settings):
    """What a model expects of images in [0, 1]: (x - mean) / std per channel, made a layer in front of it."""

    mean: list[Number]
    std: list[Number]

    @model_validator(mode="after")
    def _of_images_in_0_to_1(self) -> Normalization:
        Normalize(self.mean, self.std)
        require_unit_mean(self.mean)
        return self


def _a_file(value: object) -> object:
    return {"file": value} if isinstance(value, str) else value


Weights = Annotated[WeightsFile | None, BeforeValidator(_a_file)]
# Keys of every model's table that are not arguments of what makes it.
OF_MODELS: dict[str, Any] = {"weights": (Weights, None), "normalize": (Normalization | None, None)}


class ForeignModel(Foreign):
    """A model of another package."""

    weights: Weights = None
    normalize: Normalization | None = None


class ForeignTerm(Foreign):
    """A term of another package, with its weight in the objective."""

    weight: NumberOrRamp = 1.0


# --- the names that recipes may use


def _exported(namespace: types.ModuleType) -> dict[str, Factory]:
    return {snake_case(name): getattr(namespace, name) for name in namespace.__all__}


KINDS: dict[str, dict[str, Factory]] = {
    "terms": {name: term for name, term in _exported(terms).items() if name != "sum"},
    "attacks": {
        name: attack
        for name, attack in _exported(attacks).items()
        # An attack that needs another model cannot be written in a recipe; `unmoved evaluate` can name it.
        if "threat" in inspect.signature(attack).parameters and "source" not in inspect.signature(attack).parameters
    },
    "stops": {n: a for n, a in _exported(attacks).items() if hasattr(a, "undo") and a is not attacks.StoppingRule},
    "defenses": _exported(defenses),
    "models": {n: f for n, f in _exported(models).items() if "num_classes" in inspect.signature(f).parameters},
    "data": {n: f for n, f in _exported(data).items() if inspect.isfunction(f) and f is not data.augmentation},
    "optimizer": {snake_case(kind.__name__): kind for kind in optim.OPTIMIZERS},
    "schedule": {snake_case(kind.__name__): kind for kind in optim.SCHEDULES},
    "average": {snake_case(kind.__name__): kind for kind in averaging.AVERAGES},
}
# What a third-party part must be, by its place in the recipe.
PLACES: dict[str, Place] = {
    "terms": Place("a term", takes=("views",)),
    "attacks": Place("an attack", takes=("model", "batch")),
    "stops": Place("a stopping rule", takes=("logits", "y", "value", "step", "memory")),
    "defenses": Place("a defense", takes=("model", "optimizer", "backward")),
    "models": Place("a model", of=nn.Module),
    "data": Place("data", of=data.DataSet),
    "optimizer": Place("an optimizer", takes=("groups",)),
    "schedule": Place("a schedule", takes=("optimizer", "total", "per_epoch")),
    "average": Place("an average", takes=("step", "total")),
}
# What the package gives a component, so that no recipe has to.
INJECTED = {"threat", "num_classes", "shape", "progress", "lazily"}


def _field_type(hint: object) -> object:
    """Return the type of a recipe key for a parameter's annotation."""
    if hint in _KEY_TYPES:
        return _KEY_TYPES[hint]
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = set(typing.get_args(hint))
        members: list[object] = [NumberOrRamp] if Ramp in parts else []
        members += [
            _field_type(part) for part in typing.get_args(hint) if Ramp not in parts or part not in (float, Ramp)
        ]
        return Union[tuple(members)]  # noqa: UP007 - built at run time
    return hint


def _settings(kind: str, name: str, factory: Factory) -> type[Component]:
    """Make the pydantic model of a component from its signature; a term has its weight in the same table."""
    signature = inspect.signature(factory)
    target = vars(factory)["__init__"] if isinstance(factory, type) else factory
    hints = typing.get_type_hints(target, vars(sys.modules[factory.__module__]))
    fields: dict[str, Any] = {"use": (Literal[name], name)}
    for parameter in signature.parameters.values():
        if parameter.name in INJECTED or (kind == "attacks" and parameter.name == "seed"):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        hint = _field_type(hints[parameter.name])
        if isinstance(default, protocols.Term):  # a frozen dataclass, as the table that makes it
            default = {"use": snake_case(type(default).__name__), **vars(default)}
        fields[parameter.name] = (hint, default)
    if kind == "terms":
        fields["weight"] = (NumberOrRamp, 1.0)
    if kind == "models":
        fields |= OF_MODELS
    if "threat" in signature.parameters:
        fields["eps"] = (NumberOrRamp | None, None)
    if kind == "attacks" and "seed" in signature.parameters:
        fields["seed"] = (Whole | None, None)
    doc = (inspect.getdoc(factory) or "").split("\n\n")[0]
    return create_model(f"{name}_settings", __base__=Component, __doc__=doc, **fields)


# Tags of unions stand in angle brackets: error locations drop them, since a reader of the recipe knows no such key.
def _table(kind: str) -> object:
    """Make the union of a kind's components, told apart by ``use``; a string is a component with its defaults."""
    SETTINGS[kind] = {name: _settings(kind, name, factory) for name, factory in KINDS[kind].items()}
    members = [Annotated[settings, Tag(f"<{name}>")] for name, settings in SETTINGS[kind].items()]
    foreign_table = {"terms": ForeignTerm, "models": ForeignModel}.get(kind, Foreign)
    members.append(Annotated[foreign_table, Tag("<module:Name>")])

    def normalise(value: object) -> object:
        if isinstance(value, str):
            value = {"use": value}
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, Mapping) or not isinstance(value.get("use"), str):
            raise ValueError(f'expected a table with use = "...", came {value!r:.200}')
        use = value["use"]
        if ":" not in use and use not in KINDS[kind]:
            raise ValueError(f"unknown name {use!r}" + did_you_mean(use, KINDS[kind]))
        return value

    def tag(value: Component | Mapping[str, str]) -> str:
        use = value.use if isinstance(value, Component) else value["use"]
        return "<module:Name>" if ":" in use else f"<{use}>"

    union: Any = Annotated[Union[tuple(members)], Discriminator(tag)]  # noqa: UP007 - built at run time
    return Annotated[union, BeforeValidator(normalise, json_schema_input_type=union)]


SETTINGS: dict[str, dict[str, type[Component]]] = {}  # kind -> name -> the keys of its table
# Annotation of a parameter -> type of its key. What a setting may hold that is itself a component is added below.
_KEY_TYPES: dict[object, object] = {float: Number, int: Whole, bool: StrictBool}

if TYPE_CHECKING:
    AttackTable: TypeAlias = Component
    AverageTable: TypeAlias = Component
    DataTable: TypeAlias = Component
    DefenseTable: TypeAlias = Component
    ModelTable: TypeAlias = ForeignModel  # with weights and normalize, as all of them
    OptimizerTable: TypeAlias = Component
    ScheduleTable: TypeAlias = Component
    TermTable: TypeAlias = ForeignTerm  # with a weight, as all of them
else:
    TermTable = _KEY_TYPES[protocols.Term] = _table("terms")
    _KEY_TYPES[attacks.StoppingRule] = _table("stops")
    AttackTable = _table("attacks")
    DefenseTable = _table("defenses")
    ModelTable = _table("models")
    DataTable = _table("data")
    OptimizerTable = _table("optimizer")
    ScheduleTable = _table("schedule")
    AverageTable = _table("average")


# --- tables -> objects


def build(kind: str, table: Component, allow: Collection[str] = (), **given: object) -> Any:
    """Make the object that a validated table describes; ``given`` fills parameters that recipes do not set.

    Raises:
        UnmovedError: as `third_party.find`, or arguments that it does not take.
    """
    use = table.use
    factory = third_party.find(use, allow, PLACES[kind]) if ":" in use else KINDS[kind][use]
    settings = {name: getattr(table, name) for name in type(table).model_fields} | (table.model_extra or {})
    ignored = {"use", "weight", *(OF_MODELS if kind == "models" else ())}
    settings = {name: _value(value, allow) for name, value in settings.items() if name not in ignored}
    try:
        parameters = dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        parameters = {}
    accepted = set(parameters)
    eps = settings.pop("eps", None) if "threat" in accepted and "eps" not in accepted else None
    if eps is not None and isinstance(threat := given.get("threat"), ThreatModel):
        given["threat"] = ThreatModel(threat.norm, eps, threat.bounds)
    settings = {name: value for name, value in settings.items() if value is not None or name not in given}
    wanted = {name: value for name, value in given.items() if name in accepted and name not in settings}
    if ":" in use:
        _require_arguments(use, kind, [p for p in parameters.values() if p.name not in {*wanted, *settings}])
    try:
        made = factory(**wanted, **settings)
    except TypeError as error:
        raise UnmovedError(f"use = {use!r}: {error}; its arguments are the other keys of the same table") from error
    if ":" in use and not (kind == "average" and made is None):
        third_party.require_made(use, made, PLACES[kind])
    return made


def _require_arguments(use: str, kind: str, without: Iterable[inspect.Parameter]) -> None:
    """Raise `UnmovedError` if a third-party part needs arguments that neither the recipe nor the package gives."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [
        parameter.name for parameter in without if parameter.default is parameter.empty and parameter.kind in named
    ]
    if needed:
        flag = {"models": "--model-set ", "data": "--data-set "}.get(kind, "")
        shown = ", ".join(f"{flag}{name}=VALUE" if flag else f"{name} = VALUE" for name in needed)
        raise UnmovedError(
            f"use = {use!r}: it needs {' and '.join(needed)}: {shown}"
            + (f", or {needed[0]} = VALUE in the recipe's table" if flag else " in the same table")
        )


def _value(value: Any, allow: Collection[str]) -> Any:
    """Convert a setting to what the constructor takes: nested tables to ramps, terms and stopping rules."""
    if isinstance(value, Component):
        is_term = value.use in KINDS["terms"] or isinstance(value, ForeignTerm)
        return build("terms" if is_term else "stops", value, allow)
    return ramp(value)


def ramp(value: ValueT | RampTable) -> ValueT | Ramp:
    """Convert a ramp of a recipe to the `Ramp` that the package computes with; return any other value as it is."""
    return Ramp(value.from_, value.to, value.over) if isinstance(value, RampTable) else value
