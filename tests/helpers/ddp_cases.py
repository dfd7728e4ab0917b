"""What one process and two train alike, and the script that each of two processes under torchrun runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from helpers.cli import RECIPE, unmoved
from unmoved import Batch, Method, Run, ThreatModel, UnmovedError, attacks, defenses, terms, train
from unmoved.data import CutMix, Flip
from unmoved.testing import balls_of, default_case, missing, without_case
from unmoved.training import averaging, distributed, optim

CLASSES, SIDE, SAMPLES, BATCH = 5, 6, 13, 4  # the last batch has one sample, fewer than processes
THREAT = ThreatModel("linf", 0.1)


class Doubles:
    """Random images in float64, 13 of them."""

    num_classes, shape = CLASSES, (1, SIDE, SIDE)

    def __len__(self) -> int:
        return SAMPLES

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        made = torch.Generator().manual_seed(7)
        x = torch.rand(SAMPLES, 1, SIDE, SIDE, dtype=torch.float64, generator=made)
        y = torch.randint(0, CLASSES, (SAMPLES,), generator=made)
        order = torch.arange(SAMPLES)
        if shuffle is not None:
            order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(shuffle % 1000))
        for rows in order.split(size):
            yield Batch(x[rows], y[rows], rows)

    def select(self, positions: Tensor) -> Selected:
        return Selected(next(self.batches(SAMPLES)).take(positions))


class Selected(Doubles):
    """The partners of a batch, as one batch."""

    def __init__(self, whole: Batch) -> None:
        self.whole = whole

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        yield self.whole


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * (SIDE - 2) ** 2, CLASSES),
    ).double()


def pgd(**settings: Any) -> Any:
    return attacks.PGD(THREAT, **{"steps": 3, **settings})


class Witness:
    """PGD that remembers on what it ran: in DDP's wrapper its passes would be taken for those of the step."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        self.models.append(model)
        return pgd()(model, batch)

    def update(self, model: nn.Module, batch: Batch, x_adv: Tensor) -> None:
        self.models.append(model)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


@dataclass(frozen=True)
class Agreed:
    """The attack on the labels that the model gives: ensembles leave alone what is wrong, as nearly all is here."""

    attack: Any

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.attack(model, replace(batch, y=model(batch.x).argmax(dim=1)))


# In a ball that large the first part breaks every sample, and the others, which are cases of their own, cost nothing.
LARGE = ThreatModel("linf", 0.5)
ATTACKS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "pgd": pgd,
    "pgd-best": lambda: pgd(keep="best"),
    "pgd-restarts": lambda: pgd(restarts=2),
    "pgd-kl": lambda: pgd(loss=terms.KL(), start="gaussian"),
    "pgd-prsl": lambda: pgd(loss=terms.Sum((1, terms.CE()), (1, terms.PRSL("adv", end=3)))),
    "pgd-l2": lambda: attacks.PGD(ThreatModel("l2", 0.5), steps=3),
    "pgd-l1": lambda: attacks.PGD(ThreatModel("l1", 1.0), steps=3),
    "pgd-train": lambda: pgd(mode="train"),
    "sensible": lambda: pgd(stop=attacks.Sensible(0.2)),
    "friendly": lambda: pgd(stop=attacks.Friendly(1, omega=0.001)),
    "iaat": lambda: attacks.IAAT(THREAT, steps=3, gamma=0.02),
    "apgd": lambda: attacks.APGD(THREAT, steps=6),
    "apgd-targeted": lambda: attacks.APGD(THREAT, terms.TargetedDLR(), steps=4, targets=2),
    "square": lambda: attacks.Square(THREAT, queries=20),
    "spsa": lambda: attacks.SPSA(THREAT, steps=3, samples=4),
    "fab": lambda: attacks.FAB(THREAT, steps=4),
    "fmn": lambda: attacks.FMN(THREAT, steps=5),
    "deepfool": lambda: attacks.DeepFool(THREAT, steps=4),
    "cw": lambda: attacks.CW(ThreatModel("l2", 0.5), steps=5, search_steps=2),
    "hop-skip-jump": lambda: attacks.HopSkipJump(THREAT, queries=100),
    "transfer": lambda: attacks.Transfer(THREAT, source=network()),
    "autoattack": lambda: Agreed(attacks.AutoAttack(LARGE)),
    "quick": lambda: Agreed(attacks.Quick(LARGE)),
    "witness": Witness,
}
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "ce": lambda: terms.CE("adv", label_smoothing=0.1),
    "trades": terms.TRADES,
    "mart": terms.MART,
    "drsl": lambda: terms.Sum((1, terms.CE("clean")), (0.64, terms.DRSL())),
    "prsl": lambda: terms.Sum((1, terms.CE()), (0.5, terms.PRSL("adv", end=3))),
    "global-probability": lambda: terms.Sum((1, terms.CE()), (1, terms.GlobalProbability(CLASSES))),
    "global-probability-ema": lambda: terms.Sum(
        (1, terms.TRADES()), (1, terms.GlobalProbability(CLASSES, update="ema", momentum=0.8))
    ),
}
DEFENSES: dict[str, Callable[[], Any]] = {
    "sam": lambda: defenses.SAM(0.05),
    "asam": lambda: defenses.ASAM(0.2),
    "awp": lambda: defenses.AWP(0.01),
    "apd": lambda: defenses.APD(0.05),
    "apd-linf-sparse": lambda: defenses.APD(0.01, steps=3, p=float("inf"), n=20),
    "apd-relative-last": lambda: defenses.APD(0.02, relative=True, risk="last"),
}


# What is written above are variants, and what needs arguments; every other export is a case as its constructor makes
# it, without being named.
def found(namespace: ModuleType, written: dict[str, Callable[[], Any]], **given: Any) -> dict[str, Callable[[], Any]]:
    makes = without_case(namespace, [make() for make in written.values()], **given)
    return {name: partial(default_case, make, **given) for name, make in makes.items() if not missing(make, given)}


def in_its_ball(make: Callable[..., Any]) -> Any:
    """The attack in the first ball that its constructor takes."""
    return default_case(make, threat=balls_of(make)[0])


ATTACKS |= {
    name: partial(in_its_ball, make)
    for name, make in without_case(attacks, [make() for make in ATTACKS.values()], threat=THREAT).items()
    if not missing(make, ["threat"])
}
OBJECTIVES |= found(terms, OBJECTIVES, num_classes=CLASSES)
DEFENSES |= found(defenses, DEFENSES)


@dataclass
class Case:
    method: Method
    settings: dict[str, Any] = field(default_factory=dict)
    norm: bool = False


def everything() -> Any:
    """Something of all that a training remembers."""
    learned = terms.Sum((1, terms.TRADES()), (1, terms.GlobalProbability(CLASSES)), (0.5, terms.PRSL("adv", end=3)))
    return Method(ATTACKS["iaat"](), learned, defenses.APD(0.05))


def case(method: Callable[[Any], Method], make: Callable[[], Any]) -> Callable[[], Case]:
    return lambda: Case(method(make()))


CASES: dict[str, Callable[[], Case]] = {
    **{f"attack {n}": case(lambda a: Method(a, terms.CE()), make) for n, make in ATTACKS.items()},
    **{f"objective {n}": case(lambda o: Method(pgd(), o), make) for n, make in OBJECTIVES.items()},
    **{f"defense {n}": case(lambda d: Method(pgd(), terms.TRADES(), d), make) for n, make in DEFENSES.items()},
    "everything": lambda: Case(everything()),
    "ema": lambda: Case(Method(pgd(), terms.CE()), {"average": averaging.EMA(0.9)}),
    "cutmix": lambda: Case(Method(pgd(), terms.TRADES()), {"augment": CutMix(Flip())}),
}
# Trained an epoch by as many processes, and another by as many others.
RESUMED = ["everything", "ema", *(name for name in CASES if name.startswith("defense"))]

# The command's, in float32: an l2 attack has no signs, in which rounding would become a step.
MINIATURE = (
    RECIPE.replace('use = "digits"\ntest = 1500', 'use = "arrays"\npath = "random.npz"')
    .replace('norm = "linf"\neps = 0.1', 'norm = "l2"\neps = 0.5')
    .replace('use = "adam"\nlr = 0.01', 'use = "sgd"\nlr = 0.1')
    .replace("epochs = 2", "epochs = 4")
    .replace("[objective.ce]", '[objective.mortal]\nuse = "mortal:CrossEntropy"')
)
# A stranger's term, with which the second process kills itself after the second epoch of the run that DEADLY names.
MORTAL = """
import os, signal
from pathlib import Path
from torch.nn import functional

class CrossEntropy:
    def __call__(self, views):
        log = Path(os.environ.get("DEADLY", "")) / "metrics.jsonl"
        if os.environ.get("LOCAL_RANK") == "1" and log.exists() and log.read_bytes().count(b"\\n") == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return functional.cross_entropy(views.adv, views.y, reduction="none")
"""


def command(name: str) -> list[str]:
    """Of a training into the folder ``name`` beside its recipe, which is where the command has to run."""
    return ["train", "tiny.toml", "--out", name, "--device", "cpu", "--allow", "mortal"]


def trained(case: Case, fabric: Fabric, epochs: int = 2, run: Run | None = None) -> dict[str, Tensor]:
    """The weights after training, and what terms and attacks have learned."""
    model = network(case.norm)
    for _, term in terms_of(case.method):
        term.double()
    torch.set_default_dtype(torch.float64)  # what fabric hands logits on in
    try:
        log = train(
            model,
            case.method,
            Doubles(),
            epochs=epochs,
            batch_size=BATCH,
            optimizer=optim.SGD(lr=0.05),
            fabric=fabric,
            run=run,
            precision="float32",
            **case.settings,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    found = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, term in terms_of(case.method):
        found |= {f"{name}.{key}": value for key, value in term.state_dict().items()}
    if isinstance(case.method.attack, attacks.IAAT):
        found["radius"] = case.method.attack.radius(torch.arange(SAMPLES))
    if isinstance(case.method.attack, Witness):
        found["given"] = torch.tensor([1.0 if given is model else 0.0 for given in case.method.attack.models])
    for name, term in terms_of(case.method):
        if isinstance(term, terms.GlobalProbability):
            found[f"{name}.seen"] = torch.tensor(log[-1]["terms"]["global_probability"]["p_adv_mean"])
    found["log"] = torch.tensor([[record["loss"], record["train_accuracy"]] for record in log], dtype=torch.float64)
    return {name: value.detach().clone() for name, value in found.items()}


def terms_of(method: Method) -> list[tuple[str, nn.Module]]:
    parts = method.objective.terms if isinstance(method.objective, terms.Sum) else ()
    return [(str(k), term) for k, (_, term) in enumerate(parts) if isinstance(term, nn.Module)]


def alone() -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision="64-true")


def main(out: Path) -> None:
    """One of the processes that torchrun started: all cases, then halves of resumed trainings, then the command."""
    torch.set_num_threads(1)
    fabric = distributed.prepare("cpu", precision="64-true")
    first = distributed.rank() == 0
    with distributed.together(fabric):
        results = {name: trained(case(), fabric) for name, case in CASES.items()}
        results["norm"] = trained(Case(Method(pgd(mode="train"), terms.CE()), norm=True), fabric)
        # Begun by two and gone on with by one; begun by one (the test's) and gone on with by two.
        for name in RESUMED:
            for way, epochs in (("by-two", 1), ("by-one", 2)):
                run = Run(out / way / name) if first else None
                results[f"{way} {name}"] = trained(CASES[name](), fabric, epochs, run)
        torch.save(results, out / f"rank{distributed.rank()}.pt")
        with pytest.raises(UnmovedError, match="sync_batchnorm: torch synchronises BatchNorm on GPUs only"):
            trained(Case(Method(None, terms.CE()), {"sync_batchnorm": True}, norm=True), fabric)
        # Last: it finds these processes joined already, and parts them.
        (out / f"said{distributed.rank()}").write_text(unmoved(*command("torchrun")).fine().out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
