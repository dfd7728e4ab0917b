"""Files that belong together: a process killed between any two writes leaves the old ones or the new ones, never both.

The kill is real: another process counts what it does to the folder (Python's audit events) and sends itself SIGKILL at
the k-th, for every k until it gets through.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.cli import RECIPE, recipe, unmoved

from unmoved.attacks import PGD, Quick
from unmoved.core import files
from unmoved.core.errors import UnmovedError
from unmoved.data import ArraySplit, digits
from unmoved.evaluation import judge, outcomes
from unmoved.evaluation.journal import Journal
from unmoved.exports.folder import export_run, verify
from unmoved.runs import load
from unmoved.runs.assembly import Assembly
from unmoved.runs.evaluate import evaluate_run, examine_run
from unmoved.runs.evaluated import EvaluatedRun
from unmoved.runs.folder import Run
from unmoved.runs.recipe import parse, read

if not hasattr(os, "fork"):
    pytest.skip("these tests fork", allow_module_level=True)

# argv: folder, what makes it (a module of this file's folder: its function), where copies of it go.
DRIVER = """
import os, shutil, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
import test_files_together
start, act = getattr(test_files_together, sys.argv[2]), getattr(test_files_together, sys.argv[3])
events = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "open")
for k in range(1, 200):
    folder = Path(sys.argv[4]) / str(k)
    folder.mkdir()
    start(folder)
    child = os.fork()
    if child == 0:
        left = k
        def count(event, arguments):
            global left
            if event not in events or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            if isinstance(arguments[0], int) or event == "open" or str(arguments[0]).startswith(str(folder)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        act(folder)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
"""


def killed_everywhere(tmp_path: Path, start: Callable[[Path], None], act: Callable[[Path], None]) -> list[Path]:
    """The folder that ``start`` makes after ``act`` was killed at each of its writes, and at last not at all."""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", DRIVER, here, start.__name__, act.__name__, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    return sorted((path for path in tmp_path.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


# --- a set of files and folders

NAMES = ("a.txt", "b.txt", "below/c.txt")


def old_set(folder: Path) -> None:
    files.write_set(folder, "s", dict.fromkeys(NAMES, b"old"))
    for place, word in (("images", b"old"), (".images-1f", b"new")):
        (folder / place).mkdir()
        (folder / place / "one").write_bytes(word)


def new_set(folder: Path) -> None:
    files.write_set(folder, "s", dict.fromkeys(NAMES, b"new"), {"images": ".images-1f"})


def test_a_set_of_files_is_the_old_one_or_the_new_one_wherever_its_writer_is_killed(tmp_path: Path) -> None:
    folders, seen = killed_everywhere(tmp_path, old_set, new_set), []
    assert len(folders) > 10
    for folder in folders:
        words = {files.latest(folder, "s", name).read_bytes() for name in NAMES}
        assert len(words) == 1, f"{folder.name}: a mixture is read"
        files.finish_set(folder, "s")
        files.remove_leftovers(folder)
        there = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        kept = {} if words == {b"new"} else {".images-1f/one": b"new"}
        assert there == dict.fromkeys([*NAMES, "images/one"], *words) | kept, folder.name
        seen.append(*words)
    assert seen == sorted(seen, reverse=True), "once new, it stays new"
    assert {seen[0], seen[-1]} == {b"old", b"new"}


def test_a_set_that_is_no_folder_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_bytes(b"theirs")
    (tmp_path / ".s.new").symlink_to(tmp_path / "elsewhere")
    files.finish_set(tmp_path, "s")
    assert (tmp_path / "elsewhere" / "a.txt").read_bytes() == b"theirs"


# --- an evaluation: outcomes, curve, gallery, facts, journal, images


def table_of(eps: float) -> pd.DataFrame:
    columns = {
        "index": [0, 1],
        "label": [0, 1],
        "clean_prediction": [0, 1],
        "attack": ["pgd", "pgd"],
        "norm": ["linf", "linf"],
        "eps": [eps, eps],
        "adversarial_prediction": [1, 1],
        "success": [True, False],
        "distance": [eps, eps],
        "by": ["pgd", "none"],
    }
    return pd.DataFrame(columns)[list(outcomes.TYPES)]


def save(folder: Path, eps: float, question: str, **settings: Any) -> None:
    facts = {"n": 2, "weights": "best", "weights_sha256": "0", "attacks": {"pgd": str(eps)}, "question": question}
    image, one = np.full((1, 1, 2, 2), eps, np.float32), np.zeros(1, np.int64)
    labels = dict.fromkeys(("label", "clean_prediction", "adversarial_prediction"), one)
    gallery = {"x": image, "x_adv": image, "attack": np.array(["pgd"]), **labels}
    Run(folder).save_evaluation(table_of(eps), facts, curve=table_of(eps), gallery=gallery, **settings)


def judged_once(folder: Path) -> None:
    Run.create(folder, {"name": "r"})
    save(folder, 0.25, "first")
    kept = folder / "evaluation"
    for place, word in (("adversarial", b"old"), (".adversarial-2e", b"new")):
        (kept / place).mkdir()
        (kept / place / "pgd-00000000.npz").write_bytes(word)
    (kept / "journal.jsonl").write_bytes(b"answers\n")


def judged_again(folder: Path) -> None:
    save(folder, 0.5, "second", images=".adversarial-2e", journal="journal.jsonl")


def test_an_evaluation_is_the_old_one_or_the_new_one_wherever_it_is_killed(tmp_path: Path) -> None:
    seen = []
    for folder in killed_everywhere(tmp_path, judged_once, judged_again):
        for finished in (False, True):
            run = Run.open(folder)
            table, curve, gallery, facts = run.outcomes, run.curve, run.gallery, run.evaluation
            assert table is not None
            assert curve is not None
            assert gallery is not None
            assert facts is not None
            eps = float(table["eps"][0])
            assert facts["attacks"] == {"pgd": str(eps)}
            assert (float(curve["eps"][0]), float(gallery["x"].max())) == (eps, eps)
            if not finished:
                with run.alone():  # as the next command does
                    pass
        kept = folder / "evaluation"
        images = {path.parent.name: path.read_bytes() for path in kept.glob("*adversarial*/*.npz")}
        if eps == 0.5:
            assert images == {"adversarial": b"new"}
            assert not (kept / "journal.jsonl").read_bytes(), "it would go on without the images"
        else:
            assert images == {"adversarial": b"old", ".adversarial-2e": b"new"}
            assert (kept / "journal.jsonl").read_bytes() == b"answers\n", "nothing that was computed is lost"
        assert not [path for path in kept.iterdir() if path.name.endswith((".tmp", ".new"))]
        seen.append(eps)
    assert seen == sorted(seen)
    assert len(set(seen)) == 2


@pytest.mark.parametrize("of", range(1, 6))
def test_a_disk_that_fills_at_any_file_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: int) -> None:
    judged_once(tmp_path / "run")
    before, asked, sync = EvaluatedRun.of(Run(tmp_path / "run")), [], os.fsync

    def full(descriptor: int) -> None:
        asked.append(descriptor)
        if len(asked) == of:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnmovedError, match=r"the disk is full; what was saved before is intact: free some space"):
        judged_again(tmp_path / "run")
    after = EvaluatedRun.of(Run(tmp_path / "run"))
    assert after.outcomes.equals(before.outcomes)
    assert after.evaluation == before.evaluation
    judged_again(tmp_path / "run")
    assert set(EvaluatedRun.of(Run(tmp_path / "run")).outcomes["eps"]) == {0.5}


def test_a_table_of_another_evaluation_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    judged_once(tmp_path / "one")
    judged_once(tmp_path / "two")
    judged_again(tmp_path / "two")
    for name in ("outcomes.csv", "curve.csv", "gallery.npz"):
        run = Run(shutil.copytree(tmp_path / "one", tmp_path / name))
        shutil.copy(tmp_path / "two" / "evaluation" / name, run.path / "evaluation" / name)
        with pytest.raises(UnmovedError, match=rf"{name}: expected what evaluation.json was saved with.*evaluate"):
            EvaluatedRun.of(run)


def test_the_images_of_the_same_question_stay_and_those_of_another_go(tmp_path: Path) -> None:
    judged_once(tmp_path)
    images = tmp_path / "evaluation" / "adversarial"
    save(tmp_path, 0.25, "first")
    assert (images / "pgd-00000000.npz").exists()
    save(tmp_path, 0.25, "another")
    assert not images.exists()


# --- pages: tables, verdict, page and its pictures


def page_of(folder: Path, word: str) -> None:
    from matplotlib.figure import Figure

    from unmoved.analyses.studies.study import Section, Study

    figure = Figure()
    figure.add_subplot().set_title(word)
    figure.set_label(word)
    section = Section("s", "S", [word], None, [figure])
    tables = {"t": pd.DataFrame({"word": [word]})}
    Study("kind", "Title", tables, [word], [section], n=1, runs=["r"], settings={"word": word}).write(folder)


def page_before(folder: Path) -> None:
    page_of(folder, "before")


def page_after(folder: Path) -> None:
    page_of(folder, "after")


def test_an_analysis_is_the_old_one_or_the_new_one_wherever_it_is_killed(tmp_path: Path) -> None:
    names = ("t.csv", "verdict.json", "index.html", "index-figures/s.svg")
    for folder in killed_everywhere(tmp_path, page_before, page_after):
        place = folder / "kind"
        texts = [files.latest(place, "index.html", name).read_bytes() for name in names]
        assert len({b"after" in text for text in texts}) == 1
        page_of(folder, "again")
        assert all(b"again" in (place / name).read_bytes() for name in names)
        assert not list(place.glob(".*.new"))


# --- a question knows by content what it is about


def built_of(**changes: Any) -> Assembly:
    tables = read_tables()
    for key, value in changes.items():
        tables["model"][key] = value
    return Assembly(parse(tables))


def read_tables() -> dict[str, Any]:
    import tomllib

    return {"name": "q", **tomllib.loads(RECIPE)}


def test_a_digest_is_of_every_pixel_label_identity_and_class() -> None:
    images = torch.arange(54, dtype=torch.uint8).reshape(6, 1, 3, 3) % 50
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    split = ArraySplit(images, labels, torch.arange(6), ("0", "1"))
    brighter = images.clone()
    brighter[5, 0, 1, 1] += 1
    others = [
        replace(split, images=brighter),
        replace(split, labels=1 - labels),
        replace(split, index=torch.tensor([0, 1, 2, 3, 4, 6])),
        replace(split, classes=("a", "b")),
        replace(split, images=images.reshape(6, 1, 1, 9)),
        replace(split, images=images.float() / 255),
        split.take(5),
    ]
    assert len({split.digest, *(other.digest for other in others)}) == 8
    rows = torch.tensor([4, 1, 3])
    assert split.select(rows).digest == split.lent(rows).digest != split.lent(rows.flip(0)).digest
    assert replace(split, images=images.clone()).digest == split.digest


def test_a_digest_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from unmoved.data import split as splits

    calls, digest = [], splits._digest
    monkeypatch.setattr(splits, "_digest", lambda *parts: calls.append(parts) or digest(*parts))
    split = ArraySplit(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64), torch.arange(4), ("0",))
    for part in (split, split.lent(torch.tensor([2]))):
        assert {part.digest for _ in range(3)} == {part.digest}
    assert len(calls) == 2


def test_a_question_is_about_the_recipe_and_the_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = built_of()
    split = assembly.data.test
    one = load.data_and_code(assembly, split, ())
    assert load.data_and_code(built_of(), split, ()) == one
    assert load.data_and_code(built_of(mean=[0.25]), split, ()) != one, "the same weights, other answers"
    module = tmp_path / "lab_of_mine.py"
    module.write_text("steps = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("lab_of_mine")
    with_lab = load.data_and_code(assembly, split, ["lab_of_mine"])
    module.write_text("steps = 2\n")
    assert load.data_and_code(assembly, split, ["lab_of_mine"]) != with_lab
    assert load.data_and_code(assembly, split, ()) == one
    monkeypatch.delitem(sys.modules, "lab_of_mine")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a file of images, and beside it two more files: darker images, and the same with other labels."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    y = np.arange(240) % 3
    x = rng.uniform(0, 0.4, (240, 1, 4, 4)).astype(np.float32)
    x[np.arange(240), 0, y, y] += 0.35
    parts = {"x_train": x[:160], "y_train": y[:160], "y_test": y[160:]}
    np.savez(folder / "first.npz", **parts, x_test=x[160:])
    np.savez(folder / "darker.npz", **parts, x_test=x[160:] * 0.6)
    np.savez(folder / "labels.npz", **(parts | {"y_test": (y[160:] + 1) % 3}), x_test=x[160:])
    shutil.copy(folder / "first.npz", folder / "data.npz")
    data = f'use = "arrays"\npath = "{folder / "data.npz"}"\nlayout = "NCHW"'
    text = RECIPE.replace('use = "digits"\ntest = 1500', data).replace("n = 30", "n = 60")
    unmoved("train", recipe(folder, text), "--set", "training.epochs=30", "--out", folder / "run").fine()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    shutil.copy(trained / "first.npz", trained / "data.npz")
    return Run(shutil.copytree(trained / "run", tmp_path / "run"))


class Interrupted(Exception):
    pass


def broken_off(run: Run, monkeypatch: pytest.MonkeyPatch, chunks: int, **settings: Any) -> None:
    """An evaluation that ends after so many chunks, as Ctrl-C ends it."""
    add, written = Journal.add, []

    def once_more(journal: Journal, *answers: Any) -> None:
        if len(written) == chunks:
            raise Interrupted
        written.append(1)
        add(journal, *answers)

    monkeypatch.setattr(Journal, "add", once_more)
    with pytest.raises(Interrupted):
        evaluate_run(run, batch_size=4, **settings)
    monkeypatch.setattr(Journal, "add", add)
    assert (run.path / "evaluation" / "journal.jsonl").exists()


@pytest.mark.parametrize("other", ["darker", "labels"])
def test_a_journal_of_other_images_is_not_gone_on_with(
    trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    fresh = Run(shutil.copytree(run.path, tmp_path / "fresh"))
    broken_off(run, monkeypatch, 6)
    shutil.copy(trained / f"{other}.npz", trained / "data.npz")
    for one in (run, fresh):
        evaluate_run(one, batch_size=4)
    assert (run.path / "evaluation/outcomes.csv").read_bytes() == (fresh.path / "evaluation/outcomes.csv").read_bytes()


def images_of(run: Run) -> dict[int, bytes]:
    """Sample -> the image that broke it."""
    found: dict[int, bytes] = {}
    for path in (run.path / "evaluation" / "adversarial").glob("*.npz"):
        with np.load(path) as arrays:
            for index, image in zip(arrays["index"].tolist(), arrays["x_adv"], strict=True):
                assert index not in found
                found[index] = image.tobytes()
    return found


@pytest.mark.parametrize("before", [True, False])
def test_after_an_interruption_all_images_are_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Also those of chunks that were judged before anybody asked for images, and with other batches after it."""
    whole = Run(shutil.copytree(run.path, tmp_path / "whole"))
    table = evaluate_run(whole, batch_size=4, save_adversarial=True)["evaluation"]
    broken_off(run, monkeypatch, 5, save_adversarial=before)
    assert not (run.path / "evaluation" / "adversarial").exists(), "until all are there"
    evaluate_run(run, batch_size=8, save_adversarial=True)
    broken = set(table["index"][table["by"] == "pgd"])
    assert images_of(run).keys() == images_of(whole).keys() == broken
    assert len(broken) > 0
    assert not list((run.path / "evaluation").glob(".*"))


def test_two_attacks_with_a_part_of_one_name_keep_their_images_apart(run: Run) -> None:
    (assembly, model), kept = load.opened(run, "best", "cpu", ()), set[str]()
    twice = {"one": Quick(assembly.threat), "two": Quick(assembly.threat), "pgd": PGD(assembly.threat, steps=2)}
    judge.evaluate(model, assembly.data.test, twice, assembly.threat, keep=lambda part, *_: kept.add(part))
    assert kept == {"pgd", *(f"{name},{part}" for name in ("one", "two") for part in Quick(assembly.threat).parts(3))}


# --- an export


def exported(folder: Path) -> None:
    run = shutil.copytree(Path(__file__).with_name("before_0_2") / "finished", folder / "run")
    export_run(Run(run), folder / "export", {"venue": "the old one"})


def exported_again(folder: Path) -> None:
    (folder / "run" / "doctor.json").unlink()
    export_run(Run(folder / "run"), folder / "export", {"venue": "the new one"})


def test_an_export_is_the_old_one_or_the_new_one_wherever_its_writer_is_killed(tmp_path: Path) -> None:
    venues = []
    for folder in killed_everywhere(tmp_path, exported, exported_again):
        if (folder / "export" / ".export.new").exists():
            with pytest.raises(UnmovedError, match="killed while its files took their places; export the run again"):
                verify(folder / "export")
            files.finish_set(folder / "export", "export")
        verify(folder / "export")
        told = json.loads((folder / "export" / "evidence.json").read_text())
        assert (told["doctor"] is None) == (told["about"]["venue"] == "the new one")
        venues.append(told["about"]["venue"])
        export_run(Run(folder / "run"), folder / "export")
        verify(folder / "export")
    assert venues == sorted(venues, reverse=True)
    assert set(venues) == {"the old one", "the new one"}


# --- a doctor knows what was judged


def test_a_doctor_who_saw_another_evaluation_is_not_shown(run: Run) -> None:
    evaluate_run(run)
    examine_run(run, n=20)
    assert EvaluatedRun.of(run).doctor is not None
    evaluate_run(run, n=40)
    judged = EvaluatedRun.of(run)
    assert judged.doctor is None
    assert "the doctor's opinion is about other outcomes than the evaluation" in judged.stale[0]
    examine_run(run, n=20)
    assert EvaluatedRun.of(run).doctor is not None


def test_a_doctor_speaks_about_autoattacks_figure_where_that_is_shown(run: Run) -> None:
    evaluate_run(run)
    examine_run(run, n=5)
    evaluate_run(run, attacks="standard", n=4)
    judged = EvaluatedRun.of(run)
    assert judged.doctor is None
    assert "the doctor's opinion is about other outcomes than AutoAttack's" in judged.stale[0]
    assert examine_run(run, n=5)["n"] == 4, "of those that AutoAttack judged"
    assert EvaluatedRun.of(run).doctor is not None
    run.save_weights(Assembly(read(run.path / "recipe.toml")).model(), "best")
    evaluate_run(run)
    assert run.shown == "evaluation", "the verdict is about other weights"


def test_a_verdict_on_data_that_was_replaced_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = digits(test=500).test.images, digits(test=500).test.labels
    command = ("judge", "linear", "--data", "arrays:d.npz", "--eps", "0.1", "--out", "r", "--no-doctor")
    for images, attacks, n in ((x, "standard", 4), (x, "fgsm", 8), (1 - x, "fgsm", 8)):
        np.savez("d.npz", x_train=images, y_train=y, x_test=images, y_test=y)
        unmoved(*command, "--attacks", attacks, "--n", str(n)).fine()
        is_old = images is not x
        assert Run("r").shown == ("evaluation" if is_old else "verdict")
        judged = EvaluatedRun.of(Run("r"))
        assert (judged.verdict is None) == is_old
    assert "AutoAttack's verdict is about other data than the evaluation" in judged.stale[0]


def test_a_doctor_looks_at_the_weights_and_the_images_that_were_judged(trained: Path, run: Run) -> None:
    evaluate_run(run)
    shutil.copy(trained / "darker.npz", trained / "data.npz")
    with pytest.raises(UnmovedError, match=r"expected the images that were evaluated, came others.*unmoved evaluate"):
        examine_run(run, n=20)
    shutil.copy(trained / "first.npz", trained / "data.npz")
    model = Assembly(read(run.path / "recipe.toml")).model()
    run.save_weights(model, "best")
    with pytest.raises(UnmovedError, match=r"expected the weights that were evaluated, came others.*unmoved evaluate"):
        examine_run(run, n=20)
