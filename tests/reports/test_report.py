from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup
from matplotlib.figure import Figure

from unmoved.cli import screen
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import eps_text
from unmoved.evaluation import outcomes
from unmoved.evaluation.estimate import Estimate
from unmoved.reports import figures, pages, report
from unmoved.reports.pages import Section
from unmoved.runs import records
from unmoved.runs.assembly import IN_PYTHON
from unmoved.runs.by_recipe import results_by_recipe, without_seeds
from unmoved.runs.folder import Run

SAMPLES = 60


@dataclass
class FakeRun:
    """What `unmoved.runs.folder.Run` offers to a reader."""

    path: Path
    name: str
    seed: int
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    metrics: pd.DataFrame
    outcomes: pd.DataFrame | None
    curve: pd.DataFrame | None
    gallery: dict[str, np.ndarray] | None
    evaluation: dict[str, Any] | None
    verdict: dict[str, Any] | None = None
    verdict_outcomes: pd.DataFrame | None = None
    sampled: dict[str, Any] | None = None
    sampled_outcomes: pd.DataFrame | None = None
    doctor: dict[str, Any] | None = None
    shown = Run.shown

    def facts(self, kind: str) -> dict[str, Any] | None:
        return cast("dict[str, Any] | None", getattr(self, kind))


def attacked(right_clean: int, right_attacked: int, attack: str, eps: float) -> pd.DataFrame:
    """Outcomes in which the first so many of the samples are right."""
    label = np.arange(SAMPLES) % 3
    clean, adversarial = label.copy(), label.copy()
    clean[right_clean:] = (label[right_clean:] + 1) % 3
    adversarial[right_attacked:] = (label[right_attacked:] + 1) % 3
    table = pd.DataFrame({"index": np.arange(SAMPLES), "label": label, "attack": attack, "eps": eps, "norm": "linf"})
    table["clean_prediction"], table["adversarial_prediction"] = clean, adversarial
    table["distance"], table["success"] = eps, adversarial != label
    table["by"] = np.where(table["success"], attack, "none")
    return table


def make(name: str = "digits/at", seed: int = 0, clean: int = 57, robust: int = 30) -> Any:
    curve = [attacked(clean, round(clean - (clean - robust) * eps / 0.1), "pgd-10", eps) for eps in (0.0, 0.05, 0.1)]
    epochs = np.arange(1, 4)
    metrics = pd.DataFrame({"epoch": epochs, "step": epochs * 10, "seconds": epochs * 25.0, "lr": 0.1, "eps": 0.1})
    metrics = metrics.assign(loss=1 / epochs, train_accuracy=0.6, validation_clean=0.8, validation_n=30)
    metrics["validation_robust"] = [0.4, 0.5, 0.45]
    x = np.full((2, 1, 4, 4), 0.5, np.float32)
    gallery = {"x": x, "x_adv": x + 0.1, "label": np.array([0, 1]), "clean_prediction": np.array([0, 1])}
    gallery |= {"adversarial_prediction": np.array([2, 1]), "attack": np.array(["pgd", "square"])}
    return FakeRun(
        path=Path(f"runs/{name.replace('/', '-')}-{seed}"),
        name=name,
        seed=seed,
        recipe={"name": name, "training": {"seed": seed, "epochs": 3}},
        provenance={"versions": {"torch": "9.9"}, "command": "unmoved train recipe.toml", "git": {"dirty": False}},
        metrics=metrics,
        outcomes=pd.concat([attacked(clean, robust + 3, "pgd", 0.1), attacked(clean, robust, "square", 0.1)]),
        curve=pd.concat(curve),
        gallery=gallery,
        evaluation={
            "n": SAMPLES,
            "weights": "best",
            "weights_sha256": "0",
            "threat": {"norm": "linf", "eps": 0.1},
            "attacks": ["pgd", "square"],
            "seconds": 1.5,
            "split": "test",
            "data": "0",
            "classes": ["cat", "dog", "ship"],
        },
    )


def three() -> list[Any]:
    return [make("digits/plain", 0, 60, 3), make("digits/at", 0, 57, 30), make("digits/at", 1, 55, 33)]


def bare(name: str = "digits/at", seed: int = 0, clean: int = 57, robust: int = 30) -> Any:
    """A run with outcomes alone: fewer figures to draw."""
    return replace(make(name, seed, clean, robust), curve=None, gallery=None, metrics=pd.DataFrame())


def settled(run: Any, robust: int, most: int = SAMPLES, attack: str = "autoattack") -> Any:
    """The run with a verdict by AutoAttack, on the first ``most`` samples, of which so many stand."""
    table = attacked(int((run.outcomes["attack"] == "pgd").sum()), robust, attack, 0.1)
    clean = run.outcomes[run.outcomes["attack"] == "square"].sort_values("index").reset_index(drop=True)
    table["clean_prediction"] = clean["clean_prediction"]
    wrong = table["clean_prediction"] != table["label"]
    table["by"] = np.where(wrong, "clean", np.where(table["success"], "apgd-t", "none"))
    facts = {"n": most, "attacks": {attack: f"AutoAttack({attack})"}, "notes": ["3 classes leave 2 targets"]}
    facts |= {"weights": "best", "weights_sha256": run.evaluation["weights_sha256"]}
    return replace(run, verdict=facts, verdict_outcomes=table[table["index"] < most])


def by_a_sample(run: Any, left: int = 45, *, near: tuple[int, int] = (5, 2), far: tuple[int, int] = (20, 1)) -> Any:
    """The run with a sampled verdict: of the ``left`` samples that quick leaves so many were asked, so many broke."""
    table = attacked(57, left, "quick", 0.1)
    estimate = Estimate(SAMPLES, left, *near, *far)
    facts = {"n": SAMPLES, "weights": "best", "weights_sha256": "0", "threat": {"norm": "linf", "eps": 0.1}}
    facts |= {"attacks": {"quick": "Quick()"}, "sample": records.sample(estimate, "AutoAttack()", {}), "split": "test"}
    return replace(run, sampled=facts, sampled_outcomes=table)


def finding(grade: str, check: str = "masking", measured: str = "97 % zeros") -> dict[str, str]:
    return {"check": check, "grade": grade, "measured": measured, "why": "no slope", "do": "attack the logits"}


def seen_by_doctor(run: Any, *findings: dict[str, str], sentence: str = "") -> Any:
    about = {"weights_sha256": run.evaluation["weights_sha256"], "n": 50}
    return replace(run, doctor={**about, "sentence": sentence, "findings": list(findings)})


def on_disk(folder: Path, fake: Any) -> Run:
    """The same run as a folder, its log left out."""
    run = Run.create(folder / f"{fake.path.name}", {"name": fake.name, "training": {"seed": fake.seed}})
    told = fake.evaluation | {"attacks": {"pgd": "PGD()", "square": "Square()"}}
    tables = [table.reset_index(drop=True) for table in (fake.outcomes, fake.curve)]
    run.save_evaluation(tables[0], told, curve=tables[1], gallery=fake.gallery)
    if fake.verdict is not None:
        run.save_evaluation(fake.verdict_outcomes.reset_index(drop=True), fake.verdict, kind="verdict")
    return Run.open(run.path)


class Page(HTMLParser):
    """Ids, links, tags and words of a page, and every attribute that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.attributes: list[dict[str, str]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.attributes.append({"tag": tag, **values})
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        elif "src" in values or "href" in values:
            self.fetched.append(values.get("src", values.get("href", "")))

    @property
    def said(self) -> str:
        """The words with single spaces; a no-break space stays one."""
        return re.sub(r"[ \n]+", " ", self.words)

    def handle_data(self, data: str) -> None:
        self.words += data + " "


def page(runs: list[Any], path: Path, **options: Any) -> Page:
    return Page(report.write(runs, path, "Digits", **options).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(three(), tmp_path_factory.mktemp("page") / "my report.html", "Digits")


# --- the page


def test_the_page_has_its_sections_and_every_link_leads_somewhere(written: Path) -> None:
    seen = Page(written.read_text(encoding="utf-8"))
    assert {
        "summary",
        "results",
        "doctor",
        "broken",
        "tradeoff",
        "curve",
        "training",
        "gallery",
        "classes",
        "provenance",
    } <= set(seen.ids)
    assert len(seen.ids) == len(set(seen.ids))
    assert {link[1:] for link in seen.links if link.startswith("#")} <= set(seen.ids)
    files = {link for link in seen.links if not link.startswith("#")}
    assert files == {f"my%20report-figures/{file.name}" for file in (written.parent / "my report-figures").iterdir()}
    assert {link.rpartition("/")[2] for link in files} == {"broken.svg", "tradeoff.svg", "curve.svg"} | {
        f"{part}-digits-{name}.svg" for part in ("training", "gallery", "classes") for name in ("plain", "at")
    }
    assert {"main", "header", "footer", "details", "summary"} <= set(seen.tags)


def test_nothing_is_fetched_and_no_script_runs(written: Path) -> None:
    seen = Page(written.read_text(encoding="utf-8"))
    assert all(link.startswith(("#", "data:")) for link in seen.fetched)
    text = written.read_text(encoding="utf-8")
    assert "http" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "script" not in seen.tags


def test_pictures_have_words_and_headers_have_scopes(written: Path) -> None:
    seen = Page(written.read_text(encoding="utf-8"))
    drawn = [a for a in seen.attributes if a["tag"] == "svg"]
    pictures = [a for a in drawn if a["class"] == "figure"]
    assert len(pictures) == 9
    assert all(a["aria-hidden"] == "true" for a in drawn if a not in pictures)  # the markers beside names
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in pictures)
    assert all(a.get("scope") in ("row", "col", "rowgroup") for a in seen.attributes if a["tag"] == "th")


def test_the_numbers_are_those_of_the_tables(written: Path) -> None:
    words = Page(written.read_text(encoding="utf-8")).said
    low, high = outcomes.wilson(30, SAMPLES)[0], outcomes.wilson(33, SAMPLES)[1]
    assert "digits/at holds best: it still classifies 52.5\xa0% of the images correctly" in words  # (30 + 33) / 2 of 60
    assert "every image may be attacked by 2 attacks and the worst outcome counts" in words
    assert f"(mean of 2 seeds, whose 95\xa0% intervals span {100 * low:.1f} to {100 * high:.1f})" in words
    assert "Figures under attack are upper bounds: a stronger attack may find errors" in words
    assert "The next is digits/plain with 5.0\xa0%, and the intervals do not overlap." in words
    assert f"52.5 \xb1\xa03.5 {100 * low:.1f} to {100 * high:.1f} 93.3 \xb1\xa02.4" in words
    assert "57.5 \xb1\xa03.5 52.5 \xb1\xa03.5 60 2 1 min 15 s best" in words
    assert "versions.torch 9.9" in words
    assert "training.epochs 3" in words


def test_overlapping_intervals_are_said_to_settle_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        report, "_figures", lambda judged, styles: {name: [] for name in report.TITLES}
    )  # words alone: quick
    runs = [bare("a", clean=57, robust=33), bare("b", clean=57, robust=30), bare("c", clean=57, robust=31)]
    words = page(runs, tmp_path / "r.html").said
    assert "The intervals of c and b overlap with it: 60 images do not settle which of them is better." in words
    tied = page([bare("a"), bare("b")], tmp_path / "r.html").said
    assert "a and b hold best and equally: each still classifies 50.0\xa0%" in tied


def test_sentences_name_twelve_recipes_at_most_and_say_how_many_more_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_figures", lambda judged, styles: {name: [] for name in report.TITLES})
    for count, tail in ((12, "m10 and m11"), (13, "m10, m11 and 1 more"), (40, "m11 and 28 more")):
        runs = [bare("top", clean=57, robust=33), *(bare(f"m{k}", robust=30) for k in range(count))]
        for run in runs[1:-1]:
            run.evaluation["notes"] = ["adapted"]
        words = page(runs, tmp_path / "r.html").said.replace(" ,", ",").replace("( results )", "(results)")
        assert re.search(tail + r"( \(results\))? overlap with it", words)
        left = count - 1 - 12
        assert (f"m10, m11 and {left} more: adapted" if left > 0 else "adapted") in words
        assert all(f" m{k} 95.0 50.0" in words for k in range(count))  # the table leaves nobody out
    several = [settled(bare("top"), 20), *(bare(f"m{k}", robust=10 + k % 3) for k in range(20))]
    words = page(several, tmp_path / "r.html").said.replace(" ,", ",").replace("( results )", "(results)")
    assert re.search(r"and 8 more \(results\), whose upper bounds are lower: 16.7 to 20.0\xa0%\.", words)


def test_figures_are_made_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made, turned into text and cleared before the next: a figure takes megabytes, and a page has hundreds."""
    alive: list[Figure] = []
    most: list[int] = []
    real = pages.drawing.finished

    def counted(figure: Figure, caption: str) -> Figure:
        alive.append(figure)
        most.append(sum(bool(made.axes) for made in alive))
        return real(figure, caption)

    for module in (figures.runs, figures.broken_by):
        monkeypatch.setattr(module, "finished", counted)
    mine = Figure()
    mine.add_subplot().plot([1, 2])
    report.write([make("a"), make("b")], tmp_path / "r.html", "x", extra=[Section("mine", "Mine", figures=[mine])])
    assert len(most) == 3 + 2 * 3
    assert set(most) == {1}
    assert mine.axes  # what somebody else made is his


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>"
    run = make(bad)
    run.provenance["note"] = {bad: bad}
    run.evaluation["classes"] = [bad, "\"><img src=x onerror='alert(1)'>", "ship"]
    run.evaluation["split"] = bad
    run.outcomes["attack"] = run.outcomes["attack"].replace("pgd", bad)
    run.gallery["attack"] = np.array([bad, bad])
    section = Section("more", bad, [bad], pd.DataFrame({bad: [bad]}))
    text = report.write([run], tmp_path / "r.html", bad, extra=[section]).read_text(encoding="utf-8")
    seen = Page(text)
    assert not {"script", "img"} & set(seen.tags)
    assert not any("onerror" in a or "onload" in a for a in seen.attributes)
    assert seen.words.count(bad) > 12
    assert all("<script" not in f.read_text(encoding="utf-8") for f in (tmp_path / "r-figures").iterdir())


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    first = report.write([bare()], tmp_path / "r.html", "Digits").read_bytes()
    assert report.write([bare()], tmp_path / "r.html", "Digits").read_bytes() == first
    assert {p.name for p in tmp_path.iterdir()} == {"r.html", "r-figures"}


def test_a_run_with_outcomes_alone_still_gives_a_page(tmp_path: Path) -> None:
    run = replace(bare(), provenance={}, recipe={})
    seen = page([run], tmp_path / "r.html")
    words = seen.said
    assert "digits/at still classifies 50.0\xa0%" in words
    assert "best:" not in words  # it is not a race of one
    for sentence in ("No run has a curve", "No run was trained here", "No run kept images"):
        assert sentence in words
    assert sum(tag == "svg" for tag in seen.tags) == 2  # what broke it, and the classes in place of a trade-off of one


def test_a_gallery_without_images_is_no_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert results_by_recipe([replace(bare(), gallery={})])[0].gallery is None  # no test image was right
    assert results_by_recipe([bare(), replace(make(seed=1))])[0].gallery is not None  # another seed's


def test_files_are_read_once() -> None:
    reads: list[str] = []

    class Counting:
        def __init__(self) -> None:
            self.run = make()

        def __getattr__(self, name: str) -> Any:
            reads.append(name)
            return getattr(self.run, name)

    verdict = results_by_recipe([cast(Any, Counting())])[0]
    assert verdict.measures["clean"].n == len(verdict.by_seed.index) * 15 == SAMPLES
    assert verdict.curve is not None
    assert [reads.count(name) for name in ("outcomes", "curve", "metrics", "gallery", "evaluation")] == [1] * 5


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_figures", lambda judged, styles: {name: [] for name in report.TITLES})
    (tmp_path / "file").write_text("")
    with pytest.raises(UnmovedError, match=r"could not write .*r\.html: .*; or choose another --out"):
        report.write([bare()], tmp_path / "file" / "r.html", "x")


def test_other_rooms_may_add_sections(tmp_path: Path) -> None:
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    figure.set_label("Two points, n = 2.")
    table = pd.DataFrame({"check": ["masking"], "value": [0.123456], "n": [2]})
    section = Section("masking", "Masking", ["a < b", Markup("<b>bold</b>")], table, [figure])
    seen = page([bare()], tmp_path / "r.html", extra=[section])
    assert "masking" in seen.ids
    assert seen.ids.index("gallery") < seen.ids.index("masking") < seen.ids.index("reading")
    assert re.search("Masking a < b bold +check +value +n +masking 0.1235 2 ", seen.said)
    assert "Two points, n = 2." in seen.said
    assert (tmp_path / "r-figures" / "masking.svg").exists()
    for name in ("summary", "Doctor Who", ""):
        with pytest.raises(UnmovedError, match="section id"):
            report.write([bare()], tmp_path / "r.html", "x", extra=[replace(section, id=name)])


def test_figure_files_of_like_names_do_not_overwrite_each_other(tmp_path: Path) -> None:
    report.write([bare("a/b"), bare("a-b"), bare("../../etc/x")], tmp_path / "r.html", "x")
    names = {file.name for file in (tmp_path / "r-figures").iterdir()}
    assert {"classes-a-b.svg", "classes-a-b-2.svg", "classes-etc-x.svg"} <= names
    assert {p.name for p in tmp_path.iterdir()} == {"r.html", "r-figures"}


@pytest.mark.parametrize(
    ("eps", "text"),
    [(8 / 255, "8/255"), (0.3, "0.3"), (0.2, "0.2"), (0.5, "0.5"), (1 / 3, "85/255"), (0.12345678, "0.1235")],
)
def test_eps_is_written_as_people_write_it(eps: float, text: str) -> None:
    assert eps_text(eps) == text


# --- AutoAttack and the doctor


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words alone: no figure is drawn."""
    monkeypatch.setattr(report, "_figures", lambda judged, styles: {name: [] for name in report.TITLES})


@pytest.mark.usefixtures("quick")
def test_the_summary_speaks_of_autoattack_where_it_has_judged(tmp_path: Path) -> None:
    a, b, c = bare("a", robust=33), bare("b", robust=30), bare("c", robust=2)
    low, high = outcomes.wilson(12, 40)
    words = page([settled(a, 12, 40), b, c], tmp_path / "r.html").said
    assert (
        "a holds best: it still classifies 30.0\xa0% of the images correctly under AutoAttack (n\xa0=\xa040," in words
    )
    assert f"95\xa0% interval {100 * low:.1f} to {100 * high:.1f}). Without" in words
    assert "has not judged b : an upper bound of 50.0\xa0% leaves open whether it is better." in words
    group = "Judged by pgd, square alone: looser upper bounds, not to be ranked with those above"
    assert re.search(
        rf"Judged by AutoAttack a best 30.0 {100 * low:.1f} to {100 * high:.1f} 55.0 .*{group} b . 50.0", words
    )
    assert re.search("Figures under attack, AutoAttack.s too, are upper bounds", words)
    assert "AutoAttack for 1 of the 3 recipes" in words
    assert "a: AutoAttack: 3 classes leave 2 targets" in words
    # judged, it leads although its upper bound is lower
    both = page([settled(a, 12, 40), settled(b, 20, 40), c], tmp_path / "r.html").said
    assert "b holds best: it still classifies 50.0\xa0%" in both
    assert "The interval of a overlaps with it: 40 images" in both
    assert "AutoAttack has not judged c , whose upper bound is lower: 3.3\xa0%." in both


@pytest.mark.usefixtures("quick")
def test_without_autoattack_the_figure_is_called_an_upper_bound(tmp_path: Path) -> None:
    words = page([bare()], tmp_path / "r.html").said
    assert ", an upper bound: AutoAttack has not judged it." in words
    assert "quick" not in words
    run = bare()
    run.outcomes["attack"] = run.outcomes["attack"].replace("square", "quick")
    run.evaluation["notes"] = ["3 classes leave 2 targets"]
    words = page([run], tmp_path / "r.html").said
    assert "quick is our own cheap ensemble." in words
    assert "AutoAttack" not in words.replace("AutoAttack has not judged it", "").replace("Let AutoAttack say", "")
    assert "Adaptations of the attacks: 3 classes leave 2 targets" in words


@pytest.mark.usefixtures("quick")
def test_a_run_that_only_autoattack_has_judged_is_reported_from_its_verdict(tmp_path: Path) -> None:
    run = replace(settled(make(), 12, 40), evaluation=None, outcomes=None)
    words = page([run], tmp_path / "r.html").said
    assert "digits/at still classifies 30.0\xa0% of the images correctly under AutoAttack" in words
    assert "The attacks of the evaluation" not in words
    assert "n\xa0=\xa040 images" in words
    (verdict,) = results_by_recipe([run])
    assert verdict.curve is None  # of an evaluation that is not there: nobody knows of which weights
    assert verdict.gallery is None
    assert verdict.broken["source"].unique().tolist() == ["AutoAttack"]


@pytest.mark.usefixtures("quick")
def test_a_sampled_verdict_is_called_so_wherever_its_figure_stands_and_has_its_interval(tmp_path: Path) -> None:
    """Every place that shows what AutoAttack leaves says that it is sampled, and between which ends it may lie."""
    run = by_a_sample(bare("a"))
    estimate = records.estimate(run.sampled)
    assert estimate is not None
    left = f"{100 * estimate.left / SAMPLES:.1f}"
    low, high = (f"{100 * share:.1f}" for share in estimate.population)
    text = page([run, by_a_sample(bare("b", robust=2), 15, far=(10, 8)), bare("c", robust=2)], tmp_path / "r.html")
    words = text.said
    assert f"a holds best: it still classifies {left}\xa0% of the images correctly under AutoAttack, sampled" in words
    assert f"interval {low} to {high})" in words
    assert re.search(r"The next is b with [\d.]+\xa0% \(AutoAttack, sampled: [\d.]+ to [\d.]+\), and", words)
    assert re.search(rf"Judged by AutoAttack, sampled a best {left} {low} to {high} sampled 50.0", words)
    assert f"a : {estimate.words()}" in words.replace("a: Auto", "a : Auto")
    assert "and AutoAttack, sampled for 2 of the 3 recipes" in words
    shown = re.findall(rf"(?<![\d.]){re.escape(left)}(?![\d.])[^%]{{0,25}}", words)
    assert len(shown) == 4  # the summary, the ranking, what to believe, all figures
    assert all(re.match(rf"{re.escape(left)}( \[|\xa0$| {low} to {high})", one) for one in shown)
    assert "Let AutoAttack judge what its sample left out, too: unmoved evaluate runs/a-0 --attacks standard" in words


@pytest.mark.usefixtures("quick")
def test_a_run_with_a_sampled_verdict_alone_is_reported_from_its_cheap_search(tmp_path: Path) -> None:
    run = replace(by_a_sample(make()), evaluation=None, outcomes=None)
    (result,) = results_by_recipe([run])
    assert result.measures["quick"].accuracy == 45 / SAMPLES
    assert result.robust.accuracy == pytest.approx((45 - 2 - 2) / SAMPLES)
    assert (result.curve, result.gallery) == (None, None)
    assert result.broken["source"].unique().tolist() == ["quick"]
    words = page([run], tmp_path / "r.html").said
    assert "judged by quick and AutoAttack, sampled" in words
    assert "quick is our own cheap ensemble" in words


def test_the_complete_verdict_wins_unless_it_is_about_fewer_images() -> None:
    for most, stale in (
        (SAMPLES, ()),
        (SAMPLES - 1, ("complete verdict is about 59 images, the sampled one about 60",)),
    ):
        (run,) = results_by_recipe([by_a_sample(settled(bare(), 20, most))])[0].runs
        assert (run.autoattack is None, run.estimate is None) == (most < SAMPLES, most == SAMPLES)
        assert len(run.stale) == len(stale)
        assert all(words in line for words, line in zip(stale, run.stale, strict=True))


def test_a_sampled_verdict_on_other_weights_or_unlike_its_counts_is_not_shown() -> None:
    run = by_a_sample(bare())
    run.sampled["weights_sha256"] = "old"
    (read,) = results_by_recipe([run])[0].runs
    assert read.estimate is None
    assert "the sampled verdict is about other weights than the evaluation" in read.stale[0]
    assert "--attacks standard --sample N" in read.stale[0]
    run.sampled |= {"weights_sha256": "0", "sample": {**run.sampled["sample"], "n": 61}}
    with pytest.raises(UnmovedError, match="expected the counts of a sample"):
        results_by_recipe([run])


def test_the_doctors_opinion_of_a_sampled_verdict_is_about_what_was_asked() -> None:
    run = seen_by_doctor(by_a_sample(bare()), finding("note"))
    run.evaluation["files"], run.sampled["files"] = {"outcomes.csv": "1"}, {"outcomes.csv": "2", "asked.csv": "3"}
    for digest, held in (("3", True), ("2", False), ("1", False)):
        run.doctor["evaluation"] = digest
        (read,) = results_by_recipe([run])[0].runs
        assert (read.doctor is not None) == held


def test_seeds_of_which_some_are_sampled_are_one_row_that_says_so() -> None:
    (result,) = results_by_recipe([settled(bare(seed=0), 30), by_a_sample(bare(seed=1))])
    assert result.autoattack is not None
    assert result.autoattack.accuracy == pytest.approx((30 + 41) / 2 / SAMPLES)
    assert (result.autoattack.seeds, result.judge) == (2, "AutoAttack, sampled at seed 1")
    assert result.broken["source"].unique().tolist() == ["AutoAttack"]
    (result,) = results_by_recipe([settled(bare(seed=0), 30, 40), by_a_sample(bare(seed=1))])
    assert result.judge == "AutoAttack"  # other images: their mean would be one of neither
    assert "a sampled verdict on other images" in result.runs[1].stale[0]


@pytest.mark.usefixtures("quick")
def test_words_about_other_weights_are_not_shown(tmp_path: Path) -> None:
    run = seen_by_doctor(settled(bare(), 12), finding("do not believe"), sentence="Do not believe this number: x.")
    run.evaluation["weights_sha256"] = "new"
    words = page([run], tmp_path / "r.html").said
    assert "AutoAttack has not judged it" in words
    assert "Do not believe" not in words
    assert "runs/digits-at-0: AutoAttack's verdict is about other weights than the evaluation" in words
    assert "`unmoved evaluate runs/digits-at-0 --attacks standard` renews it" in words
    assert "runs/digits-at-0: the doctor's opinion is about other weights than the evaluation" in words
    assert "Nobody looked: unmoved doctor runs/digits-at-0 does." in words
    run.recipe |= {"trained": False, "data": {"use": IN_PYTHON}}
    words = page([run], tmp_path / "r.html").said
    assert "Nobody looked: unmoved.judge does, called in Python as before." in words
    assert "`unmoved.judge`, called in Python as before, renews it" in words
    assert not re.search("unmoved (doctor|evaluate|analyze) runs/", words), "which cannot build its model"
    for file in (run.verdict, run.doctor):
        file["weights_sha256"] = "new"
    again = page([run], tmp_path / "r.html").said
    assert "other weights" not in again
    assert "Do not believe this number: x." in again


@pytest.mark.usefixtures("quick")
def test_the_doctors_objection_stands_beside_the_number(tmp_path: Path) -> None:
    sentence = "Do not believe this number: masking."
    grave = seen_by_doctor(make("digits/at", 1, 57, 30), finding("do not believe"), finding("note"), sentence=sentence)
    fine = seen_by_doctor(bare("digits/at", 0), finding("note", measured="1 of 40"))
    other = seen_by_doctor(bare("b", robust=3), finding("look closer"), sentence="Look closer at this number: masking.")
    words = page([fine, replace(grave, curve=None, gallery=None), other], tmp_path / "r.html").said
    # believed, b leads although its figure is lower; the other is ranked apart, with the sentence beside its number
    assert "b holds best: it still classifies 5.0\xa0%" in words
    assert "The doctor objects to ! \xa0 digits/at : what it holds is not ranked." in words
    assert re.search(
        rf"Not to be believed, says the doctor digits/at +seed 1: {sentence} ! \xa050.0 \xb1\xa00.0 37.7 to", words
    )
    assert words.count(sentence) == 3  # where it is ranked, what to believe, the doctor's section
    assert f"{sentence} digits/at (seed 1)" in words
    assert "Look closer at this number: masking. b" in words
    assert "do not believe seed 1" in words
    assert "look closer masking measured 97 % zeros why no slope what to do attack the logits" in words
    assert "note masking measured seed 0: 1 of 40 seed 1: 97 % zeros why" in words  # alike but for the measure
    assert words.index("do not believe masking measured") < words.index("note masking measured")
    # where the doctor objects to all of them, the page says so at once
    words = page([replace(grave, curve=None, gallery=None)], tmp_path / "r.html").said
    assert f"judged it; but the doctor objects: {sentence} Without an attack" in words
    assert "Nothing objects. Looked at n\xa0=\xa050" in page([seen_by_doctor(bare())], tmp_path / "r.html").said


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("spoil", ["findings", "grade", "measured"])
def test_a_doctors_file_that_cannot_be_read_is_refused(spoil: str, tmp_path: Path) -> None:
    said: dict[str, Any] = {"weights_sha256": "0", "n": 50, "sentence": "", "findings": [finding("note")]}
    if spoil == "findings":
        said["findings"] = "none"
    else:
        said["findings"][0][spoil] = 3
    (tmp_path / "doctor.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(UnmovedError, match=rf"doctor\.json: findings(\.0\.{spoil})?: .* run `unmoved doctor .*` again"):
        _ = Run(tmp_path).doctor


def test_the_doctors_file_is_read_from_the_run_folder(tmp_path: Path) -> None:
    assert Run(tmp_path).doctor is None
    said = {"weights_sha256": "0", "n": 50, "sentence": "", "findings": []}
    (tmp_path / "doctor.json").write_text(json.dumps(said), encoding="utf-8")
    assert Run(tmp_path).doctor == said
    (tmp_path / "doctor.json").write_text('{"n": 50')
    with pytest.raises(UnmovedError, match=r"doctor\.json: not valid JSON"):
        _ = Run(tmp_path).doctor


def test_a_verdict_of_other_samples_than_it_says_is_refused() -> None:
    run = settled(bare(), 12, 40)
    run.verdict["n"] = 41
    with pytest.raises(UnmovedError, match=r"outcomes of 41 samples, came 40"):
        results_by_recipe([run])


def test_what_broke_it_counts_each_sample_once_for_the_first_attack() -> None:
    (verdict,) = results_by_recipe([bare(clean=57, robust=30)])
    shares = verdict.broken.set_index("by")["share"] * SAMPLES
    assert list(shares.index) == ["pgd", "square", "none"]  # pgd came first; the fakes are blind to `clean`
    np.testing.assert_allclose(shares, [27, 3, 30])
    assert verdict.broken["source"].iloc[0] == "pgd, square"
    # two seeds, one of them judged by AutoAttack: its verdict alone
    (verdict,) = results_by_recipe([settled(bare(clean=57), 12, 40), bare(seed=1)])
    shares = verdict.broken.set_index("by")["share"] * 40
    np.testing.assert_allclose(shares[["apgd-t", "none"]], [28, 12])
    assert set(verdict.broken["n"]) == {40}
    assert verdict.autoattack is not None
    assert verdict.autoattack.seeds == 1
    assert verdict.autoattack_by_seed.keys() == {0}
    assert verdict.versions == ""
    (randomised,) = results_by_recipe([settled(bare(), 12, attack="autoattack-rand")])
    assert randomised.versions == "rand"
    assert set(randomised.broken["source"]) == {"AutoAttack rand"}


# --- which runs may stand in one page


def spoil_split(run: Any) -> None:
    run.evaluation["split"] = "validation"


def spoil_eps(run: Any) -> None:
    run.outcomes["eps"] = 0.2


def spoil_norm(run: Any) -> None:
    run.outcomes["norm"] = "l2"


def spoil_attacks(run: Any) -> None:
    run.outcomes = run.outcomes[run.outcomes["attack"] == "pgd"]


def spoil_samples(run: Any) -> None:
    run.outcomes = run.outcomes[run.outcomes["index"] < 50]
    run.evaluation["n"] = 50


def spoil_identities(run: Any) -> None:
    """As another data.seed does: as many images, a few of them the same, under their own labels."""
    run.outcomes = run.outcomes.assign(index=run.outcomes["index"] + 3 * 17)


def spoil_one_identity(run: Any) -> None:
    run.outcomes = run.outcomes.assign(index=run.outcomes["index"].replace(59, 62))


def spoil_labels(run: Any) -> None:
    run.outcomes = run.outcomes.assign(label=(run.outcomes["label"] + 1) % 3)
    run.outcomes["success"] = run.outcomes["label"] != run.outcomes["adversarial_prediction"]
    run.outcomes["by"] = np.where(run.outcomes["success"], "pgd-10", "none")


def spoil_data(run: Any) -> None:
    run.evaluation["data"] = "1"


def forget_evaluation(run: Any) -> None:
    run.evaluation = None


def forget_outcomes(run: Any) -> None:
    run.outcomes = None


def cut_outcomes(run: Any) -> None:
    run.outcomes = run.outcomes[run.outcomes["index"] < 50]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_split, "judged alike, came split = test in .*a-0 and validation in .*b-0"),
        (spoil_eps, "came eps = 0.1 in .* and 0.2 in"),
        (spoil_norm, "came norm = linf in .* and l2 in"),
        (spoil_attacks, "came attacks = "),
        (spoil_samples, "came n = 60 in .* and 50 in"),
        (spoil_identities, r"whose test images differ \(60 and 60, 9 of them in both\)"),
        (spoil_one_identity, r"whose test images differ \(60 and 60, 59 of them in both\)"),
        (spoil_labels, "same data, came other labels in .*b-0"),
        (spoil_data, "same images, came others in .*b-0 than in .*a-0, though both name the same data"),
        (forget_evaluation, "run `unmoved evaluate .*b-0` first"),
        (forget_outcomes, "run `unmoved evaluate .*b-0` first"),
        (cut_outcomes, "outcomes of 60 samples, came 50; run `unmoved evaluate .*b-0` again"),
    ],
)
def test_runs_that_do_not_compare_are_refused(spoil: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    other = make("b")
    spoil(other)
    with pytest.raises(UnmovedError, match=message):
        report.write([make("a"), other], tmp_path / "r.html", "x")
    assert not list(tmp_path.iterdir())


def test_the_same_images_stored_in_another_form_are_compared() -> None:
    other = make("b")
    other.recipe["data"], other.evaluation["data"] = {"use": "arrays"}, "1"
    assert len(results_by_recipe([make("a"), other])) == 2


def test_classes_lost_clean_and_under_attack_are_named_with_their_seeds() -> None:
    """Of 20 images a class: 2 right is a class lost as it is; 0 robust, while most of the others are, under attack."""
    runs = [bare(seed=seed, clean=SAMPLES, robust=SAMPLES) for seed in (0, 1, 2)]

    def lose(run: Any, label: int, *, clean: bool, but: int = 0) -> None:
        rows = run.outcomes[run.outcomes["label"] == label].sort_values("index").index.unique()[but:]
        table = run.outcomes
        here = table.index.isin(rows)
        table.loc[here, ["clean_prediction"] if clean else []] = (label + 1) % 3
        table.loc[here, ["adversarial_prediction", "success", "by"]] = (label + 1) % 3, True, "pgd"

    lose(runs[0], 1, clean=True, but=2)
    lose(runs[2], 1, clean=True, but=1)
    lose(runs[0], 2, clean=False)
    (result,) = results_by_recipe(runs)
    assert result.lost_classes == [(True, 1, [(0, 2, 20), (2, 1, 20)]), (False, 2, [(0, 0, 20)])]
    (whole,) = results_by_recipe([bare(clean=SAMPLES, robust=10)])  # little is left, of each class alike
    assert whole.lost_classes == []


@pytest.mark.usefixtures("quick")
def test_the_page_says_which_model_has_lost_which_class(tmp_path: Path) -> None:
    runs = [bare("a", clean=SAMPLES, robust=50), bare("b", clean=SAMPLES, robust=40)]
    for table in (run.outcomes for run in runs):
        table.loc[table["label"] == 2, "clean_prediction"] = 0
        table.loc[table["label"] == 2, ["adversarial_prediction", "success", "by"]] = 0, True, "pgd"
    words = page(runs, tmp_path / "r.html").said
    assert "It has lost class ship (0 of 20 right without an attack)." in words  # the best one, at once
    assert "Class ship , lost without an attack: a (0 of 20 right), b (0 of 20)." in words
    assert "Classes lost: ship" in words
    assert "No class is lost" in page([bare()], tmp_path / "r.html").said


def test_seeds_are_grouped_and_different_recipes_of_one_name_kept_apart() -> None:
    changed = make("digits/at", 2)
    changed.recipe["training"]["epochs"] = 9
    names = [verdict.name for verdict in results_by_recipe([*three(), changed])]
    assert names == ["digits/plain", "digits/at [runs/digits-at-0]", "digits/at [runs/digits-at-2]"]
    grouped = results_by_recipe(three())
    assert [len(verdict.runs) for verdict in grouped] == [1, 2]
    assert grouped[1].measures["worst case"].accuracy == pytest.approx(31.5 / 60)
    assert grouped[1].seconds == 75


@pytest.mark.parametrize("spoil", [spoil_identities, spoil_one_identity, spoil_labels])
@pytest.mark.parametrize("base", [None, "digits/plain"])
def test_seeds_of_one_recipe_on_other_images_are_no_seeds(
    spoil: Callable[[Any], None], base: str | None, tmp_path: Path
) -> None:
    """Nor is a mean taken of them, nor a difference."""
    runs = [make("digits/plain", 0), make("digits/at", 0), make("digits/at", 1)]
    for run in runs[1:]:
        run.recipe["base"] = base
    spoil(runs[2])
    with pytest.raises(UnmovedError, match="expected runs on the same data"):
        report.write(runs, tmp_path / "r.html", "x")


def test_only_the_training_seed_and_the_part_are_left_out_of_a_recipe() -> None:
    """Two runs that differ in another seed are runs of two recipes, and so are halves and thirds of the data."""
    recipe = {"data": {"seed": 0}, "attack": {"seed": 1}, "training": {"seed": 2, "part": {"of": 2, "number": 0}}}
    other = {"data": {"seed": 0}, "attack": {"seed": 1}, "training": {"seed": 3, "part": {"of": 2, "number": 1}}}
    assert without_seeds(recipe) == without_seeds(other)
    for changed in (
        {"data": {"seed": 9}},
        {"attack": {"seed": 9}},
        {"training": {"seed": 3, "part": {"of": 3, "number": 1}}},
        {"training": {"seed": 3}},
    ):
        assert without_seeds(recipe) != without_seeds({**other, **changed})
    first, second = make(seed=0), make(seed=1)
    for number, run in enumerate((first, second)):
        run.recipe["data"] = {"seed": number}
    assert [len(verdict.runs) for verdict in results_by_recipe([first, second])] == [1, 1]


def test_autoattack_on_more_images_of_one_seed_is_shown_where_it_has_judged_all_seeds() -> None:
    (verdict,) = results_by_recipe([settled(bare(seed=0), 30, 60), settled(bare(seed=1), 12, 40)])
    assert verdict.autoattack is not None
    assert (verdict.autoattack.n, verdict.autoattack.accuracy) == (40, pytest.approx((30 / 40 + 12 / 40) / 2))
    assert verdict.runs[0].stale == verdict.runs[1].stale
    assert "judged 60, 40 images of its seeds; shown are the 40 in all of them" in verdict.runs[0].stale[0]
    apart = settled(bare(seed=1), 12, 40)
    apart.verdict_outcomes["index"] += 300
    with pytest.raises(UnmovedError, match="none in common"):
        results_by_recipe([settled(bare(seed=0), 30, 60), apart])


def test_a_seed_twice_or_mixed_weights_are_refused() -> None:
    with pytest.raises(UnmovedError, match=r"each seed once, came .0, 0."):
        results_by_recipe([make(), make()])
    last = make(seed=1)
    last.evaluation["weights"] = "last"
    with pytest.raises(UnmovedError, match="'best', 'last'"):
        results_by_recipe([make(), last])
    with pytest.raises(UnmovedError, match="at least one run"):
        results_by_recipe([])


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    program = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=program, args=[*quiet.split(), "--disable-component-update", "--disable-sync"]
        )
        yield chromium
        chromium.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_stands_in_a_browser(browser: Any, written: Path, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, reduced_motion="reduce")
    tab = context.new_page()
    requests: list[str] = []
    complaints: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(written.as_uri())
    rows = tab.locator(".ranking tbody tr")
    assert [text.split() for text in rows.locator("th").all_inner_texts()] == [["digits/at", "best"], ["digits/plain"]]
    assert rows.nth(1).locator("td").nth(1).inner_text().split()[0] == "5.0"
    assert tab.locator("figure svg:visible").count() == 1
    tab.evaluate("document.querySelectorAll('main > details').forEach(part => part.open = true)")
    pictures = tab.locator("figure svg.figure")
    assert pictures.count() == 9
    for k in range(9):
        pictures.nth(k).scroll_into_view_if_needed()
        box = pictures.nth(k).bounding_box()
        assert box["width"] > 220
        assert box["height"] > 100
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.locator("#provenance summary").first.click()
    assert tab.locator("#provenance details").first.get_by_text("unmoved train recipe.toml").is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert [url for url in requests if not url.startswith("data:")] == [written.as_uri()]
    assert complaints == []
    context.close()


@pytest.mark.browser
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_mark_stands_beside_the_number(browser: Any, tmp_path: Path, width: int) -> None:
    sentence = "Do not believe this number: masking."
    run = seen_by_doctor(settled(bare(), 12, 40), finding("do not believe"), sentence=sentence)
    file = report.write([run, bare("b")], tmp_path / "r.html", "x")
    context = browser.new_context(viewport={"width": width, "height": 800})
    tab = context.new_page()
    tab.goto(file.as_uri())
    row, other = (
        tab.locator(".ranking tbody tr", has=tab.get_by_text(name, exact=True)) for name in ("digits/at", "b")
    )
    cell = row.locator("td").nth(1)
    assert cell.inner_text().split()[:2] == ["!", "30.0"]
    words, mark = row.locator(".objection"), cell.locator(".mark")
    assert words.get_by_text(sentence).is_visible()
    for inner in (mark.bounding_box(), words.bounding_box()):
        assert 0 <= inner["x"] < inner["x"] + inner["width"] <= width
    assert words.evaluate("place => place.scrollWidth <= place.clientWidth")
    assert other.locator(".mark, .objection").count() == 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    mark.click()  # what is folded opens
    assert tab.locator("#doctor").bounding_box()["y"] < 800
    assert tab.locator("#doctor .grave").get_by_text("97 % zeros").is_visible()
    context.close()


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten recipes: a base, AutoAttack for two, an objection, a lost class, an analysis with a wide table."""
    runs = [bare(f"digits/method-{k}", robust=40 - 3 * k) for k in range(9)]
    runs[0], runs[1] = settled(runs[0], 20, 40), settled(runs[1], 18, 40)
    runs[2] = seen_by_doctor(runs[2], finding("do not believe"), sentence="Do not believe this number: masking.")
    runs[3] = seen_by_doctor(runs[3], finding("look closer"), sentence="Look closer at this number: masking.")
    runs = [run if run.doctor else seen_by_doctor(run, finding("note")) for run in runs]
    runs.append(replace(make("digits/loses_a_class", robust=27), curve=None))
    lost = runs[9].outcomes
    lost.loc[lost["label"] == 2, "clean_prediction"] = 0
    lost.loc[lost["label"] == 2, ["adversarial_prediction", "success", "by"]] = 0, True, "clean"
    for run in runs:
        run.recipe |= {
            "base": "digits/method-0",
            "description": "What this is, in a sentence of its own (A et al. 2020).",
        }
    table = pd.DataFrame({f"some_column_{k}": ["a_name_that_is_long_and_whole", "b"] for k in range(7)})
    figure = figures.per_class(results_by_recipe([runs[0]])[0].classes)
    section = Section("analysis", "An analysis", ["What it asks.", "What it found."], table, [figure])
    path = tmp_path_factory.mktemp("crowded") / "r.html"
    return report.write(runs, path, "10 recipes, 1 seed", extra=[section])


# Words that a reader cannot see whole: outside of the window, of what they lie in, of the picture; or too faint.
MEASURE = """() => {
    const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const clear = colour => colour === "transparent" || /rgba\\(.*, 0\\)/.test(colour);
    const found = {faint: [], cut: [], words: 0, ratio: 99};
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const place = node.parentElement, picture = place.closest("svg");
        if (!node.textContent.trim() || !place.checkVisibility()) continue;
        let behind = place;
        while (behind && clear(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
        const style = getComputedStyle(place);
        const pair = [light(picture ? style.fill : style.color), light(getComputedStyle(behind).backgroundColor)];
        const ratio = Math.max(...pair) / Math.min(...pair);
        found.words += 1;
        found.ratio = Math.min(found.ratio, ratio);
        if (ratio < 4.5) found.faint.push(node.textContent.trim() + " " + ratio.toFixed(2));
        const range = document.createRange();
        range.selectNodeContents(node);
        const frame = (picture || document.documentElement).getBoundingClientRect();
        const ours = picture ? place.getBoundingClientRect() : range.getBoundingClientRect();
        if (ours.left < frame.left - 1 || ours.right > frame.right + 1) found.cut.push(node.textContent.trim());
    }
    for (const box of document.querySelectorAll(".wide"))
        if (box.checkVisibility() && box.scrollWidth > box.clientWidth + 1) found.cut.push(box.innerText);
    return found;
}"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(400, 900), (1400, 900), (1920, 1080)])
def test_the_page_is_short_legible_and_whole(browser: Any, crowded: Path, width: int, height: int, scheme: str) -> None:
    """Folded, it is at most six screens long, and four answers stand on the first; WCAG 2.1 asks for 4.5 : 1."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(crowded.as_uri())
    assert tab.evaluate("document.documentElement.scrollHeight") <= 6 * height
    if width >= 1400:
        answers = [
            tab.locator(place).bounding_box() for place in ("#summary", ".ranking", ".picture", "#believe", "#next")
        ]
        assert max(box["y"] + box["height"] for box in answers) <= height
    for is_open in (False, True):
        tab.evaluate("open => document.querySelectorAll('details').forEach(part => part.open = open)", is_open)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        seen = tab.evaluate(MEASURE)
        assert (seen["faint"], seen["cut"]) == ([], [])
        assert seen["words"] > (1000 if is_open else 150)
    assert not re.search(r"some_column|in_words|clean_prediction", tab.locator("body").inner_text())
    context.close()


def test_each_table_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs, each with outcomes, a curve and a verdict: nine files, however often they are asked for."""
    runs = [on_disk(tmp_path, settled(fake, 20)) for fake in three()]
    checked, seen = outcomes.checked, []

    def count(table: pd.DataFrame, source: str = "outcomes") -> pd.DataFrame:
        seen.append(source)
        return checked(table, source)

    monkeypatch.setattr(outcomes, "checked", count)
    report.write(runs, tmp_path / "report.html", "three runs")
    screen.print_summary({run.name: run.outcomes for run in runs})
    report.write(runs, tmp_path / "again.html", "the same runs")
    files = [path for run in runs for path in run.path.rglob("*.csv")]
    assert len(files) == 9
    assert sorted(seen) == sorted(map(str, files))
    # Another file is another table, and what somebody did to his table is not in the next one.
    mine = runs[0].outcomes
    assert mine is not None
    mine["label"] = 7
    kept = runs[0].outcomes
    assert kept is not None
    assert kept["label"].max() < 7
    assert len(seen) == 9
    runs[0].save_evaluation(kept.assign(eps=0.2), runs[0].evaluation or {})
    changed = runs[0].outcomes
    assert changed is not None
    assert set(changed["eps"]) == {0.2}


@pytest.mark.browser
def test_the_page_follows_light_and_dark(browser: Any, written: Path) -> None:
    shades = {}
    script = "([where, what]) => getComputedStyle(document.querySelector(where))[what]"
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        tab = context.new_page()
        tab.goto(written.as_uri())
        places = (["body", "backgroundColor"], ["body", "color"], ["#tradeoff svg text", "fill"])
        colors = [re.findall(r"\d+", tab.evaluate(script, place)) for place in places]
        shades[scheme] = [sum(map(int, color[:3])) for color in colors]
        context.close()
    (paper, ink, words), (dark_paper, dark_ink, dark_words) = shades["light"], shades["dark"]
    assert dark_paper < 120 < 600 < paper
    assert ink < 120 < 600 < dark_ink
    assert (words, dark_words) == (ink, dark_ink)  # the figures' own words turn too
