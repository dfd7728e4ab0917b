"""Make docs/results.md, its figures and the tables of other pages from docs/results/: ``python benchmarks/results.py``.

`study.py` writes the tables, people write docs/results/verdicts.toml: for each claim the methods that it is about,
whose figures are said from the tables, and passages for each study. There a figure is a placeholder,
``{STUDY/METHOD/FIELD}``: ``{mnist/SENSE/autoattack}``; the fields are those of `facts_of`. A passage that rests on a
run that is missing is left out, which the page says. Without a table there is no page.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_judgement import ERROR, LEAST_SEEDS, SHOWN, Comparison, Judged, Outcome, compared, mean
from study_methods import METHODS, STUDIES, methods_of
from study_tables import choice, outcomes_path, read
from study_words import BLOCK, MEASURES, NOT_YET, ends, facts_of, signed, table, verdict, with_tables, wrapped

from unmoved.core.errors import UnmovedError
from unmoved.core.files import write_atomic
from unmoved.reports.drawing import COLOURS, INK, bar, canvas, finished, legend_above, style, to_svg

FAR = 20  # points of difference that the figure does not show at their place
Runs = dict[str, list[Outcome]]  # method -> its runs, by seed
LEAD = """# What the study found

Which of ProbsCut, DRSL, SENSE, APD and their neighbours leave a network more robust under AutoAttack, on equal terms:
every run of [the protocol](studies/protocol.md), with the clean accuracy, the figures under PGD and the price.
"""
HOW = """In brackets stand 95 % intervals of a difference: over seeds (Student's t, paired by seed, from three seeds on)
and over images (paired, of the seed with the median difference). A difference is *shown* where both leave out zero;
*suggested* where one of them does; else *not shown*, which does not mean that there is none. Where AutoAttack was asked
about a sample, the interval over images holds for what the sample does not tell, too, and is wider. *Masking*: a gain
under PGD-40 that is shown, and not even suggested under AutoAttack. *Worse*: a loss under AutoAttack that is shown."""
CAPTION = """Left: accuracies; figures far below the others' stand as numbers. Right: how far AutoAttack's figure is
from that of what a method is added to; the upper line is the interval over images, the lower one that over seeds;
filled where the difference is shown."""
COLUMNS = """Accuracies in percent of n test images, the mean over seeds; in brackets the lowest and the highest end of
the seeds' 95 % intervals. AutoAttack is asked about every image (*complete*) or about a sample of what a cheap search
leaves (*sampled*; [what that is](verdict.md)). Weakest class: the one of which the fewest clean images are right, and
how many percent. Seconds: of training, on one thread beside other runs. Passes: forward and backward passes of a
training step, in batches. Doctor: how far [it believes](verdict.md#the-doctor) AutoAttack's figure, in brackets of how
many seeds. Flatness: the rise of cross-entropy on clean images under random corruptions of 0.01 of the weights' norm.
Softmax: the variance of log p over the wrong classes. var p_y: of the probability of the true class among the images
of a class, clean and attacked by PGD-20. The last three are of the test images, at most 1,000, and means over
seeds."""
TRIALS = """Each value of a setting in half the epochs, one seed: accuracy on the validation images in percent, clean
and in the worst case over Square and PGD through dead ReLUs. In bold the value chosen: of those whose clean accuracy is
at most a point below the best, the one of the highest worst case."""


def load(results: Path, study: str) -> Runs:
    """Return the runs of a study by method."""
    runs: Runs = {}
    for row in read(results / study / "runs.csv"):
        path = outcomes_path(results / study, row["method"], row["seed"])
        if row["failed"] or path.exists():  # as in `study.Job.row`: otherwise it is to be made
            runs.setdefault(row["method"], []).append(Outcome(row, path))
    return runs


def comparisons(runs: Runs) -> dict[str, Comparison]:
    """Return each method beside what it is added to, on the seeds that both have."""
    found = {}
    for method, entry in METHODS.items():
        if "base" not in entry:
            continue
        ours, theirs = ({o.seed: o for o in runs.get(name, []) if not o.failed} for name in (method, entry["base"]))
        if seeds := sorted(ours.keys() & theirs.keys()):
            pairs = [(ours[seed], theirs[seed]) for seed in seeds]
            found[method] = Comparison(method, entry["base"], {m: compared(pairs, m) for m in MEASURES})
    return found


@dataclass(frozen=True)
class Study:
    """What the tables of a study say: its runs, each method beside its base, `facts_of` each method, and the trials."""

    runs: Runs
    beside: dict[str, Comparison]
    facts: dict[str, dict[str, str]]
    trials: list[dict[str, str]]


def studies_in(results: Path) -> dict[str, Study]:
    """Read the tables of all studies."""
    found = {}
    for study in STUDIES:
        runs = load(results, study)
        beside = comparisons(runs)
        facts = {name: facts_of(name, runs.get(name, []), beside.get(name)) for name in methods_of(study)}
        found[study] = Study(runs, beside, facts, read(results / study / "tuning.csv"))
    return found


def all_facts(studies: Mapping[str, Study]) -> dict[str, dict[str, dict[str, str]]]:
    """Return the facts of each study, as sentences and tables are filled from them."""
    return {name: study.facts for name, study in studies.items()}


# --- the page


def page(studies: Mapping[str, Study], written: Path) -> str:
    """Return the page that the tables and the written verdicts make; "" without a table."""
    if not any(study.runs for study in studies.values()):
        return ""
    facts = all_facts(studies)
    parts = [LEAD, "## Verdicts\n"]
    claims = tomllib.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    parts += [verdict(name, claim, facts, str(written)) for name, claim in claims.items()]
    parts.append(wrapped(HOW + by_chance(studies)))
    for name, study in studies.items():
        if study.runs:
            parts += [f"## {STUDIES[name]['title']}\n", *_section(name, study)]
            parts += _trials(study.trials)
    if waiting := [STUDIES[name]["title"] for name, study in studies.items() if not study.runs]:
        parts.append(f"{NOT_YET.capitalize()}: {'; '.join(waiting)}.\n")
    parts += ["## Where\n", *_where(studies)]
    return "\n".join(parts)


def by_chance(studies: Mapping[str, Study]) -> str:
    """Say how many differences chance alone would show; with fewer seeds none can be shown."""
    counts = [one.measures["clean"].count for study in studies.values() for one in study.beside.values()]
    if not (count := sum(seeds >= LEAST_SEEDS for seeds in counts)):
        return ""
    return (
        f" {count} methods are compared with {LEAST_SEEDS} seeds or more: of so many differences in one figure, if none"
        f" were real, at most about {count * ERROR:.1g} would be shown by chance."
    )


def _section(name: str, study: Study) -> list[str]:
    parts = []
    first = {"setting": "setting", "seeds": "seeds", "n": "n", "clean": "clean", "pgd40": "PGD-40"}
    later = {"seconds": "seconds", "passes": "passes", "grade": "doctor"}
    later |= {"flatness": "flatness", "softmax": "softmax"}
    rows = []
    for method, known in study.facts.items():
        if "clean" not in known:
            continue
        aa = f"**{known['autoattack']}** {known['interval']} {known['kind']}"
        row = {"method": method} | {title: known[key] for key, title in first.items()} | {"AutoAttack": aa}
        row["weakest class"] = f"{known['weakest_class']}: {known['weakest']}"
        row |= {title: known[key] for key, title in later.items()}
        rows.append(row | {"var p_y": f"{known['variance']} / {known['variance_attacked']}"})
    if rows:
        parts += [
            f"![Accuracies, and differences from what a method is added to](images/results/{name}.svg)\n",
            f"{CAPTION}\n",
            f"{COLUMNS}\n",
            table(rows),
        ]
    if study.beside:
        compared_rows = [_beside(one) for one in study.beside.values()]
        parts += ["Beside what each is added to, in points:\n", table(compared_rows)]
    failed = [f"{run.label}: {run.row['failed']}" for of in study.runs.values() for run in of if run.failed]
    parts += [f"- Failed: {words}" for words in failed] + _doubts(study.runs) + _at_an_end(study.runs)
    done = {(method, run.seed) for method, of in study.runs.items() for run in of}
    listed = [method for method in study.facts if method in METHODS]
    missing = {seed: [one for one in listed if (one, seed) not in done] for seed in STUDIES[name]["seeds"]}
    if whole := [str(seed) for seed, methods in missing.items() if len(methods) == len(listed)]:
        parts.append(f"- {NOT_YET.capitalize()}: seed {', '.join(whole)} of all methods.")
    for seed, methods in missing.items():
        if 0 < len(methods) < len(listed):
            parts.append(f"- {NOT_YET.capitalize()}: seed {seed} of {', '.join(methods)}.")
    parts += [f"- The {method} is not chosen yet." for method in study.facts if method not in METHODS]
    return [*parts, ""]


def _trials(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return the table of what each value of a setting got in its trial; where all were tried, with the chosen one."""
    lines = []
    for method, entry in METHODS.items():
        name, values = entry.get("tuned", ("", ()))
        tried = {float(row["value"]): row for row in rows if row["method"] == method}
        chosen = choice(list(tried.values()), values) if values and tried.keys() >= set(values) else None
        cells = []
        for value in [value for value in values if value in tried]:
            clean, worst = (100 * int(tried[value][count]) / int(tried[value]["n"]) for count in ("clean", "worst"))
            words = f"{value:.3g}: {clean:.1f} / {worst:.1f}" + " (failed)" * bool(tried[value]["failed"])
            cells.append(f"**{words}**" if value == chosen else words)
        if cells:
            lines.append({"method": method, "setting": name, "value: clean / worst case": ", ".join(cells)})
    return [f"### Trials\n\n{TRIALS}\n", table(lines)] if lines else []


def _doubts(runs: Runs) -> list[str]:
    """Return lines with the runs that the doctor does not believe, those of a method in one."""
    lines = []
    for method, of in runs.items():
        said: dict[str, list[str]] = {}
        for run in of:
            if run.is_doubted:
                said.setdefault(run.row["doctor"], []).append(str(run.seed))
        lines += [f"- {method}, seed {', '.join(seeds)}: {words}" for words, seeds in said.items()]
    return lines


def _at_an_end(runs: Runs) -> list[str]:
    """Return a line with the methods whose setting is the least or the greatest of its values."""
    found = []
    for method, of in runs.items():
        name, values = METHODS[method].get("tuned", ("", (0,)))
        chosen = {part for run in of for part in run.row["setting"].split()}
        if chosen & {f"{name}={min(values):g}", f"{name}={max(values):g}"}:
            found.append(method)
    words = "Of the values tried, the least or the greatest was chosen, so that a better one may lie beyond"
    return [f"- {words}: {', '.join(found)}."] if found else []


def _beside(one: Comparison) -> dict[str, str]:
    row = {"method": one.method, "added to": one.base, "seeds": str(one.measures["clean"].count)}
    for name, title in MEASURES.items():
        found = one.measures[name]
        row[title] = f"{signed(found.mean)} {found.word} ({ends(found)})"
    return row | {"": one.words()}


def _where(studies: Mapping[str, Study]) -> list[str]:
    made = Counter(
        (name, run.row["hardware"], run.row["torch"])
        for name, study in studies.items()
        for of in study.runs.values()
        for run in of
        if not run.failed
    )
    lines = [
        f"- {name}: {count} run{'s' * (count > 1)} on {machine}, torch {torch}"
        for (name, machine, torch), count in made.items()
    ]
    return [
        *lines,
        "",
        "One thread a run; training and searches in bf16 where the processor multiplies it, judged predictions in "
        "float32. `benchmarks/study.py` made the tables in docs/results, `benchmarks/results.py` this page.\n",
    ]


# --- the figures


@style()
def figure(name: str, study: Study) -> Figure:
    """Draw the accuracies of each method, and AutoAttack's differences from what it is added to, with intervals."""
    good = {method: [run for run in study.runs.get(method, []) if not run.failed] for method in methods_of(name)}
    good = {method: of for method, of in good.items() if of}
    drawn = canvas(8.4, 1.0 + 0.24 * len(good))
    left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_accuracies(left, good)
    beside = {y: study.beside[method] for y, method in enumerate(good) if method in study.beside}
    _draw_differences(right, {y: one.measures["autoattack"] for y, one in beside.items()})
    left.set(yticks=range(len(good)), yticklabels=list(good), ylim=(len(good) - 0.5, -0.5))
    legend_above(drawn)
    return finished(drawn, CAPTION)


def _draw_accuracies(axes: Axes, good: Runs) -> None:
    shares = {name: [100 * mean(run.share(name) for run in of) for of in good.values()] for name in MEASURES}
    for (measure, x), marker, colour in zip(shares.items(), "|oD", (INK, COLOURS[1], COLOURS[0]), strict=True):
        face = "none" if measure == "pgd40" else colour
        axes.plot(x, range(len(x)), marker, color=colour, markerfacecolor=face, label=MEASURES[measure])
    middle = shares["autoattack"]
    lows, highs = (
        [100 * end(float(run.row[f"population_{side}"]) for run in of) for of in good.values()]
        for end, side in ((min, "low"), (max, "high"))
    )
    axes.errorbar(middle, range(len(good)), xerr=bar(lows, middle, highs), fmt="none", color=COLOURS[0], linewidth=1)
    # Undefended networks would squeeze the others into one place.
    least = min(low for low, share in zip(lows, middle, strict=True) if share >= max(middle) / 2)
    edge = least - 0.05 * (100 - least)
    for y in range(len(good)):
        if said := ", ".join(f"{MEASURES[name]} {x[y]:.1f}" for name, x in shares.items() if x[y] < edge):
            axes.annotate(f" {said}", (0, y), xycoords=("axes fraction", "data"), va="center", color=COLOURS[0])
    axes.set(xlabel="accuracy, percent", xlim=(edge, 100))


def _draw_differences(axes: Axes, differences: Mapping[int, Judged]) -> None:
    axes.axvline(0, color=INK, linewidth=0.9)
    for y, found in differences.items():
        if abs(found.mean) > FAR:
            side = "left" if found.mean < 0 else "right"
            place = (float(side == "right"), y)
            axes.annotate(
                f" {found.mean:+.1f} ",
                place,
                xycoords=("axes fraction", "data"),
                ha=side,
                va="center",
                color=COLOURS[0],
            )
            continue
        for ends_of, up, colour in ((found.images, 0.14, COLOURS[0]), (found.seeds, -0.14, COLOURS[2])):
            if ends_of is not None:
                axes.plot(ends_of, [y - up] * 2, color=colour, linewidth=1)
        face = COLOURS[0] if found.word == SHOWN else "none"
        axes.plot([found.mean], [y], "D", color=COLOURS[0], markerfacecolor=face)
    axes.set(xlabel="AutoAttack, points beside its base")


def pages(docs: Path) -> list[Path]:
    """Return the pages that have tables of the study among their own words."""
    found = [docs.parent / "README.md", *sorted((docs / "methods").glob("*.md"))]
    return [path for path in found if path.exists() and BLOCK.search(path.read_text(encoding="utf-8"))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    docs = parser.parse_args(arguments).docs
    try:
        studies = studies_in(docs / "results")
        text, facts = page(studies, docs / "results" / "verdicts.toml"), all_facts(studies)
        others = {path: with_tables(path.read_text(encoding="utf-8"), facts, str(path)) for path in pages(docs)}
    except UnmovedError as error:
        raise SystemExit(f"error: {error}") from None
    if not text:
        print(f"{docs / 'results'}: no tables yet, so there is no page; run benchmarks/study.py", file=sys.stderr)
        return
    for name, study in studies.items():
        if not all(run.failed for of in study.runs.values() for run in of):
            write_atomic(docs / "images" / "results" / f"{name}.svg", to_svg(figure(name, study)).encode())
    for path, filled_text in {docs / "results.md": text, **others}.items():
        write_atomic(path, filled_text.encode())


if __name__ == "__main__":
    main()
