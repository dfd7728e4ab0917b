"""Measure how time, memory and bytes written grow with classes, images, runs, epochs and parameters.

    python benchmarks/growth.py [--only classes,images,report,analysis,epochs,parameters] [--out runs/bench-growth.json]

Each row is a process of its own: seconds of the command alone, MiB of peak memory above what the imports took, and MB
that the process wrote. ``exponent`` is the slope of the logarithms between the first and the last size: 1 is in
proportion, and what is above it grows faster than its input. Networks are as small as they can be: what is measured is
what lies around them. ``share`` of the time went into saving the state, but for the one save at the end of any
training, which took ``last_s``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from training import peak_mib

from unmoved import Method, terms, train
from unmoved.analyses.studies import softmax, study  # noqa: F401 - what commands load later is not what they hold
from unmoved.cli import main as command
from unmoved.data import ArraySplit
from unmoved.reports import report
from unmoved.runs.folder import Run
from unmoved.runs.provenance import hardware
from unmoved.training import checkpoint
from unmoved.training.optim import SGD

SIZES = {
    "classes": (10, 100, 1000),
    "images": (20_000, 100_000, 200_000),
    "report": (10, 50, 150),
    "analysis": (1, 3, 6),
    "epochs": (500, 2000, 5000),
    "parameters": (12_000_000, 50_000_000),
}
WHAT = {
    "classes": "train 50 epochs with a record by class, 2,000 images",
    "images": "train and judge from a file, 3x16x16",
    "report": "a report of as many runs, two seeds a recipe, 1,000 images each",
    "analysis": "analyze softmax on as many runs of 100,000 images",
    "epochs": "train as many epochs of 16 images",
    "parameters": "train and save",
}
SAVES = 1.5  # that the time of a training of "parameters" allows, at 3 % of it, before its last
RECIPE = """name = "{name}"
[data]
use = "arrays"
path = "{path}"
[model]
use = "mlp"
hidden = [4]
[threat]
norm = "linf"
eps = 0.1
[training]
epochs = 1
batch_size = 1000
precision = "float32"
[attack]
use = "pgd"
steps = 1
[objective.ce]
[evaluation]
n = 1000
[evaluation.attacks.pgd]
use = "pgd"
steps = 2
keep = "best"
"""


def images(count: int, classes: int = 10, side: int = 16) -> dict[str, np.ndarray]:
    """Random images and labels of every class."""
    x = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    return {"x": x, "y": np.arange(count) % classes}


def recipe(folder: Path, count: int, name: str = "scale") -> Path:
    """A recipe on a file of as many images to train on, and 1,000 to judge."""
    data = folder / f"{count}.npz"
    if not data.exists():
        train_part, test_part = images(count), images(1000)
        np.savez(
            data,
            **{
                f"{k}_{part}": v for part, held in (("train", train_part), ("test", test_part)) for k, v in held.items()
            },
        )
    path = folder / f"{name}.toml"
    path.write_text(RECIPE.format(name=name, path=data), encoding="utf-8")
    return path


def outcomes(draw: np.random.Generator, attack: str, eps: float, clean: np.ndarray) -> pd.DataFrame:
    """Outcomes in which an attack breaks half of the images that are right."""
    index = np.arange(len(clean))
    label, wrong = index % 10, (index + 1) % 10
    adversarial = np.where((draw.random(len(clean)) < 0.5) | (clean != label), wrong, label)
    table = pd.DataFrame({"index": index, "label": label, "attack": attack, "eps": eps, "norm": "linf"})
    table["clean_prediction"], table["adversarial_prediction"] = clean, adversarial
    table["distance"], table["success"] = eps, adversarial != label
    table["by"] = np.where(clean != label, "clean", np.where(table["success"], attack, "none"))
    return table


def judged(folder: Path, k: int, n: int = 1000) -> Path:
    """A run folder as training and evaluating leave it, without weights: log, outcomes, curve and gallery."""
    path, draw, label = folder / f"run{k:03d}", np.random.default_rng(k), np.arange(n) % 10
    if path.exists():
        return path
    run = Run.create(path, {"name": f"method-{k // 2:03d}", "training": {"seed": k % 2}})
    clean = np.where(draw.random(n) < 0.9, label, (label + 1) % 10)
    x = 0.8 * draw.random((8, 3, 16, 16), dtype=np.float32)
    gallery = {"x": x, "x_adv": x + np.float32(0.1), "attack": np.array(["pgd"] * 8)}
    gallery |= dict.fromkeys(("label", "clean_prediction", "adversarial_prediction"), np.arange(8))
    facts = {"n": n, "weights": "best", "weights_sha256": "0", "split": "test", "seconds": 1.0}
    facts |= {"threat": {"norm": "linf", "eps": 0.1}, "attacks": {"pgd": "PGD()", "square": "Square()"}}
    run.save_evaluation(
        pd.concat([outcomes(draw, attack, 0.1, clean) for attack in ("pgd", "square")], ignore_index=True),
        facts | {"classes": [f"class {c}" for c in range(10)]},
        curve=pd.concat([outcomes(draw, "pgd", 0.025 * step, clean) for step in range(8)], ignore_index=True),
        gallery=gallery,
    )
    for epoch in range(1, 21):
        record = {"epoch": epoch, "step": epoch, "seconds": 5.0 * epoch, "lr": 0.1, "loss": 1 / epoch}
        run.log.add(
            record | {"train_accuracy": 0.6, "validation_clean": 0.8, "validation_robust": 0.4, "validation_n": 9}
        )
    return path


def say(*words: object) -> None:
    """Run a command of ours in this process."""
    sys.argv = ["unmoved", *map(str, words)]
    try:
        code = command()
    except SystemExit as error:
        code = error.code
    if code:
        raise RuntimeError(f"{sys.argv} ended with {code}")


def linear(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))


def trained(folder: Path, count: int, classes: int, epochs: int, method: Method, **settings: Any) -> None:
    torch.manual_seed(0)
    made = images(count, classes, side=4)
    split = ArraySplit.of(made["x"], made["y"], classes=[str(k) for k in range(classes)], layout="NCHW")
    run = Run.create(folder / f"trained-{count}-{classes}-{epochs}", {"name": "x"})
    train(linear(48, classes), method, split, epochs=epochs, optimizer=SGD(lr=0.01), run=run, **settings)


def prepare(what: str, size: int, folder: Path) -> Callable[[], dict[str, float]]:
    """What is to be measured; what it needs is made now."""
    if what == "classes":
        method = Method(None, terms.Sum((1, terms.CE("clean")), (1, terms.GlobalProbability(size, view="clean"))))
        return lambda: trained(folder, 2000, size, 50, method) or {}
    if what == "epochs":
        return lambda: saving(lambda: trained(folder, 16, 2, size, Method(None, terms.CE("clean"))))
    if what == "images":
        path = recipe(folder, size)

        def train_and_judge() -> dict[str, float]:
            say("train", path, "--out", folder / f"images{size}")
            say("evaluate", folder / f"images{size}")
            return {"data_mib": size * 3 * 16 * 16 / 2**20}

        return train_and_judge
    if what == "report":
        runs = [Run.open(judged(folder, k)) for k in range(size)]
        return lambda: report.write(runs, folder / f"report{size}.html", "growth") and {}
    if what == "analysis":
        first = folder / "analysed"
        if not first.exists():
            made = recipe(folder, 100_000)
            for words in (("train", made, "--out", first), ("evaluate", first)):
                subprocess.run([sys.executable, "-m", "unmoved", *map(str, words)], check=True, capture_output=True)
        copies = [folder / f"analysed{size}-{k}" for k in range(size)]  # of their own: what is known is kept in them
        for copy in copies:
            shutil.copytree(first, copy)
        return lambda: say("analyze", "softmax", *copies, "--n", 500, "--out", folder / f"analysis{size}") or {}
    return lambda: saving(lambda: large(size, folder))


def saving(act: Callable[[], None]) -> dict[str, float]:
    """What a training spent on saving its state: its saves but for the last, their share of the time, and the last."""
    spent, spending = list[float](), checkpoint.Budget.spending

    @contextlib.contextmanager
    def watched(budget: checkpoint.Budget) -> Iterator[None]:
        began = time.perf_counter()
        with spending(budget):
            yield
        spent.append(time.perf_counter() - began)

    checkpoint.Budget.spending = watched  # type: ignore[method-assign]
    began = time.perf_counter()
    act()
    return {"saves": len(spent) - 1, "share": sum(spent[:-1]) / (time.perf_counter() - began), "last_s": spent[-1]}


def large(size: int, folder: Path) -> None:
    """Train a network of as many parameters for as long as `SAVES` of its state are allowed for."""
    width = math.isqrt(size)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 2))
    made = images(64, 2, side=2)
    split = ArraySplit.of(made["x"], made["y"], classes=["a", "b"], layout="NCHW")
    how: dict[str, Any] = {"batch_size": 64, "optimizer": SGD(lr=0.0, momentum=0.9), "rehearsal": False}
    method = Method(None, terms.CE("clean"))
    train(model, method, split, epochs=1, **how)
    began = time.perf_counter()
    train(model, method, split, epochs=2, **how)
    an_epoch = (time.perf_counter() - began) / 2
    # Weights, momentum and the best epoch's weights; the budget takes a first save to be twice as slow as guessed.
    seconds = SAVES * 2 * 3 * checkpoint.guessed([p.detach() for p in model.parameters()]) / 0.03
    epochs = max(3, round(seconds / an_epoch))
    train(model, method, split, epochs=epochs, run=Run.create(folder / f"large{size}", {"name": "x"}), **how)


def written() -> float:
    """MB that this process has written so far, where /proc tells."""
    io = Path("/proc/self/io")
    return int(io.read_text(encoding="utf-8").partition("wchar:")[2].split()[0]) / 1e6 if io.exists() else math.nan


def worker(what: str, size: int, folder: Path) -> None:
    act = prepare(what, size, folder)
    before, began, bytes_before = peak_mib(), time.perf_counter(), written()
    with open(os.devnull, "w", encoding="utf-8") as quiet:
        sys.stdout, said = quiet, sys.stdout
        more = act()
        sys.stdout = said
    found = {"seconds": time.perf_counter() - began, "mib": peak_mib() - before, "mb": written() - bytes_before}
    print(json.dumps(found | more))


def exponent(sizes: list[int], values: list[float]) -> float:
    return math.log(max(values[-1], 1e-9) / max(values[0], 1e-9)) / math.log(sizes[-1] / sizes[0])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SIZES), help="which rows, with commas between")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-growth.json"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what in options.only.split(","):
            print(f"{what}: {WHAT[what]}", flush=True)
            found = []
            for size in SIZES[what]:
                asked = [sys.executable, __file__, "--worker", what, str(size), folder]
                done = subprocess.run(asked, check=True, capture_output=True, encoding="utf-8")
                found.append(json.loads(done.stdout.splitlines()[-1]))
                row = found[-1]
                more = "".join(f"  {key} {row[key]:.3g}" for key in list(row)[3:])
                print(f"{size:12,} {row['seconds']:8.2f} s {row['mib']:7.0f} MiB {row['mb']:8.1f} MB{more}", flush=True)
                rows.append({"what": what, "size": size, **row})
            slopes = {key: exponent(list(SIZES[what]), [row[key] for row in found]) for key in ("seconds", "mib", "mb")}
            print(
                "    exponent "
                + "".join(f"{slopes[key]:8.2f}  {unit}" for key, unit in zip(slopes, ("s", "MiB", "MB"), strict=True))
            )
            rows.append({"what": what, "exponents": slopes})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"hardware": hardware(), "torch": torch.__version__, "rows": rows}
    options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
