"""Define the base class of analyses of runs: a name, options of the command, and two methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Self, TypeVar

from unmoved.analyses.studies.study import AnalysedRun, Progress, Study, no_progress
from unmoved.core.errors import UnmovedError

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """Say how a field of a `StudyKind` is given to ``unmoved analyze``: as ``--`` and the field's name.

    A field whose default is False or True is a flag; with the default True it is switched off by ``--no-...``.

    Attributes:
        help: what it does; the name of the analysis is put before it.
        parse: text to the field's value; None for flags and whole numbers.
        at_least: the smallest whole number.
    """

    help: str
    parse: Callable[[str], object] | None = None
    at_least: int | None = None


def option(default: T, help: str, *, parse: Callable[[str], T] | None = None, at_least: int | None = None) -> T:
    """Make a field of a `StudyKind` that is an `Option` of the command too."""
    return field(default=default, metadata={"option": Option(help, parse, at_least)})


@dataclass(frozen=True)
class StudyKind(ABC):
    """Define an analysis of runs, with its options as fields; `unmoved.analyses.studies.STUDIES` lists them.

    Attributes:
        name: WHAT in ``unmoved analyze WHAT``, and the folder that the study is written to.
    """

    name: ClassVar[str]

    @classmethod
    def of(cls, given: Mapping[str, object]) -> Self:
        """Make the analysis from the options that the command was given: texts, flags and whole numbers.

        Raises:
            UnmovedError: an option that it does not have; a value that it refuses.
        """
        options = {one.name: one.metadata["option"] for one in fields(cls)}
        values: dict[str, object] = {}
        for name, value in given.items():
            if name not in options:
                known = f"its own are {', '.join(f'--{one}' for one in options)}" if options else "it has none"
                raise UnmovedError(f"--{name}: expected an option of {cls.name}, came one of another; {known}")
            parse = options[name].parse
            values[name] = parse(value) if parse else value
        return replace(cls(), **values)

    @classmethod
    def for_report(cls) -> Self:
        """Return the analysis with the options of a report's chapter: by default those of the command."""
        return cls()

    def prepare(self, run: AnalysedRun) -> None:  # noqa: B027 - most have no such part
        """Cache the tables that need this run alone, so that several processes can make them."""

    @abstractmethod
    def __call__(self, runs: Sequence[AnalysedRun], progress: Progress = no_progress) -> Study:
        """Analyse the runs.

        Raises:
            UnmovedError: runs that the analysis refuses.
        """
