"""What the documentation shows runs as it stands."""

from __future__ import annotations

import importlib
import re
import tomllib

import pytest
import torch
from helpers.cli import RECIPES, ROOT
from torch import nn

from unmoved.runs import recipe as config
from unmoved.testing import check_term


def blocks(path: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)


def test_the_readme_loop_trains(capsys):
    loop, term = blocks("README.md", "python")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = model[1].weight.clone()
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [(torch.rand(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(2)],
    }
    exec(loop, names)
    assert torch.isfinite(names["result"].loss)
    assert not torch.equal(before, model[1].weight)
    exec(term, names)
    check_term(names["Entropy"]())


def test_the_page_for_a_checkpoint_judges_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    (code,) = blocks("docs/checkpoint.md", "python")
    exec(code, {"model": model, "data": (torch.rand(20, 1, 8, 8), torch.arange(20) % 10)} | {})
    assert "worst case" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()
    (table,) = blocks("docs/checkpoint.md", "toml")
    assert tomllib.loads(table)["model"]["weights"] == "net.pt"


def test_the_guide_trains_without_recipes(capsys):
    (code,) = blocks("docs/guide.md", "python")
    assert "epochs=20" in code
    exec(code.replace("epochs=20", "epochs=1").replace("padding=1", "padding=1, width=2"), {})
    assert "worst case" in capsys.readouterr().out


def test_the_guide_recipe_is_a_recipe():
    (recipe,) = blocks("docs/guide.md", "toml")
    parsed = config.parse(tomllib.loads(recipe))
    assert [start for start, _ in parsed.phase_parts()] == [0, 10]


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs/methods").glob("*.md")))
def test_recipe_lines_of_the_method_pages_parse(page):
    base = tomllib.loads((RECIPES / "digits/trades.toml").read_text())
    for block in blocks(f"docs/methods/{page}", "toml"):
        tables = tomllib.loads(block)
        config.parse({**base, **tables, "objective": base["objective"] | tables.get("objective", {})})


COMING_FROM = "docs/coming-from.md"
NEEDS = {
    "torchattacks": "torchattacks",
    "foolbox": "foolbox",
    "art": "art.attacks.evasion",
    "adv_lib": "adv_lib.attacks",
}


@pytest.mark.parametrize("number", range(len(blocks(COMING_FROM, "python"))))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # foolbox's and ART's own
def test_what_comes_from_other_libraries_runs(number):
    first, code = (blocks(COMING_FROM, "python")[k] for k in (0, number))
    for name in re.findall(r"interop\.(?:from_|to_(?!adv_lib))(\w+)", code):
        try:
            importlib.import_module(NEEDS[name])
        except Exception as error:  # a torchvision that was built for another torch raises RuntimeError
            pytest.skip(f"{NEEDS[name]} does not import: {error}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
        names = {"model": model, "x": torch.rand(8, 1, 8, 8), "y": torch.arange(8)}
    exec(first, names)
    assert 0 <= names["robust"] <= 1
    exec(code, names)
    found = names["x_adv"]
    names["threat"].check(torch.as_tensor(found), names["x"])


def test_attacks_of_other_libraries_in_a_recipe_parse():
    (tables,) = blocks(COMING_FROM, "toml")
    base = tomllib.loads((RECIPES / "digits/trades.toml").read_text())
    config.parse({**base, **tomllib.loads(tables)})


def test_every_link_inside_the_documentation_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
