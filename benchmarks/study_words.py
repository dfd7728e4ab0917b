"""Say what the tables of the study found: figures of a method, verdicts, tables on other pages."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from study_judgement import Comparison, Judged, Outcome, mean
from study_methods import METHODS, STUDIES, methods_of

from unmoved.core.errors import UnmovedError

NOT_YET = "not run yet"
MEASURES = {"clean": "clean", "pgd40": "PGD-40", "autoattack": "AutoAttack"}
Facts = Mapping[str, Mapping[str, Mapping[str, str]]]  # by study and method: name -> as printed


def table(rows: Sequence[Mapping[str, str]]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # no minus before zero


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def facts_of(method: str, runs: Sequence[Outcome], beside: Comparison | None) -> dict[str, str]:
    """Return what a sentence may say of a method, as it is printed.

    clean, pgd40, autoattack, interval, kind, seconds, passes, flatness, softmax, variance, variance_attacked,
    weakest_class, weakest, grade, setting, seeds, n, hardware; beside what it is added to, for each of clean, pgd40,
    autoattack: _difference, _word, _ends; judgement. Of a method whose runs all failed: failed.
    """
    good = [run for run in runs if not run.failed]
    if not good:
        return {"failed": f"failed, seed {', '.join(str(run.seed) for run in runs)}"} if runs else {}
    last = good[0].row
    facts = {name: f"{100 * mean(run.share(name) for run in good):.1f}" for name in MEASURES}
    low, high = (
        100 * end(float(run.row[f"population_{side}"]) for run in good) for end, side in ((min, "low"), (max, "high"))
    )
    kinds = {"complete" if run.is_complete else "sampled" for run in good}
    facts |= {"interval": f"[{low:.1f}, {high:.1f}]", "kind": " and ".join(sorted(kinds))}
    facts |= {"seconds": f"{mean(run.number('seconds') for run in good):.0f}", "n": f"{int(last['n']):,}"}
    facts["passes"] = " + ".join(f"{mean(run.number(name) for run in good):.1f}" for name in ("forward", "backward"))
    for name in ("flatness", "softmax", "variance", "variance_attacked"):
        facts[name] = f"{mean(run.number(name) for run in good):.3g}"
    classes = pd.concat([run.of_classes() for run in good], axis=1).mean(axis=1)
    facts |= {"weakest_class": str(classes.idxmin()), "weakest": f"{100 * classes.min():.0f}"}
    grades = Counter(run.row["grade"] for run in good)
    facts["grade"] = ", ".join(grade if count == len(good) else f"{grade} ({count})" for grade, count in grades.items())
    settings = sorted({run.row["setting"] for run in good})
    facts |= {"setting": " or ".join(settings) or "-", "seeds": str(len(good))}
    facts["hardware"] = " and ".join(sorted({run.row["hardware"] for run in good}))
    if beside is not None:
        for name, found in beside.measures.items():
            facts |= {f"{name}_difference": signed(found.mean), f"{name}_word": found.word, f"{name}_ends": ends(found)}
        facts["judgement"] = beside.words()
    return facts


def ends(found: Judged) -> str:
    """Return the intervals of a difference, that over images alone where there are too few seeds."""
    named = {"seeds": found.seeds, "images": found.images}
    said = [f"{name} {signed(two[0])} to {signed(two[1])}" for name, two in named.items() if two is not None]
    return ", ".join(said)


Missing = dict[str, dict[str, None]]  # study -> methods that were not run, in the order in which they were asked for


def filled(text: str, facts: Facts, where: str, missing: Missing | None = None) -> str:
    """Fill the placeholders ``{STUDY/METHOD/FIELD}`` of a passage; return "" where runs are missing.

    Args:
        missing: where the methods that were not run are put.

    Raises:
        UnmovedError: a study, method or field that there is not.
    """
    lacking: Missing = {}

    def value(match: re.Match[str]) -> str:
        study, _, rest = match[1].partition("/")
        method, _, field = rest.rpartition("/")
        if study not in STUDIES or method not in methods_of(study):
            raise UnmovedError(f"{where}: expected {{STUDY/METHOD/FIELD}} of {', '.join(STUDIES)}, came {match[0]}")
        known = facts.get(study, {}).get(method, {})
        if field in known:
            return known[field]
        if "clean" in known:
            if field.partition("_")[0] not in (*MEASURES, "judgement") or "base" not in METHODS[method]:
                raise UnmovedError(f"{where}: {match[0]}: expected one of {', '.join(known)}")
            method = METHODS[method]["base"]
        lacking.setdefault(study, {})[method] = None
        return ""

    said = re.sub(r"\{([^{}]+)\}", value, text).strip()
    for study, methods in lacking.items():
        (missing if missing is not None else {}).setdefault(study, {}).update(methods)
    return "" if lacking else said


def verdict(name: str, written: Mapping[str, Any], facts: Facts, path: str) -> str:
    """Return the paragraph of a verdict: the claim, then what each study found, and at the end what was not run.

    Args:
        written: ``claim``; ``methods``, whose figures are said; ``notes`` on how one of them was added; passages to
            stand after the figures of a study, under its name.
    """
    said, missing = [str(written["claim"])], Missing()
    for study in STUDIES:
        known = facts.get(study, {})
        if not any(known.values()):
            continue
        methods = [method for method in written["methods"] if method in methods_of(study)]
        if lacking := [method for method in methods if not known.get(method)]:
            missing[study] = dict.fromkeys(lacking)
        ran = [known[method] for method in methods if "clean" in known.get(method, {})]
        if any(known.get(method) for method in methods):
            compared = [known.get(METHODS[method].get("base", ""), {}) for method in methods if known.get(method)]
            machines = {one["hardware"] for one in (*ran, *compared) if "hardware" in one}
            said.append(f"**{STUDIES[study]['title']}**{f' ({_setting(ran, machines)})' if ran else ''}.")
        said += [_finding(method, known[method], written.get("notes", {})) for method in methods if known.get(method)]
        said += [filled(text, facts, path, missing) for text in written.get(study, ()) if ran]
    if missing:
        waits = "; ".join(f"{STUDIES[study]['title']}: {', '.join(of)}" for study, of in missing.items())
        said.append(f"({NOT_YET.capitalize()}: {waits}.)")
    return wrapped(f"**{name}.** {' '.join(part for part in said if part)}")


def _setting(ran: Sequence[Mapping[str, str]], machines: Iterable[str]) -> str:
    """Say on what the figures of some methods, and of what they are compared with, rest."""
    each = {name: " or ".join(sorted({one[name] for one in ran})) for name in ("n", "seeds", "kind")}
    return f"n = {each['n']}, seeds: {each['seeds']}, AutoAttack {each['kind']}, {' and '.join(sorted(machines))}"


def _finding(method: str, known: Mapping[str, str], notes: Mapping[str, str]) -> str:
    """Say what a method was found to do to what it is added to; "" while that was not run."""
    base = METHODS[method]["base"]
    if "clean" not in known:
        return f"{method}: {known['failed']}."
    if base == "standard":
        return (
            f"Alone, on clean images: {known['autoattack']} % {known['interval']} under AutoAttack, {known['pgd40']} "
            "under PGD-40."
        )
    if "judgement" not in known:
        return ""
    robust, clean, pgd = (
        [known[f"{name}_{part}"] for part in ("difference", "word", "ends")]
        for name in ("autoattack", "clean", "pgd40")
    )
    return (
        f"Added to {base}{notes.get(method, '')}: {robust[0]} points under AutoAttack, {robust[1]} ({robust[2]}); "
        f"clean accuracy {clean[0]}, {clean[1]}; PGD-40 {pgd[0]}, {pgd[1]}."
    )


BLOCK = re.compile(r"(<!-- study ([\w-]+): ([^>]+) -->\n).*?(<!-- end of study -->)", re.DOTALL)


def with_tables(text: str, facts: Facts, where: str) -> str:
    """Fill each ``<!-- study STUDY: METHOD, METHOD --> ... <!-- end of study -->`` of a page with a table of them.

    Raises:
        UnmovedError: a study or method that there is not.
    """

    def block(match: re.Match[str]) -> str:
        study, names = match[2], [name.strip() for name in " ".join(match[3].split()).split(",")]
        if study not in STUDIES or not set(names) <= set(methods_of(study)):
            raise UnmovedError(
                f"{where}: expected a study and methods of {', '.join(STUDIES)}, came {match[1].strip()}"
            )
        known = [facts[study][name] for name in names if "clean" in facts[study].get(name, {})]
        if not known:
            return f"{match[1]}\n{STUDIES[study]['title']}: {NOT_YET}.\n\n{match[4]}"
        seeds, kinds = (sorted({one[name] for one in known}) for name in ("seeds", "kind"))
        about = (
            f"{STUDIES[study]['title']}: accuracy in % of {known[0]['n']} test images, the mean over the seeds "
            f"({' or '.join(seeds)}); AutoAttack {' or '.join(kinds)}, in brackets the lowest and the highest end "
            "of the seeds' 95 % intervals. Right: the difference from what a method is added to, in points."
        )
        rows = [_row(name, facts[study].get(name, {})) for name in names]
        return f"{match[1]}\n{wrapped(about)}\n{table(rows)}\n{match[4]}"

    return BLOCK.sub(block, text)


def _row(method: str, known: Mapping[str, str]) -> dict[str, str]:
    blank = dict.fromkeys(("PGD-40", "AutoAttack", "added to", "difference"), "")
    if "clean" not in known:
        return {"method": method, "clean": known.get("failed", NOT_YET)} | blank
    row = {"method": method, "clean": known["clean"], "PGD-40": known["pgd40"]}
    row["AutoAttack"] = f"**{known['autoattack']}** {known['interval']}"
    if "judgement" not in known:
        return row | {"added to": "", "difference": ""}
    parts = [
        f"{title} {known[f'{name}_difference']} {known[f'{name}_word']}"
        for name, title in MEASURES.items()
        if name != "pgd40"
    ]
    judgement = f" ({known['judgement']})" if known["judgement"] else ""
    return row | {"added to": METHODS[method]["base"], "difference": ", ".join(parts) + judgement}
