"""Evaluate a trained run with attacks, look for masked gradients, and save the results in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from unmoved.attacks import AutoAttack, Quick, Transfer
from unmoved.core.errors import UnmovedError, did_you_mean, require_whole
from unmoved.core.files import write_atomic
from unmoved.core.precision import device_of, resolve
from unmoved.core.protocols import Attack
from unmoved.core.threat import ThreatModel
from unmoved.core.untrusted import Json
from unmoved.data import ArraySplit, Selection
from unmoved.data.split import drawn
from unmoved.evaluation.doctor import examine
from unmoved.evaluation.doctor.finding import summary
from unmoved.evaluation.judge import require_attacks
from unmoved.evaluation.outcomes import CLEAN, WORST
from unmoved.runs import components, third_party
from unmoved.runs import recipe as config
from unmoved.runs.assembly import Assembly
from unmoved.runs.evaluator import Evaluator
from unmoved.runs.folder import Run
from unmoved.runs.load import Opened, data_and_code, opened, weights_digest
from unmoved.runs.records import Doctor, attacks_of, digest_of_outcomes
from unmoved.runs.sampled_autoattack import Size, evaluate_sample
from unmoved.runs.shorthand import attack_tables
from unmoved.runs.third_party import is_foreign

VERDICTS = ("standard", "rand")
SPECIAL = ("recipe", "quick", *VERDICTS)  # names that stand for no single attack with settings


def evaluate_run(
    run: Run,
    *,
    attacks: str = "recipe",
    n: int | None = None,
    weights: str = "best",
    batch_size: int = 128,
    workers: int = 0,
    precision: str = "auto",
    device: str = "auto",
    save_adversarial: bool = False,
    validation: bool = False,
    sample: int | None = None,
    within: float | None = None,
    allow: Collection[str] = (),
    progress: Callable[[float, str], None] | None = None,
    ready: Callable[[], Opened] | None = None,
) -> dict[str, pd.DataFrame]:
    """Evaluate a run on the test part of its data and save the outcomes in its folder.

    AutoAttack's outcomes go to the folder ``verdict``; those of all other attacks to ``evaluation``, with an eps curve
    and a gallery. Interrupted, the same call goes on with the samples that are not decided yet.

    Args:
        run: a run folder.
        attacks: ``"recipe"`` (what it says), ``"quick"``, ``"standard"`` or ``"rand"`` (AutoAttack), attacks by name
            (``"pgd(steps=100)"``, ``"my_lab:Mine"``) or ``"transfer:RUN"``; several with commas between.
        n: judge this many images, drawn by a fixed seed; what the recipe says, or all.
        weights: ``"best"`` (highest validation robust accuracy) or ``"last"``.
        workers: threads that attack at a time on a CPU; 0 for as many as torch uses.
        precision: of the search alone; every success is judged in float32.
        save_adversarial: keep the successful images too, as ``adversarial/*.npz`` beside the outcomes.
        validation: judge what ``training.validation`` held out, to choose settings by, into ``validation``.
        sample, within: with ``"standard"``, run AutoAttack on a sample of what `Quick` leaves; see `Size`.
        allow: third-party packages whose code may run.
        progress: called with (share of the work, a line of text on the state).
        ready: returns what `opened` returns for these weights, if that was called already.

    Returns:
        Folder name -> the outcomes table of `judge.evaluate`; see `evaluate_sample` for a sample.

    Raises:
        UnmovedError: as `judge.evaluate` and `evaluate_sample`; an unknown name; weights missing or not fitting;
            ``validation`` of a run that held nothing out; a run that another process trains or evaluates.
    """
    size = size_of(sample, within, attacks, is_plain=not (save_adversarial or validation))
    n = None if n is None else require_whole("n", n, at_least=1)
    Run.open(run.path)  # before the lock, which would make a missing folder
    with run.alone():
        assembly, model = opened(run, weights, device, allow) if ready is None else ready()
        precision = resolve(precision, device_of(model))  # another machine's "auto" may be another one
        n = n or assembly.recipe.evaluation.n
        images = _images(run, assembly, n, validation)
        key = data_and_code(assembly, images.split, allow)
        kinds = chosen_attacks(attacks, assembly, allow, validation)
        evaluator = Evaluator(run, assembly, model, *images, n, attacks, weights, precision, batch_size, workers, key)
        if size is not None:
            return evaluate_sample(evaluator, kinds["verdict"], size, partial(_report, progress, 0, 1))
        return _evaluate_each(evaluator, kinds, save_adversarial, progress)


def _evaluate_each(
    evaluator: Evaluator,
    kinds: Mapping[str, dict[str, Attack]],
    save_adversarial: bool,
    progress: Callable[[float, str], None] | None,
) -> dict[str, pd.DataFrame]:
    """Evaluate under the attacks of each folder in turn, and return the outcomes by folder."""
    results = {}
    for number, (kind, chosen) in enumerate(kinds.items()):
        report = partial(_report, progress, number, len(kinds))
        results[kind] = evaluator.evaluate_and_save(kind, chosen, save_adversarial, report)
    return results


def size_of(sample: int | None, within: float | None, attacks: str, *, is_plain: bool = True) -> Size | None:
    """Return how large a sample is wanted; None for none.

    Raises:
        UnmovedError: a size out of range; a sample of other attacks than ``"standard"``, or with images kept.
    """
    if sample is None and within is None:
        return None
    if attacks != "standard" or not is_plain:
        raise UnmovedError(
            "--sample, --within: expected --attacks standard, without --save-adversarial and --validation, came "
            f"--attacks {attacks}; a sample estimates what AutoAttack's standard version leaves of test images"
        )
    return Size(sample, within)


def _report(progress: Callable[[float, str], None] | None, number: int, count: int, share: float, text: str) -> None:
    """Report a share of the work for one of several folders as a share of the work for all."""
    if progress is not None:
        progress((number + share) / count, text)


class _Images(NamedTuple):
    """Hold the images that are judged, and the digest of the part of the data that they were drawn from."""

    split: ArraySplit | Selection
    data: str


def _images(run: Run, assembly: Assembly, count: int | None, validation: bool) -> _Images:
    """Return images of the test part, or of what training held out."""
    part = _held_out(run, assembly) if validation else assembly.data.test
    return _Images(_some(part, count), part.digest)


def _held_out(run: Run, assembly: Assembly) -> ArraySplit:
    held_out = assembly.parts()[1]
    if held_out is None:
        raise UnmovedError(
            f"{run.path}: expected a run with validation images, came training.validation = 0: nothing was held "
            "out; train it with some, or judge test images"
        )
    return held_out.select(torch.arange(len(held_out)))


def _some(images: ArraySplit, count: int | None) -> ArraySplit | Selection:
    """Return ``count`` of the images, drawn by a fixed seed, or all; no others are held in memory."""
    if count is None or count >= len(images):
        return images
    rows = drawn(images, count, seed=0)
    # Few images are copied and the others let go; of many a copy would cost more than it saves.
    return images.select(rows) if 2 * count <= len(images) else images.lent(rows)


def examine_run(
    run: Run,
    *,
    n: int = 100,
    device: str = "auto",
    allow: Collection[str] = (),
    progress: Callable[[float, str], None] | None = None,
    ready: Callable[[], Opened] | None = None,
) -> Doctor:
    """Ask the doctor about an evaluated run and save the answer as ``doctor.json`` in its folder.

    The doctor reads what the number shown is from (`Run.shown`), and looks at ``n`` of its test images. ``ready`` is
    that of `evaluate_run`, for the weights that were judged.

    Raises:
        UnmovedError: a run that was not evaluated; as `unmoved.evaluation.doctor.examine.examine`.
    """
    n = require_whole("n", n, at_least=1)
    facts, table = run.facts(run.shown), run.shown_outcomes
    if facts is None or table is None:
        raise UnmovedError(f"{run.path}: expected an evaluated run, came none; run `unmoved evaluate {run.path}` first")
    if weights_digest(run, facts["weights"]) != facts["weights_sha256"]:
        raise UnmovedError(
            f"{run.path}: expected the weights that were evaluated, came others: it was trained since; "
            f"run `unmoved evaluate {run.path}` again"
        )
    assembly, model = opened(run, facts["weights"], device, allow) if ready is None else ready()
    test = assembly.data.test  # held, since it is released and read again otherwise
    images = _some(test, facts.get("asked_n")).digest
    if facts.get("images", images) != images:
        raise UnmovedError(
            f"{run.path}: expected the images that were evaluated, came others: its data changed since; "
            f"run `unmoved evaluate {run.path}` again"
        )
    there = np.isin(assembly.data.index("test").cpu().numpy(), table["index"])
    split = test.lent(torch.from_numpy(there))
    findings = examine.examine(
        model,
        split,
        assembly.threat,
        outcomes=table,
        attacks=attacks_of(facts),
        n=min(n, len(split)),
        seed=assembly.recipe.training.seed,
        progress=None if progress is None else lambda done, total, words: progress(done / total, f"doctor: {words}"),
    )
    answer: Doctor = {
        "weights_sha256": facts["weights_sha256"],
        "evaluation": digest_of_outcomes(facts),
        "n": min(n, len(split)),
        "sentence": summary(findings),
        "findings": [
            {"check": f.check, "grade": f.grade, "measured": f.measured, "why": f.why, "do": f.do} for f in findings
        ],
    }
    write_atomic(run.path / "doctor.json", (json.dumps(answer, indent=2) + "\n").encode())
    return answer


def chosen_attacks(
    names: str, assembly: Assembly, allow: Collection[str], validation: bool = False
) -> dict[str, dict[str, Attack]]:
    """Return the attacks by the folder of their outcomes, from their names with commas between.

    Raises:
        UnmovedError: no name, or an unknown one.
    """
    chosen: dict[str, dict[str, Attack]] = {}
    for text, table in attack_tables(names):
        kind = "verdict" if text in VERDICTS else "evaluation"
        attacks = _attacks_of(text, table, assembly, allow)
        if twice := [name for name in attacks if name in (CLEAN, WORST) or any(name in of for of in chosen.values())]:
            raise UnmovedError(
                f"--attacks: expected each name once and no measure's, came another {twice[0]!r} in {names!r}; "
                "settings make another name, such as pgd(steps=50)"
            )
        chosen.setdefault(kind, {}).update(attacks)
    if not chosen:
        raise UnmovedError("--attacks: expected at least one name, came none")
    if validation:
        return {"validation": {name: attack for named in chosen.values() for name, attack in named.items()}}
    return chosen


def require_named_attacks(names: str, threat: ThreatModel, allow: Collection[str]) -> None:
    """Refuse what is wrong with the names and settings of attacks while no data is read and no model trained.

    Raises:
        UnmovedError: as `chosen_attacks`; attacks that may not judge in this ball.
    """
    tables = attack_tables(names)
    if not tables:
        raise UnmovedError("--attacks: expected at least one name, came none")
    for text, table in tables:
        use = str(table["use"])
        if text in SPECIAL:
            continue
        if use.startswith("transfer:"):
            Run.open(Path(text.removeprefix("transfer:")))
        elif is_foreign(use):
            third_party.find(use, allow, components.PLACES["attacks"])
        else:
            _require_known(use)
            attack = components.build("attacks", config.attack_table(table), threat=threat, seed=0)
            require_attacks({text: attack}, threat)


def _require_known(use: str) -> None:
    if use not in components.KINDS["attacks"]:
        known = [*SPECIAL, *components.KINDS["attacks"], "transfer:RUN", "module:Name"]
        raise UnmovedError(f"--attacks: expected names of {', '.join(known)}, came {use!r}{did_you_mean(use, known)}")


def _attacks_of(text: str, table: Json, assembly: Assembly, allow: Collection[str]) -> dict[str, Attack]:
    """Return the attacks that one part of ``--attacks`` stands for, by the name that outcomes call them."""
    seed, use = assembly.recipe.training.seed, str(table["use"])
    if text == "recipe":
        return dict(assembly.attacks)
    if text == "quick":
        return {"quick": Quick(assembly.threat, seed=seed)}
    if text in VERDICTS:
        label = "autoattack" if text == "standard" else f"autoattack-{text}"
        return {label: AutoAttack(assembly.threat, version=text, seed=seed)}
    if use.startswith("transfer:"):
        return {"transfer": _transfer(Path(text.removeprefix("transfer:")), assembly, allow)}
    if not is_foreign(use):
        _require_known(use)
    settings = ", ".join(f"{key}={value}" for key, value in table.items() if key != "use")
    name = use.rpartition(":")[2]
    return {f"{name}({settings})" if settings else name: assembly.attack(table)}


def _transfer(path: Path, assembly: Assembly, allow: Collection[str]) -> Transfer:
    """Return the transfer attack from another run's model, which must see images of the same shape and classes."""
    source, model = opened(Run.open(path), "best", "auto", allow)
    if (source.shape, source.num_classes) != (assembly.shape, assembly.num_classes):
        raise UnmovedError(
            f"transfer: expected a run on {assembly.num_classes} classes of images {assembly.shape}, came {path} with "
            f"{source.num_classes} classes of images {source.shape}"
        )
    return Transfer(assembly.threat, source=model)
