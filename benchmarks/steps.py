"""Measure what each method adds to a training step, as ratios measured in turn within one run: ``make bench``.

Each row times a step and its base alternately, so that a busy machine slows both; the ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from unmoved import Batch, Method, ThreatModel, attacks, defenses, models, terms, train_step
from unmoved.runs.provenance import hardware

THREAT = ThreatModel("linf", 0.3)
PGD = attacks.PGD(THREAT, steps=10)
TRADES = attacks.PGD(THREAT, loss=terms.KL(), start="gaussian", steps=10)


def plus(term: object) -> Method:
    return Method(TRADES, terms.Sum((1.0, terms.TRADES(6.0)), (0.1, term)))


def rows() -> list[tuple[str, Method, Method, float, float]]:
    """(name, step, base, copies of the base it may cost, bar)."""
    trades, at = Method(TRADES, terms.TRADES(6.0)), Method(PGD, terms.CE())
    outer = Method(None, terms.CE("clean"))
    # Too small a ball to change a prediction, so that no sample is stopped at its noisy start either.
    tiny = ThreatModel("linf", 1e-4)
    small = Method(attacks.PGD(tiny, steps=10), terms.CE())

    def stopping(rule: object, threat: ThreatModel = THREAT) -> Method:
        return Method(attacks.PGD(threat, steps=10, stop=rule), terms.CE())

    return [
        ("TRADES + DRSL", plus(terms.DRSL()), trades, 1, 1.03),
        ("TRADES + PRSL", plus(terms.PRSL()), trades, 1, 1.03),
        ("TRADES + global probability", plus(terms.GlobalProbability(10)), trades, 1, 1.03),
        ("sensible PGD, nothing stops", stopping(attacks.Sensible(1e-30), tiny), small, 1, 1.05),
        ("sensible PGD, c = 0.5", stopping(attacks.Sensible(0.5)), at, 1, 1.0),
        ("friendly PGD, nothing stops", stopping(attacks.Friendly(10), tiny), small, 1, 1.05),
        ("friendly PGD, tau = 0", stopping(attacks.Friendly(0)), at, 1, 1.0),
        ("APD, K = 1", Method(None, terms.CE("clean"), defenses.APD(0.01, steps=1)), outer, 2, 1.05),
        ("APD, K = 2", Method(None, terms.CE("clean"), defenses.APD(0.01, steps=2)), outer, 3, 1.05),
        ("APD, K = 3", Method(None, terms.CE("clean"), defenses.APD(0.01, steps=3)), outer, 4, 1.05),
    ]


def batch_that_the_model_gets_right(model: torch.nn.Module) -> Batch:
    """Random images labelled by the model, so that stopping rules have right samples to work on."""
    x = torch.rand(128, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return Batch(x, model.eval()(x).argmax(dim=1))


def seconds(method: Method, state: dict[str, torch.Tensor], batch: Batch) -> float:
    """One step from the same weights each time; a learning rate of zero keeps the work the same."""
    model = build(state)
    learned = [p for term in terms.sum.stateful(method.objective) for p in term.parameters()]
    optimizer = torch.optim.SGD([*model.parameters(), *learned], lr=0.0, momentum=0.9)
    model.train()
    begin = time.perf_counter()
    train_step(model, method, optimizer, batch, precision="float32")
    return time.perf_counter() - begin


def build(state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    model = models.small_cnn((1, 28, 28), 10, dropout=0.0).to(memory_format=torch.channels_last)
    if state is None:
        for p in model.parameters():  # the last layer starts at zero, where there is nothing to attack
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=0.1)
    else:
        model.load_state_dict(state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-steps.json"))
    options = parser.parse_args()
    model = build()
    state, batch = model.state_dict(), batch_that_the_model_gets_right(model)
    results = []
    print(f"{'step':32}{'ms':>8}{'base ms':>9}{'ratio':>8}{'bar':>7}")
    for name, method, base, copies, bar in rows():
        seconds(method, state, batch)
        rounds = max(options.rounds, round(options.rounds * 0.5 / seconds(base, state, batch)))  # short steps: more
        pairs = [(seconds(method, state, batch), seconds(base, state, batch)) for _ in range(rounds)]
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / (copies * b) for a, b in pairs)
        results.append({"step": name, "seconds": ours, "base": theirs, "copies": copies, "ratio": ratio, "bar": bar})
        verdict = "" if ratio <= bar else "  MISSED"
        print(f"{name:32}{1e3 * ours:8.1f}{1e3 * copies * theirs:9.1f}{ratio:8.3f}{bar:7.2f}{verdict}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"hardware": hardware(), "torch": torch.__version__, "rounds": options.rounds, "rows": results}
    options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
