"""Measure what stands beside the accuracies of a run of the study: passes, flatness, softmax, spread of p_y."""

from __future__ import annotations

import copy
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from unmoved.analyses import corruption, flatness, softmax
from unmoved.analyses.risks import ModelRisk
from unmoved.attacks import PGD
from unmoved.core.batch import Batch
from unmoved.core.views import eval_logits
from unmoved.runs.assembly import Assembly
from unmoved.runs.folder import Run
from unmoved.runs.load import Opened
from unmoved.terms.sum import stateful
from unmoved.training.step import train_step

IMAGES, CHUNK = 1000, 250
EPS, DRAWS = 0.01, 20  # of corruptions: a share of the weights' norm, as in docs/analyses/corruption.md


def measured(run: Run, ready: Opened) -> dict[str, float]:
    """Return the measures of a run, on `IMAGES` test images.

    ``flatness``: the mean rise of clean cross-entropy over `DRAWS` random corruptions of the weights of size `EPS`, the
    slope's noise taken out (``controlled`` of `flatness.summarise`). ``softmax``: the mean over clean images of the
    variance of log p over the wrong classes (`softmax.statistics`). ``variance``: of p_y over the clean images of a
    class, the mean over classes; ``variance_attacked``: on images attacked by PGD-20.
    """
    assembly, model = ready
    test = assembly.data.test
    batches = list(test.take(min(IMAGES, len(test)), seed=0).batches(CHUNK))
    sweep = corruption.sweep(ModelRisk(model, batches), [EPS], draws=DRAWS, steps=0)
    summary = flatness.summarise(sweep)
    rise = float(summary.loc[summary["measure"] == flatness.LOSS, "controlled"].iloc[0])
    clean = _statistics(model, batches)
    attack = PGD(assembly.threat, steps=20, keep="best", seed=assembly.recipe.training.seed)
    device = next(model.parameters()).device
    moved = [batch.to(device) for batch in batches]
    attacked = _statistics(model, [Batch(attack(model, batch), batch.y, batch.index) for batch in moved])
    forward, backward = passes(assembly, model)
    found = {"flatness": rise, "softmax": float(clean["variance"].mean())}
    found |= {"variance": _by_class(clean), "variance_attacked": _by_class(attacked)}
    return {
        "forward": round(forward, 2),
        "backward": round(backward, 2),
        **{name: float(f"{value:.6g}") for name, value in found.items()},
    }


def _statistics(model: nn.Module, batches: list[Batch]) -> pd.DataFrame:
    device = next(model.parameters()).device
    parts = [
        softmax.statistics(eval_logits(model, batch.x.to(device)), batch.y).assign(label=batch.y.cpu().numpy())
        for batch in batches
    ]
    return pd.concat(parts, ignore_index=True)


def _by_class(statistics: pd.DataFrame) -> float:
    return float(statistics.groupby("label")["p_true"].var(ddof=0).mean())


def passes(assembly: Assembly, model: nn.Module) -> tuple[float, float]:
    """Count forward and backward passes of a training step, in batches; the mean over the epochs.

    Counted on one training batch with the trained weights, which a step of length zero leaves as they are: a stopping
    rule may have let other shares of the samples go on while the network was young.
    """
    recipe, (train, _) = assembly.recipe, assembly.parts()
    network = copy.deepcopy(model).train()
    batch = next(iter(train.batches(recipe.training.batch_size))).to(next(network.parameters()).device)
    counts = {"forward": 0, "backward": 0}

    def forward(module: nn.Module, inputs: Any, logits: Tensor) -> None:
        counts["forward"] += len(logits)
        if logits.requires_grad:
            logits.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        counts["backward"] += len(gradient)

    network.register_forward_hook(forward)
    epochs = recipe.training.epochs
    for epoch in range(epochs):
        method = assembly.phases.at(epoch + 0.5, epochs)
        learned = [p for term in stateful(method.objective) for p in term.parameters()]
        optimizer = torch.optim.SGD([*network.parameters(), *learned], lr=0.0)
        train_step(network, method, optimizer, batch, precision="float32")
    whole = epochs * len(batch)
    return counts["forward"] / whole, counts["backward"] / whole


def hardware_of(run: Run) -> str:
    """Return the processor (and the card) that a run was made on."""
    facts: Any = run.provenance.get("hardware", {})
    return ", ".join(str(facts[key]) for key in ("processor", "vector_instructions", "gpu") if facts.get(key))
