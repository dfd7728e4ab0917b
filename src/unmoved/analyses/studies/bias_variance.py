"""Study bias and variance of clean and adversarial risk over runs trained on disjoint parts of the data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from unmoved.analyses import bias_variance as estimators
from unmoved.analyses.bias_variance_claims import claims as claims_of
from unmoved.analyses.committee import joint, probabilities
from unmoved.analyses.studies import bias_variance_figures as figures
from unmoved.analyses.studies.kind import StudyKind, option
from unmoved.analyses.studies.study import AnalysedRun, Progress, Study, folders, no_progress
from unmoved.analyses.target_probability import target_probability
from unmoved.attacks import PGD
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError, require_choice
from unmoved.reports.pages import Section
from unmoved.runs.by_recipe import without_seeds

MODES = ("own", "shared", "joint")
TITLE = "Bias and variance"
STEPS = 20
CHUNK = 250
SHOWN = ("KL", "k/(k-1)")
SAME = "as trained"


@dataclass(frozen=True)
class Group:
    """Hold the runs of one recipe on the disjoint parts of one permutation."""

    method: str
    permutation: int
    members: tuple[AnalysedRun, ...]

    @property
    def training_eps(self) -> float:
        return self.members[0].training_eps


def groups_of(runs: Sequence[AnalysedRun]) -> list[Group]:
    """Group runs by recipe and permutation.

    Raises:
        UnmovedError: a group of one run; parts that share training images, which would make the estimate wrong; groups
            of different size.
    """
    together: dict[tuple[str, int], list[AnalysedRun]] = {}
    for subject in runs:
        part = subject.assembly.recipe.training.part
        recipe = json.dumps(without_seeds(subject.run.recipe), sort_keys=True, default=str)
        together.setdefault((recipe, 0 if part is None else part.permutation), []).append(subject)
    groups = []
    for (_, permutation), members in together.items():
        name, paths = members[0].run.name, ", ".join(str(m.run.path) for m in members)
        if len(members) < 2:
            raise UnmovedError(
                f"bias-variance: expected at least 2 models of {name!r} on disjoint parts of the data, came 1 "
                f"({paths}); one model has no variance: train with `unmoved compare --splits 2`"
            )
        seen: set[int] = set()
        for member in members:
            images = set(member.assembly.data.index("train").tolist())
            if shared := seen & images:
                raise UnmovedError(
                    f"bias-variance: expected models of {name!r} on disjoint parts of the data, came {len(shared)} "
                    f"images that two of {paths} were trained on; the estimate would be wrong: train with "
                    "`unmoved compare --splits 2`"
                )
            seen |= images
        groups.append(Group(name, permutation, tuple(members)))
    sizes = {len(group.members) for group in groups}
    if len(sizes) > 1:
        raise UnmovedError(f"bias-variance: expected groups of one size, came {sorted(sizes)}; study each size apart")
    return groups


def predict(group: Group, eps: float, mode: str) -> Tensor:
    """Return p (k, N, K) of the group's models on the images as they are, or attacked with ``eps`` in one of the modes.

    PGD on the cross-entropy, 20 steps of 3 eps / 20 from the clean image (the setting of Yu et al. 2021's code).
    """
    threat = replace(group.members[0].assembly.threat, eps=eps)
    attack = PGD(threat, steps=STEPS, step_size=3 * eps / STEPS, start="none")
    condition: dict[str, object] = {"attack": repr(attack) if eps else None, "mode": mode if eps else None}
    if mode != "own" and eps:
        condition["models"] = [member.key for member in group.members]
    predictions = []
    for k, member in enumerate(group.members):

        def make(k: int = k, member: AnalysedRun = member) -> pd.DataFrame:
            rows = []
            for batch in member.split.batches(CHUNK):
                here = batch.to(next(member.model.parameters()).device)
                p = probabilities([member.model], [_shown_to(group, k, here, attack, mode, eps)])[0]
                rows.append(pd.DataFrame(p.cpu().numpy(), columns=[f"p{c}" for c in range(p.shape[1])]))
            return pd.concat(rows, ignore_index=True)

        table = member.cache.table("probabilities", member.key | condition, make)
        predictions.append(torch.from_numpy(table.to_numpy(copy=True)))
    return torch.stack(predictions)


def _shown_to(group: Group, k: int, batch: Batch, attack: PGD, mode: str, eps: float) -> Tensor:
    """Return the images that model k sees."""
    if eps == 0:
        return batch.x
    if mode == "own":
        return attack(group.members[k].model, batch)
    if mode == "shared":
        return attack(group.members[0].model, batch)
    return attack(joint([member.model for member in group.members]), batch)


def _radii(text: str) -> tuple[float, ...]:
    try:
        radii = tuple(float(number) for number in text.split(","))
    except ValueError:
        radii = ()
    if not (radii and all(radius >= 0 for radius in radii)):
        raise UnmovedError(f"--eps: expected numbers of 0 or more such as 0,0.1,0.3, came {text!r}")
    return radii


def _modes(text: str) -> tuple[str, ...]:
    return tuple(mode.strip() for mode in text.split(","))


@dataclass(frozen=True)
class BiasVariance(StudyKind):
    """Decompose the risk over training eps (of the runs), evaluation eps and attack modes, merged over permutations.

    Attributes:
        eps: evaluation radii; by default 0 and the eps of the recipes.
        modes: ``"own"`` (each model attacked itself), ``"shared"`` (the perturbation of the first model of each group
            shown to all) and ``"joint"`` (made against the mean prediction; a reconstruction).
    """

    name = "bias-variance"
    eps: tuple[float, ...] | None = option(
        None, "radii to attack with, such as 0,0.1,0.3; 0 and the recipes' eps.", parse=_radii
    )
    modes: tuple[str, ...] = option(("own",), "own, shared, joint; commas between.", parse=_modes)

    def __post_init__(self) -> None:
        for mode in self.modes:
            require_choice("bias-variance: mode", mode, MODES)

    def __call__(self, runs: Sequence[AnalysedRun], progress: Progress = no_progress) -> Study:
        """Decompose the risks, and judge how bias and variance move with the training eps.

        Raises:
            UnmovedError: as `groups_of`.
        """
        first, groups = runs[0], groups_of(runs)
        radii = sorted({0.0, first.assembly.threat.radius} if self.eps is None else set(self.eps))
        merged, targets = _decompositions(groups, radii, self.modes, first.split.labels.cpu(), progress)
        family = merged.assign(method=merged["method"].map(_families(groups)))
        sizes = family.groupby("method")["train_eps"].nunique()
        swept = family[family["method"].isin(sizes[sizes > 2].index)]
        same = _attacked_as_trained(swept, self.modes)
        claims = _evidence(swept, same)
        sentences = ["Three training eps of one recipe are needed to say how bias and variance move with it."]
        tables = {"decompositions": merged, "target_probability": targets}
        if claims is not None:
            tables["claims"] = claims
            shown = claims[(claims["loss"] == SHOWN[0]) & (claims["correction"] == SHOWN[1])]
            shown = shown[shown["eval_eps"] == SAME] if len(same) else shown
            sentences = [f"{row.method}, eps {row.eval_eps} ({row.mode}): {row.words}." for row in shown.itertuples()]
        drawn = _curves(swept if len(swept) else family, same)
        last = merged[(merged["eval_eps"] == radii[-1]) & (merged["mode"] == self.modes[0])]
        last = last[last["train_eps"] == last["train_eps"].max()]
        last = last[last["method"] == last["method"].iloc[0]]
        drawn.append(
            figures.bias_variance_by_class(last, first.assembly.data.classes, loss=SHOWN[0], correction=SHOWN[1])
        )
        text = [
            f"{len(groups[0].members)} models on disjoint parts of the training data each; cross-entropy, "
            "variance corrected by k/(k-1). The estimates are about training sets of that size.",
            *([] if claims is not None else sentences),
        ]
        settings = {
            "eval_eps": radii,
            "modes": self.modes,
            "attack": f"PGD, {STEPS} steps of 3 eps / {STEPS}, from the clean image",
        }
        sections = [Section(self.name, TITLE, text, _claims(claims, self.modes[0]), drawn), _in_numbers(merged)]
        return Study(self.name, TITLE, tables, sentences, sections, len(first.split), folders(runs), settings)


def _decompositions(
    groups: Sequence[Group], radii: Sequence[float], modes: Sequence[str], y: Tensor, progress: Progress
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return decompositions of each recipe, merged over permutations, and target probabilities of each group."""
    conditions = [(radius, mode) for radius in radii for mode in (modes if radius else modes[:1])]
    tables: dict[tuple[str | float, ...], list[pd.DataFrame]] = {}
    targets, done = [], 0
    for group in groups:
        for radius, mode in conditions:
            p = predict(group, radius, mode)
            columns: dict[str, str | float] = {"method": group.method, "train_eps": group.training_eps}
            columns |= {"eval_eps": radius, "mode": mode}
            tables.setdefault(tuple(columns.values()), []).append(estimators.table(p, y).assign(**columns))
            targets.append(target_probability(p, y, _learned(group)).assign(**columns, permutation=group.permutation))
            done += 1
            progress(done / len(groups) / len(conditions), f"bias-variance: {group.method}, eps {radius:g}, {mode}")
    merged = pd.concat([estimators.merge(of_splits) for of_splits in tables.values()], ignore_index=True)
    return merged, pd.concat(targets, ignore_index=True)


def _evidence(swept: pd.DataFrame, same: pd.DataFrame) -> pd.DataFrame | None:
    """Judge the claims at each evaluation eps and at that of the training; None if no recipe has three."""
    judged = [claims_of(swept, by=["method"])] if len(swept) else []
    judged += [claims_of(same.drop(columns="eval_eps"), by=["method"]).assign(eval_eps=SAME)] if len(same) else []
    return pd.concat(judged, ignore_index=True) if judged else None


def _curves(rows: pd.DataFrame, same: pd.DataFrame) -> list[Figure]:
    """Draw bias and variance over the training eps: attacked as trained, then at each evaluation eps."""
    drawn = [
        figures.bias_variance(some.drop(columns="eval_eps"), loss=SHOWN[0], correction=SHOWN[1], panel="mode")
        for _, some in same.groupby(["method"], sort=False)
    ]
    for _, some in rows.groupby(["method", "mode"], sort=False):
        if some["train_eps"].nunique() > 1:
            drawn.append(figures.bias_variance(some, loss=SHOWN[0], correction=SHOWN[1]))
    return drawn


def _in_numbers(merged: pd.DataFrame) -> Section:
    overall = merged[(merged["class"] == -1) & (merged["loss"] == SHOWN[0]) & (merged["correction"] == SHOWN[1])]
    return Section(
        "bias-variance-numbers",
        "Bias and variance in numbers",
        ["Overall, in nats; decompositions.csv has every loss, correction and class, with intervals."],
        overall[["method", "train_eps", "eval_eps", "mode", "risk", "bias", "variance"]],
    )


def _attacked_as_trained(swept: pd.DataFrame, modes: Sequence[str]) -> pd.DataFrame:
    """Return the rows whose evaluation eps is the training eps, by mode (at 0 all modes are one), if three or more."""
    rows = swept[swept["eval_eps"] == swept["train_eps"]]
    by_mode = [rows[(rows["mode"] == mode) | (rows["eval_eps"] == 0)].assign(mode=mode) for mode in modes]
    joined = pd.concat(by_mode, ignore_index=True)
    count = joined.groupby(["method", "mode"])["train_eps"].transform("nunique")
    return joined[count > 2]


def _claims(claims: pd.DataFrame | None, mode: str) -> pd.DataFrame | None:
    if claims is None:
        return None
    rows = claims[(claims["loss"] == SHOWN[0]) & (claims["correction"] == SHOWN[1])]
    rows = rows[(rows["eval_eps"] == SAME) | (rows["mode"] == mode)]  # claims.csv has them all
    return rows[["method", "eval_eps", "mode", "claim", "verdict", "value"]]


def _families(groups: Sequence[Group]) -> dict[str, str]:
    """Map the name of a swept recipe to that of the recipe it was swept from."""
    swept = {group.method: group.members[0].assembly.recipe.swept for group in groups}
    return {name: name if one is None else one.method for name, one in swept.items()}


def _learned(group: Group) -> Tensor | None:
    """Return q (k, K) that ProbsCut's global term has learned, where the runs trained with it."""
    learned = []
    for member in group.members:
        table = member.run.per_class
        rows = table[table["term"] == "global_probability"]
        if rows.empty:
            return None
        learned.append(torch.tensor(rows[rows["epoch"] == rows["epoch"].max()]["q"].to_numpy(dtype=float)))
    return torch.stack(learned)
