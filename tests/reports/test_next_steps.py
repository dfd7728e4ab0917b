from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unmoved.evaluation.estimate import Estimate
from unmoved.reports.next_steps import next_steps


def run(
    name: str, seed: int = 0, *, path: Path | None = None, settled: int = 0, recipe: dict[str, Any] | None = None
) -> Any:
    return SimpleNamespace(
        path=path or Path("runs/a b") / name.replace("/", "-") / f"seed{seed}",
        name=name,
        seed=seed,
        recipe=recipe or {},
        setting=SimpleNamespace(n=100),
        evaluation={"asked": "quick"},
        verdict={"n": settled} if settled else None,
        autoattack="outcomes" if settled else None,
        estimate=None,
        is_of_objects=False,
    )


def result(*runs: Any, unseen: bool = False, trained: bool = True) -> Any:
    said = SimpleNamespace(unseen=list(runs) if unseen else [])
    return SimpleNamespace(runs=runs, doctor_summary=said, is_trained=trained)


def commands(results: list[Any], **options: Any) -> list[str]:
    return [step.command for step in next_steps(results, results, analysed=options.get("analysed", False))]


def test_the_commands_name_the_runs_and_survive_a_shell() -> None:
    best, rival = run("d/at"), run("d/mart", settled=40)
    said = commands([result(best, unseen=True), result(rival)])
    assert said == [
        "unmoved doctor 'runs/a b/d-at/seed0'",
        "for run in 'runs/a b/d-at/seed0' 'runs/a b/d-mart/seed0'; "
        'do unmoved evaluate "$run" --attacks standard; done',
        "unmoved compare 'runs/a b/d-at/seed0/recipe.toml' 'runs/a b/d-mart/seed0/recipe.toml' --seeds 0,1,2 "
        "--attacks quick --out 'runs/a b'",
        "unmoved analyze softmax 'runs/a b/d-at/seed0'",
        "unmoved export 'runs/a b/d-at/seed0'",
    ]
    assert all(shlex.split(command) for command in said)


def test_what_is_done_is_not_asked_for_again() -> None:
    seeds = [run("d/at", seed, settled=100) for seed in (0, 1, 2)]
    assert commands([result(*seeds)], analysed=True) == ["unmoved export 'runs/a b/d-at/seed0'"]
    two = [run("d/at", seed, settled=100) for seed in (4, 7)]
    (more, _) = commands([result(*two)], analysed=True)
    assert "--seeds 4,7,0 " in more


def test_of_a_sample_on_all_images_the_rest_is_offered_and_on_fewer_all_are() -> None:
    sampled = run("d/at")
    for n, why in ((100, "what its sample left out"), (50, "on all 100 images")):
        sampled.estimate = Estimate(n, 20, 0, 0, 10, 1)
        result_of = result(sampled, trained=False)
        (step,) = [s for s in next_steps([result_of], [result_of], analysed=True) if "evaluate" in s.command]
        assert why in step.why


@pytest.mark.parametrize(("path", "out"), [("elsewhere/mine", "runs/seeds"), ("x/d-at/seed0", "x")])
def test_seeds_join_a_comparison_and_nothing_else(path: str, out: str) -> None:
    (command,) = [c for c in commands([result(run("d/at", path=Path(path)))]) if " compare " in c]
    assert command.endswith(f"--out {out}")


def test_a_model_from_elsewhere_is_not_trained_and_its_code_allowed() -> None:
    recipe = {
        "trained": False,
        "model": {"use": "my_models.nets:net", "weights": {"file": "my_files:x"}},
        "data": {"use": "digits"},
        "phases": [{"from_epoch": 1, "attack": {"use": "my_attacks:Mine"}}],
    }
    said = commands([result(run("net", path=Path("judged"), recipe=recipe), trained=False)])
    assert "unmoved evaluate judged --attacks standard --allow my_attacks --allow my_models" in said
    assert not any(" compare " in command for command in said)


def test_what_was_an_object_in_python_is_given_to_no_command_that_must_build_it() -> None:
    ours, theirs = run("d/at"), run("net", path=Path("judged"))
    theirs.is_of_objects = True
    assert commands([result(theirs, unseen=True, trained=False)]) == ["unmoved export judged"]
    both = commands([result(theirs, unseen=True, trained=False), result(ours, unseen=True, trained=False)])
    assert [command for command in both if "judged" in command] == ["unmoved export judged"]
    for name in ("doctor", "evaluate", "analyze"):
        assert any(command.startswith(f"unmoved {name} ") for command in both)
