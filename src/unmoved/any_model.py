"""Judge any model, wherever it was trained: the accuracy under attack, whether to believe it, and a report."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from html import escape
from importlib import import_module
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from unmoved import models
from unmoved.core.errors import UnmovedError, require_whole
from unmoved.core.messages import printable
from unmoved.core.precision import require_device
from unmoved.core.preconditions import require_model
from unmoved.core.threat import ThreatModel
from unmoved.core.untrusted import Json
from unmoved.data import ArraySplit, DataSet, Selection
from unmoved.data.adapters import as_split, names_of
from unmoved.data.validation import numbered
from unmoved.evaluation.doctor.examine import examine
from unmoved.evaluation.doctor.finding import Finding
from unmoved.reports import report as reports
from unmoved.reports.judgement import Judgement
from unmoved.runs import recipe as config
from unmoved.runs import records
from unmoved.runs.assembly import Assembly
from unmoved.runs.components import parse_number
from unmoved.runs.evaluate import chosen_attacks, evaluate_run, examine_run, require_named_attacks, size_of
from unmoved.runs.folder import Run
from unmoved.runs.load import Opened, opened, weights_digest
from unmoved.runs.trained_elsewhere import first_logits, is_of_other_weights, judged_run, tables_of_objects

logger = logging.getLogger("unmoved")
Progress = Callable[[float, str], None]
ORDER = 'judge(model, data, eps="8/255")'


def judge(
    model: nn.Module,
    data: object,
    *,
    eps: float | str,
    norm: str = "linf",
    attacks: str = "quick",
    n: int | None = None,
    sample: int | None = None,
    within: float | None = None,
    classes: Sequence[str] | None = None,
    layout: str | None = None,
    doctor: bool = True,
    out: Path | str | None = None,
    name: str | None = None,
    batch_size: int = 128,
    allow: Collection[str] = (),
    progress: Progress | bool = True,
) -> Judgement:
    """Attack a model and say what it still classifies correctly, and whether to believe that.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K), on any device; judged in evaluation mode and left as it
            was. One that expects normalised images: ``models.normalized(model, mean, std)``.
        data: a DataLoader, a torch Dataset, (images, labels), a Hugging Face dataset, or a split of `unmoved.data`.
        eps: the radius of the ball, on images in [0, 1]: a number or a fraction such as ``"8/255"``.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        attacks: as of ``unmoved evaluate``: ``"quick"``, ``"standard"`` (AutoAttack), names with commas between.
        n: judge this many images, drawn by a fixed seed; all by default.
        sample, within: with ``"standard"``, ask AutoAttack about this many of what a cheap search leaves, or about as
            many as give an interval of this many points each way: what it leaves is then estimated.
        classes: their names; by default those that the data has.
        layout: ``"NCHW"`` or ``"NHWC"``, needed for numpy arrays whose shape alone does not tell.
        doctor: whether the doctor is asked.
        out: keep everything in this run folder, which ``unmoved report`` and ``export`` read; the same call goes on.
        name: what report and messages call the model; by default its class.
        allow: packages whose attacks ``attacks`` may name.
        progress: whether a bar is shown, or what is called with (share of the work, what is known so far).

    Raises:
        UnmovedError: as `unmoved.evaluate`; data that holds no images and labels; labels that the model has no output
            for; a folder that holds something else.
    """
    require_model(model, ORDER)
    _require_question(attacks, ThreatModel(norm, parsed_eps(eps)), n, sample, within, batch_size, allow)
    split, logits, notes = _fitting(model, data, classes, layout)
    about: Json = {"name": name or type(model).__name__, "threat": {"norm": norm, "eps": parsed_eps(eps)}}
    recipe = config.parse({**about, **tables_of_objects(model, split, logits)}, "judge")
    held = split if isinstance(split, ArraySplit) else split.select(torch.arange(len(split)))
    assembly = Assembly(recipe, allow, source=DataSet(held, held, "data"))
    chosen_attacks(attacks, assembly, allow)  # a wrong setting is refused before a folder is made
    with ExitStack() as undone:
        folder = Path(tempfile.mkdtemp(prefix="unmoved-") if out is None else out)
        if out is None:
            undone.callback(shutil.rmtree, folder, ignore_errors=True)
        run = judged_run(folder, assembly, model, None)
        ask = _Question(attacks, n, doctor, batch_size, allow, progress, sample, within)
        judgement = ask.judgement(run, lambda: Opened(assembly, model), notes)
        weakref.finalize(judgement, undone.pop_all().close)
    return judgement


def _require_question(
    attacks: object,
    ball: ThreatModel,
    n: int | None,
    sample: int | None,
    within: float | None,
    batch_size: int,
    allow: Collection[str],
) -> None:
    """Refuse a wrong name or number, or a sample of what cannot be sampled, before any data is read."""
    if not isinstance(attacks, str):
        raise UnmovedError(
            f'judge: expected names as attacks, such as "quick" or "pgd(steps=50)", came {attacks!r:.80}'
        )
    require_named_attacks(attacks, ball, allow)
    size_of(sample, within, attacks)
    require_whole("batch_size", batch_size, at_least=1)
    if n is not None:
        require_whole("n", n, at_least=1)


def _fitting(
    model: nn.Module, data: object, classes: Sequence[str] | None, layout: str | None
) -> tuple[ArraySplit | Selection, Tensor, list[str]]:
    """Return the data as a split whose classes are the model's outputs, logits of a few of its images, and notes."""
    split, notes = as_split(data, classes=classes, layout=layout)
    logits = first_logits(model, split)
    outputs = logits.shape[1]
    if isinstance(split, ArraySplit) and split is not data and classes is None and names_of(data) is None:
        split = replace(split, classes=numbered("classes", max(outputs, int(split.labels.max()) + 1) - 1))
    require_outputs(outputs, split)
    if getattr(model, "training", False):  # a frozen script has no mode
        notes.append("the model is in training mode; it was judged in evaluation mode")
    return split, logits, notes


def judge_recipe(
    recipe: config.Recipe,
    out: Path | str,
    *,
    attacks: str = "standard",
    n: int | None = None,
    sample: int | None = None,
    within: float | None = None,
    doctor: bool = True,
    batch_size: int = 128,
    allow: Collection[str] = (),
    device: str = "auto",
    progress: Progress | bool = True,
    loading: Callable[[int, int], None] | None = None,
) -> Judgement:
    """Judge the model of a recipe with ``trained = false``, whose ``[model] weights`` name a file, in a run folder.

    Interrupted, the same call goes on.

    Args:
        recipe: data, model and threat model; see `config.Recipe`.
        out: the run folder.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        loading: called with (done, total) images where decoding takes a while.
        attacks, n, sample, within, doctor, batch_size, allow, progress: as in `judge`.

    Raises:
        UnmovedError: as `judge`; weights that do not fit.
    """
    require_device(device)
    ball = ThreatModel(recipe.threat.norm, recipe.threat.eps)
    _require_question(attacks, ball, n, sample, within, batch_size, allow)
    if recipe.model.weights is not None:
        models.require_checkpoint(recipe.model.weights.file)
    assembly = Assembly(recipe, allow, loading)
    model, loaded = assembly.initial_model()
    require_outputs(first_logits(model, assembly.data.test).shape[1], assembly.data.test)
    notes = () if loaded is not None else ("no file of weights was given: the model was judged as it is made",)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    chosen_attacks(attacks, assembly, allow)
    run = judged_run(Path(out), assembly, model, loaded)
    opened = Opened(assembly, model.to(where).eval())
    ask = _Question(attacks, n, doctor, batch_size, allow, progress, sample, within)
    return ask.judgement(run, lambda: opened, notes)


def judge_in_ball(
    run: Run,
    norm: str,
    eps: float,
    *,
    attacks: str = "recipe",
    n: int | None = None,
    weights: str = "best",
    doctor: bool = True,
    batch_size: int = 128,
    allow: Collection[str] = (),
    device: str = "auto",
    progress: Progress | bool = True,
) -> Judgement:
    """Judge the model of a run in another ball than its recipe's, in the folder ``RUN/balls/NORM-EPS`` (``-last``).

    That is a run folder of its own, of a model that is judged only: what was trained in one ball says nothing about its
    training in another.

    Args:
        run: a run folder.
        norm, eps: the ball.
        weights: ``"best"`` or ``"last"``, of the run.
        attacks, n, doctor, batch_size, allow, device, progress: as in `judge_recipe`.

    Raises:
        UnmovedError: as `judge_recipe`.
    """
    trained, model = opened(run, weights, device, allow)
    tables = {key: value for key, value in trained.recipe.tables().items() if key in ("data", "model", "evaluation")}
    tables |= {"name": f"{run.name} {norm} {eps:g}", "trained": False, "threat": {"norm": norm, "eps": eps}}
    assembly = Assembly(config.parse(tables, "evaluate"), allow, source=trained.source)
    chosen_attacks(attacks, assembly, allow)
    loaded = models.Loaded(weights_digest(run, weights), "", (), False)
    path = run.path / "balls" / f"{norm}-{eps!r}{'' if weights == 'best' else '-last'}"
    if is_of_other_weights(path, loaded.sha256):
        shutil.rmtree(path)  # as an evaluation of the run itself, what is about former weights is replaced
    folder = judged_run(path, assembly, model, loaded)
    ask = _Question(attacks, n, doctor, batch_size, allow, progress)
    return ask.judgement(folder, lambda: Opened(assembly, model))


@dataclass(frozen=True)
class _Question:
    """The arguments of `judge` that say how a run folder is judged."""

    attacks: str
    n: int | None
    doctor: bool
    batch_size: int
    allow: Collection[str]
    progress: Progress | bool
    sample: int | None = None
    within: float | None = None

    def judgement(self, run: Run, ready: Callable[[], Opened], notes: Sequence[str] = ()) -> Judgement:
        """Evaluate a run folder, ask the doctor about it, and return what was found, AutoAttack's outcomes last."""
        with _bar(self.progress) as show:
            tables = evaluate_run(
                run,
                attacks=self.attacks,
                n=self.n,
                sample=self.sample,
                within=self.within,
                batch_size=self.batch_size,
                allow=self.allow,
                progress=show,
                ready=ready,
            )
            if self.doctor:
                examine_run(run, allow=self.allow, progress=show, ready=ready)
        table, facts = pd.concat(tables.values(), ignore_index=True), run.sampled if "sampled" in tables else None
        more = [] if facts is None else facts.get("notes", [])
        return Judgement(run, table, (*notes, *more), run.doctor if self.doctor else None, records.estimate(facts))


def doctor(
    model: nn.Module, data: object, *, eps: float | str, norm: str = "linf", n: int = 100, seed: int = 0
) -> list[Finding]:
    """Return reasons not to believe a model's accuracy under attack, the gravest first; none if no check objects.

    Args:
        model, data, eps, norm: as in `judge`.
        n: number of images that are looked at.
        seed: of all noise.

    Raises:
        UnmovedError: as `judge`.
    """
    require_model(model, 'doctor(model, data, eps="8/255")')
    split, _ = as_split(data)
    return examine(model, split, ThreatModel(norm, parsed_eps(eps)), n=n, seed=seed)


def report(
    runs: Run | Judgement | Path | str | Sequence[Run | Judgement | Path | str],
    path: Path | str = "report.html",
    title: str = "Robustness report",
) -> Path:
    """Write one self-contained HTML page about evaluated runs, and its figures beside it; return its path.

    Args:
        runs: run folders, by path or opened, or what `judge` returned; one or several.

    Raises:
        UnmovedError: as ``unmoved report``.
    """
    several = [runs] if isinstance(runs, Run | Judgement | Path | str) else list(runs)
    opened = [
        each if isinstance(each, Run) else each.run if isinstance(each, Judgement) else Run.open(each)
        for each in several
    ]
    return reports.write(opened, Path(path), title=title)


def parsed_eps(eps: float | str) -> float:
    """Return a radius that may be written as a fraction.

    Raises:
        UnmovedError: neither a number nor a fraction.
    """
    try:
        return float(parse_number(eps))
    except (TypeError, ValueError) as error:
        raise UnmovedError(f"eps: {error}") from None


def require_outputs(outputs: int, split: ArraySplit | Selection) -> None:
    """Raise `UnmovedError` unless the model has an output for each class of the data, and no other."""
    if outputs == split.num_classes:
        return
    least, most = int(split.labels.min()), int(split.labels.max())
    if most >= outputs:
        begins_at_1 = least == 1 and most == outputs
        raise UnmovedError(
            f"the model has {outputs} outputs, the data labels up to {most} ({split.num_classes} classes): expected an "
            "output for each class; "
            + ("number the classes from 0, as labels - 1 does" if begins_at_1 else "is it the model of this data?")
        )
    raise UnmovedError(
        f"the model has {outputs} outputs, the data {split.num_classes} classes: expected as many; take the outputs of "
        "these classes alone in the model's forward, or name all the classes that the model knows"
    )


@contextmanager
def _bar(progress: Progress | bool) -> Iterator[Progress | None]:
    """Show a progress bar in a terminal or a notebook, and none elsewhere."""
    if progress is True and "ipykernel" in sys.modules:
        yield from _notebook_bar()
        return
    if progress is not True or not sys.stdout.isatty():
        yield progress if callable(progress) else None
        return
    from rich import progress as bars

    columns = (bars.BarColumn(), bars.TimeElapsedColumn(), bars.TextColumn("{task.description}", markup=False))
    with bars.Progress(*columns, transient=True) as shown:
        task = shown.add_task("judging", total=1.0)
        yield lambda share, words: shown.update(task, completed=share, description=printable(words))


def _notebook_bar() -> Iterator[Progress]:
    """Show an HTML bar, gone at the end: that of rich needs ipywidgets in a notebook, and complains without them."""
    ipython = import_module("IPython.display")
    handle = ipython.display(ipython.HTML("<progress></progress> judging"), display_id=True)
    last = 0.0

    def show(share: float, words: str) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:  # each is a message to the browser
            last = time.monotonic()
            handle.update(ipython.HTML(f"<progress value={share:.4f}></progress> {escape(printable(words))}"))

    try:
        yield show
    finally:
        handle.update(ipython.HTML(""))
