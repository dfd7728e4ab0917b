"""Print progress, summaries and messages: bars and tables on a terminal, plain lines where a program reads them.

All text is printed here and shown literally, since names, paths and messages may come from anyone: square brackets are
no markup, ``:smile:`` is no emoji, and control characters and characters that cannot be encoded are escaped.
"""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from unmoved.core.messages import printable as plain

if TYPE_CHECKING:
    import pandas as pd
    from rich.progress import Progress

    from unmoved.runs.records import Doctor, Evaluation
    from unmoved.training.log import EpochRecord

BOUND = "accuracy in %; under attack it is an upper bound"
SEARCH = "accuracy in % under quick alone; the verdict stands below"
COMPLETE = "every image that quick left was to be asked about: this is AutoAttack's complete verdict"
IN_A_PIPE = 1000  # characters of a description, which may be any file's
_console = partial(Console, markup=False, emoji=False, highlight=False)
console, complaints = _console(), _console(stderr=True)


class Advance(Protocol):
    """Move a progress bar to ``done``; ``words`` replace its label."""

    def __call__(self, done: float, words: str | None = None) -> None: ...


def say(text: str, *, style: str | None = None, error: bool = False) -> None:
    """Print text as it is, on standard output or standard error."""
    (complaints if error else console).print(plain(text), style=style, soft_wrap=True)


def say_each(lines: Mapping[str, str]) -> None:
    """Print names and what each is, cut where a line would be wider than the screen; a pipe has room for more."""
    widest = max(map(len, lines), default=0)
    for name, words in lines.items():
        start, cut = f"  {plain(name):{widest}}  ", plain(words)
        room = max(20, console.width - len(start)) if console.is_terminal else IN_A_PIPE
        say(start + (cut if len(cut) <= room else f"{cut[: room - 3].rsplit(' ', 1)[0]}..."))


def speak_any_language() -> None:
    """Let standard output and standard error escape characters that their encoding lacks, in place of an error."""
    codecs.register_error("unmoved.escape", _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="unmoved.escape")


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Escape characters as ``\\uXXXX``, as Python, JSON and TOML read it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    codes = map(ord, error.object[error.start : error.end])
    return "".join(f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}" for code in codes), error.end


@contextmanager
def bars(*, timed: bool = True) -> Iterator[Callable[[str, float], Advance]]:
    """Show progress bars on a terminal, each made with (label, total); nothing where lines are read by a program.

    Args:
        timed: whether the time left is shown, at the speed of the last half minute.
    """
    if not console.is_terminal:
        yield lambda label, total: lambda done, words=None: None
        return
    with _progress("words", "bar", "elapsed", *(["left"] if timed else [])) as progress:

        def add(label: str, total: float) -> Advance:
            task = progress.add_task(plain(label), total=total)

            def advance(done: float, words: str | None = None) -> None:
                progress.update(task, completed=done, description=plain(words or label))

            return advance

        yield add


def _progress(*columns: str) -> Progress:
    """Make a display of bars with these columns: words, bar, elapsed, left."""
    from rich import progress  # `unmoved --help` must not wait for it

    made = {
        "words": progress.TextColumn("{task.description}", markup=False),
        "bar": progress.BarColumn(),
        "elapsed": progress.TimeElapsedColumn(),
        "left": progress.TimeRemainingColumn(),
    }
    return progress.Progress(*(made[name] for name in columns), console=console, transient=True)


@contextmanager
def follow() -> Iterator[Callable[[float, str], None]]:
    """Show one bar with what is known so far; where lines are read by a program, one line per part of the work."""
    if console.is_terminal:
        with _progress("bar", "elapsed", "left", "words") as progress:
            task = progress.add_task("attacking", total=1)
            yield lambda share, words: progress.update(task, completed=share, description=plain(words))
        return
    last = ""

    def line(share: float, words: str) -> None:
        nonlocal last
        if last and words.split(":")[0] != last.split(":")[0]:
            say(last)
        last = words

    yield line
    if last and ":" in last and not last.startswith("doctor"):
        say(last)


def tensorboard_log(out: Path) -> Callable[[EpochRecord], None]:
    """Return a function that writes a record of the log to TensorBoard, one point an epoch.

    Raises:
        UnmovedError: tensorboard is not installed.
    """
    from unmoved.core.errors import UnmovedError

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UnmovedError("--tensorboard needs the extra: pip install 'unmoved[tensorboard]'") from error
    writer = SummaryWriter(str(out / "tensorboard"))

    def log(record: EpochRecord) -> None:
        for name, value in {**record, **{f"parts/{part}": mean for part, mean in record["parts"].items()}}.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                writer.add_scalar(name, value, record["epoch"])
        writer.flush()

    return log


def say_epoch(record: EpochRecord, epochs: int) -> None:
    """Print an epoch's record in one line."""
    line = f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}"
    if "validation_robust" in record:
        line += f", validation clean {record['validation_clean']:.1%}, robust {record['validation_robust']:.1%}"
    say(line + f", {record['seconds']:.0f} s")


def print_summary(tables: Mapping[str, pd.DataFrame | None], title: str = BOUND) -> None:
    """Print the accuracies of runs, by name, as one table; those without outcomes are left out."""
    from rich.table import Table

    from unmoved.evaluation import outcomes

    view = Table(title=title, title_justify="left")
    view.add_column("recipe", no_wrap=True)
    summaries = {name: outcomes.summary(table, is_checked=True) for name, table in tables.items() if table is not None}
    measures = list(dict.fromkeys(measure for summary in summaries.values() for measure in summary["measure"]))
    for measure in measures:
        view.add_column(plain(measure), justify="right")
    view.add_column("95 % interval", justify="right", no_wrap=True)
    view.add_column("n", justify="right")
    for name, summary in summaries.items():
        rows = summary.set_index("measure")
        cells = [f"{100 * rows.accuracy[m]:.1f}" if m in rows.index else "" for m in measures]
        worst = rows.loc[outcomes.WORST]
        view.add_row(plain(name), *cells, f"{100 * worst.low:.1f} - {100 * worst.high:.1f}", f"{worst['n']:.0f}")
    (console if console.is_terminal else _console(width=1000)).print(view)  # nothing is cut off in a file


def print_estimate(facts: Evaluation | None, name: str = "") -> None:
    """Print what a sampled verdict estimates, with its intervals; nothing of another evaluation."""
    from unmoved.runs import records

    if (estimate := records.estimate(facts)) is not None:
        low, high = (100 * share for share in estimate.population)
        say(f"{name}: {estimate.words()}" if name else estimate.words())
        say(f"for other images of the same distribution: {low:.1f} to {high:.1f}")


def print_findings(answer: Doctor) -> None:
    """Print what the doctor found, the gravest first."""
    if not answer["findings"]:
        say(f"the doctor found nothing to object to (n = {answer.get('n')})")
    for finding in answer["findings"]:
        say(
            f"[{finding['grade']}] {finding['check']}: {finding['measured']}\n"
            f"    why it matters: {finding['why']}\n    what to do: {finding['do']}"
        )
