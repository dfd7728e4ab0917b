"""Say what to do after reading a report: commands with the paths of its runs, the most telling first."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unmoved.runs.by_recipe import RecipeResult
from unmoved.runs.evaluated import EvaluatedRun
from unmoved.runs.folder import folder_name
from unmoved.runs.third_party import packages_of

SEEDS = 3  # fewer tell little about another seed


class Step(NamedTuple):
    """A command of the shell, and what it is for."""

    why: str
    command: str


def next_steps(results: Sequence[RecipeResult], contenders: Sequence[RecipeResult], *, analysed: bool) -> list[Step]:
    """Return the steps that the results leave open.

    Of a model and data that were objects in Python, those that no command can take are left out.

    Args:
        contenders: the best recipes, and those that are not shown to be worse.
        analysed: whether the report has chapters of analyses.
    """
    runs = [run for result in contenders for run in result.runs]
    known = [run for run in runs if not run.is_of_objects]
    n, steps = runs[0].setting.n, list[Step]()
    whose = "it" if len(results) == 1 else "the best"
    if unseen := [run for result in results for run in result.doctor_summary.unseen if not run.is_of_objects]:
        steps.append(Step("Ask the doctor whether the figures are to be believed", _each("doctor", "", unseen)))
    unsettled = [run for run in known if _settled_images(run) < n]
    if unsettled:
        asked = "what is left" if len(contenders) == 1 else "which of them is best"
        steps.append(
            Step(f"Let AutoAttack say, on all {n} images, {asked}", _each("evaluate", " --attacks standard", unsettled))
        )
    sampled = [run for run in known if run.estimate is not None and run not in unsettled]
    if sampled:
        why = "Let AutoAttack judge what its sample left out, too"
        steps.append(Step(why, _each("evaluate", " --attacks standard", sampled)))
    few = [result for result in contenders if result.is_trained and len(result.runs) < SEEDS]
    if few:
        steps.append(Step(f"Train {SEEDS} seeds: one says nothing of the next", _more_seeds(few)))
    if known and not analysed:
        steps.append(Step("See why, and at what price", _each("analyze softmax", "", known[:1])))
    steps.append(Step(f"Hand {whose} on: weights, model card, evidence", f"unmoved export {_quoted(runs[0].path)}"))
    return steps


def _settled_images(run: EvaluatedRun) -> int:
    """Return the number of images that AutoAttack's figure is about, judged completely or by a sample."""
    if run.estimate is not None:
        return run.estimate.n
    return 0 if run.verdict is None or run.autoattack is None else run.verdict["n"]


def _each(command: str, options: str, runs: Sequence[EvaluatedRun]) -> str:
    """Return a command for each of these runs: a loop where there are several."""
    if len(runs) == 1:
        return f"unmoved {command} {_quoted(runs[0].path)}{options}{_allow(runs)}"
    paths = " ".join(_quoted(run.path) for run in runs)
    return f'for run in {paths}; do unmoved {command} "$run"{options}{_allow(runs)}; done'


def _more_seeds(results: Sequence[RecipeResult]) -> str:
    """Return the comparison of these recipes with more seeds, in the folder of theirs where `compare` made them."""
    runs = [result.runs[0] for result in results]
    had = sorted({run.seed for result in results for run in result.runs})
    seeds = [*had, *(seed for seed in range(SEEDS + len(had)) if seed not in had)][: max(SEEDS, len(had))]
    homes = {run.path.parent.parent if _is_of_a_comparison(run) else Path("runs/seeds") for run in runs}
    out = homes.pop() if len(homes) == 1 else Path("runs/seeds")
    recipes = " ".join(_quoted(run.path / "recipe.toml") for run in runs)
    attacks = shlex.quote(runs[0].evaluation.get("asked") or "recipe")
    chosen = ",".join(map(str, seeds))
    return f"unmoved compare {recipes} --seeds {chosen} --attacks {attacks} --out {_quoted(out)}{_allow(runs)}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _is_of_a_comparison(run: EvaluatedRun) -> bool:
    return run.path.name == f"seed{run.seed}" and run.path.parent.name == folder_name(run.name)


def _allow(runs: Sequence[EvaluatedRun]) -> str:
    """Return the options that allow the code outside this package which the recipes name."""
    packages = {package for run in runs for package in packages_of(run.recipe)}
    return "".join(f" --allow {shlex.quote(package)}" for package in sorted(packages))
