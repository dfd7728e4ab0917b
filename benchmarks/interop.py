"""Compare other libraries' attacks with ours at equal budgets: the table of docs/coming-from.md.

    make interop
    python benchmarks/interop.py --out digits.csv [--n 200] [--seeds 0,1,2] [--threads 1]
    python benchmarks/interop.py --out mnist.csv --mnist PATH [--n 100] [--seeds 0] [--threads 1]

A small network, adversarially trained on scikit-learn's digits or, with a path, on MNIST; each attack is judged by
`unmoved.evaluate` on the same images. One row per data set, norm, attack, library and seed; a table in Markdown at the
end. A library that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from unmoved import Method, ThreatModel, UnmovedError, attacks, data, evaluate, interop, models, optim, terms, train
from unmoved.core.protocols import Attack
from unmoved.runs.provenance import hardware

PACKAGES = {
    "torchattacks": "torchattacks",
    "foolbox": "foolbox",
    "ART": "adversarial-robustness-toolbox",
    "adv-lib": "adv-lib",
}
Makes = dict[str, Callable[[ThreatModel, int], Attack]]


def apgd_t(ball: ThreatModel, seed: int) -> Attack:
    return attacks.APGD(ball, terms.TargetedDLR(), steps=20, targets=9, until_broken=True, seed=seed)


def linf() -> dict[str, Makes]:
    """Attack -> library -> (ball, seed) -> the attack, with the same steps, step size, starts and targets."""
    step = 0.1  # of eps
    fixed = {
        "torchattacks": lambda b, s, start: interop.from_torchattacks(
            "PGD", b, alpha=step * b.radius, steps=20, random_start=start, seed=s
        ),
        "foolbox": lambda b, s, start: interop.from_foolbox(
            "LinfPGD", b, rel_stepsize=step, steps=20, random_start=start, seed=s
        ),
        "ART": lambda b, s, start: interop.from_art(
            "ProjectedGradientDescentPyTorch", b, eps_step=step * b.radius, max_iter=20, num_random_init=start, seed=s
        ),
        "adv-lib": lambda b, s, start: interop.from_adv_lib(
            "pgd_linf", b, relative_step_size=step, steps=20, random_init=bool(start), seed=s
        ),
    }

    def pgd(b: ThreatModel, s: int, start: int) -> Attack:
        return attacks.PGD(b, steps=20, step_size=step * b.radius, start="uniform" if start else "none", seed=s)

    def started(start: int) -> Makes:
        return {name: lambda b, s, make=make: make(b, s, start) for name, make in {"unmoved": pgd, **fixed}.items()}

    return {
        "PGD-20 from the image": started(0),
        "PGD-20 from a random point": started(1),
        "APGD-CE, 50 steps": apgd_ce(),
        "APGD-T, 20 steps, 9 targets": {
            "unmoved": apgd_t,
            "torchattacks": lambda b, s: interop.from_torchattacks("APGDT", b, steps=20, n_restarts=1, seed=s),
            "adv-lib": lambda b, s: interop.from_adv_lib("apgd_targeted", b, n_iter=20, num_targets=9, seed=s),
        },
        "Square, 500 queries": {
            "unmoved": lambda b, s: attacks.Square(b, queries=500, seed=s),
            "torchattacks": lambda b, s: interop.from_torchattacks(
                "Square", b, n_queries=500, loss="margin", resc_schedule=False, seed=s
            ),
        },
        "Square, 500 queries, schedule stretched": {
            "unmoved": lambda b, s: attacks.Square(b, queries=500, rescale_schedule=True, seed=s),
            "torchattacks": lambda b, s: interop.from_torchattacks(
                "Square", b, n_queries=500, loss="margin", resc_schedule=True, seed=s
            ),
            "ART": lambda b, s: interop.from_art("SquareAttack", b, max_iter=500, seed=s),
        },
    }


def apgd_ce() -> Makes:
    return {
        "unmoved": lambda b, s: attacks.APGD(b, steps=50, until_broken=True, seed=s),
        "torchattacks": lambda b, s: interop.from_torchattacks("APGD", b, steps=50, n_restarts=1, loss="ce", seed=s),
        "ART": lambda b, s: interop.from_art(
            "AutoProjectedGradientDescent", b, max_iter=50, nb_random_init=1, eps_step=2 * b.radius, seed=s
        ),
        "adv-lib": lambda b, s: interop.from_adv_lib("apgd", b, n_iter=50, loss_function="ce", seed=s),
    }


def l2() -> dict[str, Makes]:
    return {
        "PGD-20 from the image": {
            "unmoved": lambda b, s: attacks.PGD(b, steps=20, step_size=0.1 * b.radius, start="none", seed=s),
            "torchattacks": lambda b, s: interop.from_torchattacks(
                "PGDL2", b, alpha=0.1 * b.radius, steps=20, random_start=False, seed=s
            ),
            "foolbox": lambda b, s: interop.from_foolbox(
                "L2PGD", b, rel_stepsize=0.1, steps=20, random_start=False, seed=s
            ),
            "ART": lambda b, s: interop.from_art(
                "ProjectedGradientDescentPyTorch", b, eps_step=0.1 * b.radius, max_iter=20, num_random_init=0, seed=s
            ),
        },
        "APGD-CE, 50 steps": apgd_ce(),
        "DeepFool, 50 steps": {
            "unmoved": lambda b, s: attacks.DeepFool(b, steps=50),
            "torchattacks": lambda b, s: interop.from_torchattacks("DeepFool", b, steps=50, seed=s),
            "foolbox": lambda b, s: interop.from_foolbox("L2DeepFoolAttack", b, steps=50, seed=s),
            "ART": lambda b, s: interop.from_art("DeepFool", b, max_iter=50, epsilon=0.02, seed=s),
            "adv-lib": lambda b, s: interop.from_adv_lib("df", b, steps=50, seed=s),
        },
    }


def trained(source: data.DataSet, eps: float, epochs: int) -> nn.Module:
    """A small convolutional network after PGD training on at most 10,000 images."""
    torch.manual_seed(0)
    model = models.small_cnn(source.shape, len(source.classes), width=8, padding=1, dropout=0.0)
    method = Method(attacks.PGD(ThreatModel("linf", eps), steps=5), terms.CE("adv"))
    split = source.train.take(min(10_000, len(source.train)), seed=0)
    train(model, method, split, epochs=epochs, batch_size=64, optimizer=optim.Adam(lr=2e-3), precision="float32")
    return model.eval()


def stand_ins() -> None:
    """adv-lib imports torchvision and visdom for a distance and for plots; without them, empty modules stand in."""
    for name, attribute in (("torchvision", "models"), ("visdom", "Visdom")):
        try:
            __import__(name)
        except Exception:
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], attribute, None)


def rows_of(
    name: str, model: nn.Module, split: Any, ball: ThreatModel, suite: dict[str, Makes], seeds: list[int]
) -> list[dict[str, Any]]:
    """Judge each attack with each seed, and compare sample by sample with ours of the same seed."""
    rows = []
    for attack, makes in suite.items():
        for seed in seeds:
            ours = None
            for library, make in makes.items():
                try:
                    made = make(ball, seed)
                except UnmovedError as error:
                    print(f"left out: {error}", flush=True)
                    continue
                began = time.monotonic()
                broken = evaluate(model, split, {"it": made}, ball, batch_size=256, workers=1)["success"].to_numpy()
                ours = broken if ours is None else ours
                rows.append(
                    {
                        "data": name,
                        "norm": ball.norm,
                        "eps": ball.radius,
                        "attack": attack,
                        "library": library,
                        "seed": seed,
                        "n": len(split),
                        "broken": broken.mean(),
                        "agrees": (broken == ours).mean(),
                        "seconds": round(time.monotonic() - began, 2),
                    }
                )
                print(pd.Series(rows[-1]).to_dict(), flush=True)
    return rows


def markdown(table: pd.DataFrame) -> str:
    """One line per attack, one column per library: the share broken in percent, and the share that agrees with ours."""
    libraries = ["unmoved", *PACKAGES]
    lines = ["| data, ball | attack | " + " | ".join(libraries) + " |", "|---" * (2 + len(libraries)) + "|"]
    for (name, norm, eps, attack), part in table.groupby(["data", "norm", "eps", "attack"], sort=False):
        cells = []
        for library in libraries:
            mine = part[part["library"] == library]
            share = f"{100 * mine['broken'].mean():.1f}"
            agrees = f" ({100 * mine['agrees'].mean():.1f})" if library != "unmoved" else ""
            cells.append(share + agrees if len(mine) else "")
        lines.append(f"| {name}, {norm} {eps:g} | {attack} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mnist", help="a folder of MNIST's files: MNIST in place of the digits")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    stand_ins()
    if args.mnist:
        source, trained_at, balls, epochs = data.mnist(args.mnist), 0.1, {"linf": 0.2, "l2": 2.0}, 2
    else:
        source, trained_at, balls, epochs = data.digits(test=600), 0.15, {"linf": 0.15, "l2": 0.8}, 15
    model, split = trained(source, trained_at, epochs), source.test.take(args.n, seed=0)
    rows: list[dict[str, Any]] = []
    for norm, suite in (("linf", linf()), ("l2", l2())):
        seeds = [int(seed) for seed in args.seeds.split(",")]
        rows += rows_of(source.name, model, split, ThreatModel(norm, balls[norm]), suite, seeds)
        pd.DataFrame(rows).to_csv(args.out, index=False)
    print(markdown(pd.DataFrame(rows)))
    versions = {name: metadata.version(package) for name, package in PACKAGES.items() if installed(package)}
    print({"torch": torch.__version__, **versions, **hardware(), "threads": torch.get_num_threads()})


def installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
