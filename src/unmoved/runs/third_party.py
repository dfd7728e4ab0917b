"""Import classes and functions that a recipe names as ``use = "module:Name"``, if the user allowed the package.

Recipes are shared, and their authors choose which names are called with which arguments. So a recipe can name only what
an allowed package defines itself or lists in ``__all__``, never what it has merely imported, and this is called only if
it makes what its place in the recipe asks for.
"""

from __future__ import annotations

import collections.abc
import functools
import importlib
import importlib.machinery
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from unmoved.core.errors import UnmovedError, did_you_mean
from unmoved.core.untrusted import JsonValue

Factory = Callable[..., Any]
NAMED = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"  # how a recipe names third-party code
_added: list[str] = []  # the folder that this module has appended to sys.path, if any
_UNKNOWN = object()  # a return annotation that is missing or uninformative


@dataclass(frozen=True)
class Place:
    """What a place in a recipe asks for.

    Attributes:
        noun: its name in an error message, with an article.
        of: the class that it must be an instance of; None where being callable is enough.
        takes: the names of the arguments that it is called with; empty where it is not called.
    """

    noun: str
    of: type | None = None
    takes: tuple[str, ...] = ()

    def fits(self, kind: type) -> bool:
        """Return whether an instance of this class is what the place asks for."""
        if self.of is not None:
            return issubclass(kind, self.of)
        owner = next((base for base in kind.__mro__ if "__call__" in vars(base)), None)
        if owner is None:
            return False
        call = kind.forward if owner is nn.Module else kind.__call__  # type: ignore[attr-defined]
        try:
            inspect.signature(call).bind(None, *self.takes)
        except (TypeError, ValueError):
            return False
        return True

    def __str__(self) -> str:
        if self.of is not None:
            return f"{self.noun} (a subclass of {self.of.__name__}, or a function that makes one)"
        takes = ", ".join(self.takes)
        return f"{self.noun} (a class whose objects are called with ({takes}), or a function that makes one)"


def find(use: str, allow: Collection[str], place: Place) -> Factory:
    """Import the class or function ``module:Name`` from the environment or the current folder, if it may be called.

    Installed packages take precedence over the current folder.

    Raises:
        UnmovedError: a package that was not allowed; a module that cannot be imported; a name that the package does
            not have, or has merely imported; something that does not make what the place asks for. Nothing is called.
    """
    module_name, _, name = use.partition(":")
    package = module_name.split(".")[0]
    if package not in allow:
        own = "which recipes do not reach unasked"
        why = own if package == "unmoved" else "which is not part of unmoved, and importing a module runs it"
        raise UnmovedError(
            f"the recipe uses {use!r}, {why}; if you trust it, repeat the command with --allow {package}"
        )
    module = _imported(use, module_name)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        where = getattr(module, "__file__", None)
        raise UnmovedError(
            f"use = {use!r}: {module_name} has no {name!r}"
            + did_you_mean(name, public)
            + (f" (it was imported from {where})" if where else "")
        )
    thing = getattr(module, name)
    is_own = _package(thing) in allow
    if not is_own and not (_package(module, "__name__") in allow and name in _listed(module)):
        raise UnmovedError(
            f"use = {use!r}: expected what {package} defines itself, came {_whence(thing)}, which it has imported; "
            f"if {package} is meant to offer it, list it in __all__ of {module_name}"
        )
    _require_kind(use, thing, place, is_own=is_own)
    factory: Factory = thing
    return factory


def is_foreign(use: str) -> bool:
    """Return whether this names third-party code, as ``module:Name``."""
    return re.fullmatch(NAMED, use) is not None


def packages_of(value: JsonValue) -> set[str]:
    """Return the packages that must be allowed for the tables of a recipe: those of each ``use = "module:Name"``."""
    if isinstance(value, Mapping):
        use, parts = value.get("use"), value.values()
        named = {use.partition(":")[0].split(".")[0]} if isinstance(use, str) and is_foreign(use) else set()
        return named.union(*map(packages_of, parts))
    return set().union(*map(packages_of, value)) if isinstance(value, list | tuple) else set()


def require_made(use: str, made: object, place: Place) -> None:
    """Raise `UnmovedError` unless what a foreign function has made can be called as the place asks for."""
    if place.of is None and not place.fits(type(made)):
        raise UnmovedError(f"use = {use!r}: expected {place}, came an object of type {type(made).__name__}")


def _imported(use: str, name: str) -> types.ModuleType:
    _search_here()
    _require_of_here(use, name.split(".")[0])
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnmovedError(
            f"use = {use!r}: cannot import {name!r} ({error}); run from the folder that holds it, or install it"
        ) from error
    except Exception as error:  # a third-party module may raise anything
        raise UnmovedError(f"use = {use!r}: cannot import {name!r} ({type(error).__name__}: {error})") from error


def _search_here() -> None:
    """Append the current folder to ``sys.path``, in place of the one that this function appended before."""
    here = os.getcwd()
    if _added and _added[0] != here and _added[0] in sys.path:
        sys.path.remove(_added.pop())
    if not {"", here} & set(sys.path):
        sys.path.append(here)
        _added[:] = [here]


def _require_of_here(use: str, package: str) -> None:
    """Raise `UnmovedError` if another module of that name is loaded, which Python would silently use."""
    held = getattr(sys.modules.get(package), "__file__", None)
    spec = importlib.machinery.PathFinder.find_spec(package) if held else None
    if held and spec and spec.origin and os.path.realpath(held) != os.path.realpath(spec.origin):
        raise UnmovedError(
            f"use = {use!r}: expected {package} from {spec.origin}, came {held}, which this process imported before; "
            "start a new process, or give one of the two another name"
        )


def _package(thing: object, key: str = "__module__") -> str:
    """Return the package that defines an object, looking through ``functools.partial``."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    return str(getattr(thing, key, None) or type(thing).__module__).split(".")[0]


def _listed(module: types.ModuleType) -> Collection[object]:
    names = getattr(module, "__all__", ())
    return names if isinstance(names, list | tuple) else ()


def _whence(thing: object) -> str:
    """Return the name of an object and of the module that defines it."""
    name = getattr(thing, "__qualname__", None) or type(thing).__qualname__
    return f"{name} of {getattr(thing, '__module__', None) or type(thing).__module__}"


def _require_kind(use: str, thing: object, place: Place, *, is_own: bool) -> None:
    """Raise `UnmovedError` unless calling ``thing`` makes what the place asks for, as far as annotations tell."""
    if isinstance(thing, type):
        if not place.fits(thing):
            raise UnmovedError(f"use = {use!r}: expected {place}, came the class {thing.__name__}")
        return
    if not callable(thing):
        raise UnmovedError(f"use = {use!r}: expected {place}, came an object of type {type(thing).__name__}")
    hint = _returned(thing)
    if hint is _UNKNOWN and not is_own:  # not written by the allowed package, so its result is unknown
        raise UnmovedError(
            f"use = {use!r}: expected {place}, came {_whence(thing)}, which does not say what it returns; "
            "call it in a function of your own"
        )
    if hint is not _UNKNOWN and not _may_be(hint, place):
        name = getattr(hint, "__name__", None) or str(hint)
        raise UnmovedError(f"use = {use!r}: expected {place}, came a function that returns {name}")


def _returned(function: Callable[..., object]) -> object:
    """Return the return annotation of a function or callable object; `_UNKNOWN` if there is none that can be read."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        return function
    if not hasattr(function, "__annotations__") and not inspect.isroutine(function):
        function = type(function).__call__
    hint = getattr(function, "__annotations__", {}).get("return", _UNKNOWN)
    if isinstance(hint, str):

        def bare() -> None: ...

        bare.__annotations__ = {"return": hint}
        try:
            hint = typing.get_type_hints(bare, getattr(inspect.unwrap(function), "__globals__", {}))["return"]
        except Exception:  # a name that is imported only for type checking
            return _UNKNOWN
    if hint in (Any, object) or isinstance(hint, typing.TypeVar):
        return _UNKNOWN
    return type(None) if hint is None else hint


def _may_be(hint: object, place: Place) -> bool:
    """Return whether a return annotation may be what the place asks for."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_may_be(part, place) for part in typing.get_args(hint))
    if hint is Callable or hint is typing.Callable or origin is collections.abc.Callable:
        arguments = (*typing.get_args(hint), ...)[0]
        return place.of is None and (not isinstance(arguments, list) or len(arguments) == len(place.takes))
    kind = origin or hint
    return isinstance(kind, type) and place.fits(kind)
