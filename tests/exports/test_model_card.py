"""The model card: what other programs read of it are the figures, and its code loads the weights that were judged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.cli import unmoved
from markdown_it import MarkdownIt

from unmoved import models
from unmoved.data import digits
from unmoved.evaluation import outcomes
from unmoved.exports import model_card
from unmoved.runs import records
from unmoved.runs.folder import Run


class Page(HTMLParser):
    """The cells of each table, and the texts of headings and items."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.texts: dict[str, list[str]] = {"h1": [], "h2": [], "h3": [], "li": [], "p": []}
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open.remove(tag)

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            if tag in ("td", "th"):
                self.tables[-1][-1][-1] += data
            elif tag in self.texts:
                self.texts[tag][-1] += data


def parts(export: Path) -> tuple[dict[str, Any], Page]:
    """The metadata and the page of a card, by parsers that are not ours."""
    text = (export / "README.md").read_text(encoding="utf-8")
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), Page(MarkdownIt("commonmark").enable("table").render(body))


def test_a_sampled_verdict_has_its_interval_wherever_its_figure_stands(sampled: Path, tmp_path: Path) -> None:
    said = unmoved("export", sampled, "--out", tmp_path / "out").fine()
    assert "AutoAttack was asked about a sample, and the export says so" in said.out
    metadata, page = parts(tmp_path / "out")
    estimate = records.estimate(Run(sampled).sampled)
    assert estimate is not None
    left, ends = f"{100 * estimate.left / estimate.n:.1f} %", [100 * share for share in estimate.population]
    interval, name = "{:.1f} to {:.1f} %".format(*ends), "AutoAttack (standard), sampled"
    opening = next(words for words in page.texts["p"] if words.startswith("By AutoAttack"))
    assert opening.startswith(f"By AutoAttack (standard), sampled: an estimated {left} of 30 images (")
    assert f"95 % interval {interval})" in opening
    row = page.tables[1][-1]
    assert (row[0], row[3:]) == (name, [left, interval])
    (metric,) = [m for m in metadata["model-index"][0]["results"][0]["metrics"] if "AutoAttack" in m["name"]]
    assert metric["name"] == f"Accuracy, {name} (linf, eps 0.1)"
    assert metric["args"]["interval_95"] == [round(share, 6) for share in estimate.population]
    assert metric["args"]["interval_95_of_these_images"] == [round(end / estimate.n, 6) for end in estimate.interval]
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text.count(left) == 2  # those two, each beside its interval
    assert "AutoAttack did not judge this model" not in text


def test_the_tables_are_the_outcomes(judged: Path, export: Path) -> None:
    _, page = parts(export)
    own, verdict = page.tables
    for table, counted in ((own, Run(judged).outcomes), (verdict, Run(judged).verdict_outcomes)):
        rows = outcomes.summary(counted).to_dict("records")
        if len(rows) == 3:  # one attack is the worst case itself
            rows = rows[:2]
        assert table[0] == ["measure", "eps", "right", "accuracy", "95 % interval"]
        assert [line[2:] for line in table[1:]] == [
            [
                f"{row['correct']} of {row['n']}",
                f"{100 * row['accuracy']:.1f} %",
                f"{100 * row['low']:.1f} to {100 * row['high']:.1f} %",
            ]
            for row in rows
        ]
    assert [line[0] for line in own[1:]] == ["clean", "pgd (PGD)", "quick (Quick)", "worst case over these attacks"]
    assert [line[0] for line in verdict[1:]] == ["clean", "AutoAttack (standard)"]
    row = outcomes.summary(Run(judged).verdict_outcomes).iloc[-1]
    low, high = (f"{100 * end:.1f}" for end in (row.low, row.high))
    assert f"{100 * row.accuracy:.1f} % of 8 images (95 % interval {low} to {high} %)" in page.texts["p"][1]
    assert page.texts["h3"] == ["By attacks of the user's choice, n = 30", "By AutoAttack (standard), n = 8"]


def test_the_metadata_are_the_figures(judged: Path, export: Path) -> None:
    metadata, _ = parts(export)
    assert "license" not in metadata
    assert "datasets" not in metadata, "scikit-learn's digits are no data set of the hub"
    assert metadata["library_name"] == "unmoved"
    assert "linf-robustness" in metadata["tags"]
    (model,) = metadata["model-index"]
    (result,) = model["results"]
    assert (model["name"], result["task"]["type"]) == ("tiny", "image-classification")
    assert result["dataset"] == {"type": "digits", "name": "digits", "split": "test"}
    rows = [
        row
        for table in (Run(judged).outcomes, Run(judged).verdict_outcomes)
        for row in outcomes.summary(table).to_dict("records")
    ]
    assert [(m["type"], m["value"], m["args"]["n"]) for m in result["metrics"]] == [
        ("accuracy", pytest.approx(row["accuracy"], abs=1e-6), row["n"]) for row in rows
    ]
    for metric, row in zip(result["metrics"], rows, strict=True):
        assert metric["args"]["interval_95"] == pytest.approx([row["low"], row["high"]], abs=1e-6)


def test_the_hubs_own_reader_finds_the_figures(export: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard((export / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=False)
    assert card.data.library_name == "unmoved"
    assert card.data.model_name == "tiny"
    found = card.data.eval_results
    assert len(found) == 7
    assert {(one.task_type, one.dataset_type, one.metric_type) for one in found} == {
        ("image-classification", "digits", "accuracy")
    }
    (autoattack,) = (one for one in found if one.metric_name == "Accuracy, AutoAttack (standard) (linf, eps 0.1)")
    assert autoattack.metric_args["n"] == 8


def load(export: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the card's code where its weights are, and return its model."""
    (code,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(export)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


def test_its_code_loads_the_weights_that_were_judged(
    judged: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(export, monkeypatch)
    table = Run(judged).outcomes
    assert table is not None
    clean = table.drop_duplicates("index").set_index("index")["clean_prediction"]
    test = digits(test=1500).test
    batch = next(test.batches(len(test)))
    rows = [batch.index.tolist().index(index) for index in clean.index]
    assert not model.training
    with torch.no_grad():
        assert model(batch.x[rows]).argmax(1).tolist() == clean.tolist()


@pytest.mark.parametrize("takes", ["shape, num_classes, deep", "deep, shape=(1, 8, 8)", "deep"])
def test_a_model_of_a_stranger_is_loaded_by_his_own_code(
    export: Path, changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: str
) -> None:
    name = f"my_nets_{len(takes)}"
    (tmp_path / f"{name}.py").write_text(
        f"from unmoved import models\n\ndef small({takes}):\n    return models.mlp((1, 8, 8), 10, hidden=deep)\n",
        encoding="utf-8",
    )
    run = changed(words=('use = "mlp"\nhidden', f'use = "{name}:small"\ndeep'))
    unmoved("export", run, "--out", tmp_path / "out").fine()
    monkeypatch.syspath_prepend(tmp_path)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"from {name} import small" in text
    assert "not part of unmoved" in text
    ours = load(tmp_path / "out", monkeypatch).state_dict()
    theirs = load(export, monkeypatch).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_model_that_came_as_an_object_is_not_built(changed: Callable[..., Path], tmp_path: Path) -> None:
    run = changed(words=('[data]\nuse = "digits"', '[data]\nuse = "python:data"'))
    text = (run / "recipe.toml").read_text(encoding="utf-8").replace('use = "mlp"', 'use = "__main__:Net"')
    (run / "recipe.toml").write_text(text, encoding="utf-8")
    unmoved("export", run).fine()
    card = (run / "export" / "README.md").read_text(encoding="utf-8")
    assert "of class `Net`: build it as its author does" in card
    assert "import Net" not in card
    assert 'models.load_weights(model, "model.safetensors")' in card


def test_normalisation_in_front_of_a_model_is_built_again(
    changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = changed(words=('use = "mlp"', 'use = "mlp"\nnormalize = { mean = [0.5], std = [0.25] }'))
    unmoved("export", run, "--out", tmp_path / "out").fine()
    made = models.normalized(models.mlp((1, 8, 8), 10, hidden=[16]), [0.5], [0.25])
    models.save_weights(made, tmp_path / "out" / "model.safetensors")
    loaded = load(tmp_path / "out", monkeypatch)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded(x), made.eval()(x))


def test_without_a_shape_the_code_has_words_in_its_place(changed: Callable[..., Path]) -> None:
    run = changed("evaluation", "validation")
    facts = json.loads((run / "verdict" / "verdict.json").read_text(encoding="utf-8"))
    del facts["shape"]  # as before evaluations said it
    (run / "verdict" / "verdict.json").write_text(json.dumps(facts), encoding="utf-8")
    unmoved("export", run).fine()
    text = (run / "export" / "README.md").read_text(encoding="utf-8")
    assert "shape=(channels, height, width), num_classes=10" in text
    assert "No file of the run says" in text


@pytest.mark.parametrize(
    "words", ["a|b `c` <script>alert(1)</script>", "*x* [y](z) # 1. _e_", "\\| $a$ ~~b~~ &amp;", "é 日 \U0001f600"]
)
def test_names_are_shown_as_they_are(changed: Callable[..., Path], words: str) -> None:
    run = changed(words=('name = "tiny"', f"name = {json.dumps(words, ensure_ascii=False)}".replace("\\\\", "")))
    name = Run(run).name
    unmoved("export", run).fine()
    metadata, page = parts(run / "export")
    assert page.texts["h1"] == [name]
    assert metadata["model-index"][0]["name"] == name
    assert page.tags.isdisjoint({"script", "em", "a", "del"})


def test_what_it_does_not_say_is_said(changed: Callable[..., Path], export: Path) -> None:
    _, page = parts(export)
    limits = " ".join(page.texts["li"])
    for words in ("no guarantee", "8 images of digits/test", "other norms", "seed 0", "validation images"):
        assert words in limits
    assert "not comparable with figures by AutoAttack" not in limits
    run = changed("verdict", "doctor.json", "validation")
    unmoved("export", run).fine()
    _, page = parts(run / "export")
    assert "not comparable with figures by AutoAttack" in " ".join(page.texts["li"])
    assert "AutoAttack did not judge this model" in " ".join(page.texts["p"])
    assert "Nobody asked it" in " ".join(page.texts["p"])
    assert not any("validation images" in item for item in page.texts["li"])


def test_the_doctors_sentence_stands_beside_the_number(changed: Callable[..., Path]) -> None:
    run = changed()
    doctor = json.loads((run / "doctor.json").read_text(encoding="utf-8"))
    finding = {"check": "masking", "grade": "do not believe", "measured": "97 % zeros", "why": "because", "do": "this"}
    doctor |= {"sentence": "Do not believe this number: masking.", "findings": [finding]}
    (run / "doctor.json").write_text(json.dumps(doctor), encoding="utf-8")
    unmoved("export", run).fine()
    text = (run / "export" / "README.md").read_text(encoding="utf-8")
    number, sentence = (
        text.index("are right while an attacker may move each"),
        text.index("Do not believe this number: masking."),
    )
    assert number < sentence < text.index("## Accuracy")
    assert "- **do not believe**: masking: 97 % zeros" in text


def test_text_is_one_line_without_marks() -> None:
    assert model_card.text("a\nb\t|c*") == r"a b \|c\*"
