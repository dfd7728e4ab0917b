"""List the runs of a comparison: recipes, with swept values, times seeds or disjoint parts of the training data."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.core.untrusted import Json
from unmoved.runs import recipe as config
from unmoved.runs.evaluate import require_named_attacks
from unmoved.runs.folder import folder_name


@dataclass(frozen=True)
class Job:
    """One run to make.

    Attributes:
        tables: the tables of its recipe.
        path: its run folder.
        label: its name in messages.
        threads: the number of threads to use.
        attacks: as in `evaluate_run`.
        analyze: the names of the analyses to prepare, on ``analysis_n`` test images.
    """

    tables: Json
    path: str
    label: str
    epochs: int
    allow: tuple[str, ...] = ()
    threads: int = 1
    attacks: str = "recipe"
    analyze: tuple[str, ...] = ()
    analysis_n: int | None = None


def read(paths: Sequence[Path], overrides: Sequence[str], sweeps: Sequence[str] = ()) -> list[config.Recipe]:
    """Read recipes at each combination of the swept values, which are added to their names.

    Args:
        paths: recipe files.
        overrides: ``a.b=value``, for all of them.
        sweeps: ``a.b=v1,v2,...``; several sweep every combination.

    Raises:
        UnmovedError: as `runs.recipe.read`; a sweep without values, or with one twice.
    """
    axes = [_axis(sweep) for sweep in sweeps]
    return [
        _read(path, overrides, dict(values)) for path in paths for values in itertools.product(*(axis for axis in axes))
    ]


def _axis(sweep: str) -> list[tuple[str, str]]:
    key, equals, text = sweep.partition("=")
    values = [value.strip() for value in text.split(",")]
    if not key or not equals or not all(values) or len(set(values)) < len(values):
        raise UnmovedError(
            f"--sweep {sweep!r}: expected a key and different values, such as objective.drsl.weight=0,0.1,0.64,2"
        )
    return [(key, value) for value in values]


def _read(path: Path, overrides: Sequence[str], values: dict[str, str]) -> config.Recipe:
    recipe = config.read(path, [*overrides, *(f"{key}={value}" for key, value in values.items())])
    if not values:
        return recipe
    name = f"{recipe.name} " + " ".join(f"{'.'.join(key.split('.')[-2:])}={v}" for key, v in values.items())
    return recipe.model_copy(update={"name": name, "swept": config.SweptFrom(method=recipe.name, values=values)})


def jobs_of(
    recipes: Sequence[config.Recipe],
    seeds: Sequence[int],
    out: Path,
    allow: Collection[str],
    threads: int,
    attacks: str = "recipe",
    *,
    splits: int = 0,
    permutations: int = 1,
) -> list[Job]:
    """Make jobs, one folder each: ``out/<recipe name>/seed<k>``, or ``.../permutation<i>-part<j>of<k>`` with splits.

    With ``splits=k`` the training data is permuted ``permutations`` times and each time cut into k disjoint parts of
    equal size, one run on each; part j of permutation i trains with seed ``seed + i k + j``, so that the runs differ
    in data, initial weights and order, as a bias-variance decomposition requires.

    Raises:
        UnmovedError: two recipes of one name, or a seed twice (they would write into one folder); one split; splits
            with several seeds; attacks that do not exist, which would be seen when all is trained.
    """
    folders = [folder_name(recipe.name) for recipe in recipes]
    for recipe, folder in zip(recipes, folders, strict=True):
        if folders.count(folder) > 1:
            raise UnmovedError(
                f"compare: expected recipes of different names, came {recipe.name!r} twice; set name=... in one"
            )
    for recipe in recipes:
        require_named_attacks(attacks, ThreatModel(recipe.threat.norm, recipe.threat.eps), allow)
    for seed in seeds:
        if list(seeds).count(seed) > 1:
            raise UnmovedError(f"compare: expected different seeds, came {seed} twice")
    _require_splits(splits, permutations, seeds)
    jobs = []
    for recipe, folder in zip(recipes, folders, strict=True):
        for name, changes in _changes(seeds, splits, permutations):
            training = recipe.training.model_copy(update={**changes})
            part = training.part
            which = "" if part is None else f" permutation {part.permutation} part {part.number + 1} of {part.of}"
            jobs.append(
                Job(
                    recipe.model_copy(update={"training": training}).tables(),
                    str(out / folder / name),
                    f"{recipe.name} seed {training.seed}{which}",
                    training.epochs,
                    tuple(allow),
                    threads,
                    attacks,
                )
            )
    return jobs


def _require_splits(splits: int, permutations: int, seeds: Sequence[int]) -> None:
    """Raise `UnmovedError` for one split, or several seeds of each."""
    if splits == 1 or splits < 0 or permutations < 1:
        raise UnmovedError(
            f"compare: expected --splits of at least 2 and --permutations of at least 1, came {splits} and "
            f"{permutations}; one model has no variance"
        )
    if permutations > 1 and not splits:
        raise UnmovedError("compare: --permutations says how often the data is split anew; give --splits too")
    if splits and len(seeds) > 1:
        raise UnmovedError(
            f"compare: with --splits each part has a seed of its own, so expected one --seeds, came {len(seeds)}; "
            "use --permutations for more runs"
        )


def _changes(
    seeds: Sequence[int], splits: int, permutations: int
) -> list[tuple[str, dict[str, int | config.DataPart]]]:
    """List (folder, changes in [training]) of each run of a recipe."""
    if not splits:
        return [(f"seed{seed}", {"seed": seed}) for seed in seeds]
    return [
        (
            f"permutation{i}-part{j + 1}of{splits}",
            {"seed": seeds[0] + i * splits + j, "part": config.DataPart(of=splits, number=j, permutation=i)},
        )
        for i in range(permutations)
        for j in range(splits)
    ]
