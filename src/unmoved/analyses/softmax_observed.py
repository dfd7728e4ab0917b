"""Compute statistics of each sample's wrong-class probabilities, clean and attacked, and what became of the sample.

One row per sample and view; `unmoved.analyses.softmax` asks the questions.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from unmoved.attacks import FMN
from unmoved.core.batch import Batch, Index, Label, Logits, PerSample, Table
from unmoved.core.errors import UnmovedError, require_whole
from unmoved.core.precision import device_of
from unmoved.core.preconditions import require_attack, require_images, require_labels
from unmoved.core.protocols import Attack, Split
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import eval_logits, ranked_wrong
from unmoved.evaluation import judge

STATISTICS = ("variance", "std", "entropy", "gap", "p_true", "margin")
VIEWS = ("clean", "adversarial")
SAMPLE = ("index", "label", "num_classes", "clean_correct", "success", "min_eps", "landed", "landing_rank")
COLUMNS = (*SAMPLE, "view", "prediction", *STATISTICS)


def statistics(logits: Logits, y: Label) -> Table:
    """Compute statistics of the wrong classes, in float64; ``r_j = p_j / (1 - p_y)`` and all sums are over the j != y.

    Args:
        logits: (B, K); a constant added to a row changes nothing.
        y: (B,) int64 labels.

    Returns:
        One row per sample: ``variance``, ``mean (log p_j - mean log p_j)^2``, in nats^2: DRSL's penalty by K - 1;
        ``std``, ``sqrt(mean (p_j - mean p_j)^2)``, which falls with 1 - p_y whatever the shape;
        ``entropy``, ``-sum r_j log r_j``, in nats, at most log(K - 1);
        ``gap``, ``log p_(1) - log p_(2)`` of the two most probable, in nats (a difference of logits, not of
        probabilities); ``p_true``, p_y; ``margin``, ``z_y - max z_j``, negative where misclassified.
        With two classes there is one wrong class, and the first four are 0.

    Raises:
        UnmovedError: shapes that do not fit, labels without a column, or logits that are not finite.
    """
    z, y = _checked_logits(logits, y)
    log_p = torch.log_softmax(z, dim=1)
    is_true = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y[:, None], True)
    true, wrong = log_p[is_true], log_p[~is_true].reshape(len(z), z.shape[1] - 1)
    log_r = torch.log_softmax(wrong, dim=1)
    # One class twice: the gap of one wrong class is 0.
    top = (wrong if wrong.shape[1] > 1 else wrong.expand(-1, 2)).topk(2, dim=1).values
    columns = {
        "variance": wrong.var(dim=1, correction=0),
        "std": wrong.exp().std(dim=1, correction=0),
        "entropy": -(log_r.exp() * log_r).sum(dim=1),
        "gap": top[:, 0] - top[:, 1],
        "p_true": true.exp(),
        "margin": true - top[:, 0],
    }
    return pd.DataFrame({name: column.numpy() for name, column in columns.items()})[list(STATISTICS)]


def observe(
    index: Index,
    y: Label,
    clean_logits: Logits,
    adv_logits: Logits,
    success: Tensor,
    min_eps: PerSample | None = None,
) -> Table:
    """Tabulate the statistics of each sample in both views, and what became of it.

    Args:
        index: (B,) int64 identities.
        y: (B,) int64 labels.
        clean_logits, adv_logits: (B, K).
        success: (B,) bool, misclassified within the ball.
        min_eps: (B,) smallest distance known to be misclassified; inf where there is surely none, NaN where unknown.

    Returns:
        `COLUMNS`, a row per sample and view ("clean", "adversarial"). ``prediction`` is the view's; ``clean_correct``,
        ``success``, ``min_eps``, ``landed`` (the class that the attack lands in) and ``landing_rank`` (its rank among
        the wrong classes by clean logit, 1 the most probable) are the same in both. The last two are NaN where the
        attack did not succeed or the sample was wrong as it was.

    Raises:
        UnmovedError: as `statistics`; a success that the adversarial logits deny.
    """
    (clean, labels), (adv, _) = (_checked_logits(z, y) for z in (clean_logits, adv_logits))
    fell = torch.as_tensor(success).cpu()
    eps = torch.full(labels.shape, torch.nan) if min_eps is None else torch.as_tensor(min_eps).detach().cpu().double()
    for name, column in (("index", torch.as_tensor(index).cpu()), ("success", fell), ("min_eps", eps)):
        if column.shape != labels.shape or (name == "success" and column.dtype != torch.bool):
            raise UnmovedError(
                f"observe: expected {name} of shape {tuple(labels.shape)}{', bool' * (name == 'success')}, "
                f"came {column.dtype} {tuple(column.shape)}"
            )
    if clean.shape != adv.shape:
        raise UnmovedError(f"observe: expected logits of one shape, came {tuple(clean.shape)} and {tuple(adv.shape)}")
    predictions = [z.argmax(dim=1) for z in (clean, adv)]
    if (fell & (predictions[1] == labels)).any():
        raise UnmovedError("observe: expected success only where the adversarial logits are wrong, came one where not")
    right = predictions[0] == labels
    landed = torch.where(fell & right, predictions[1].double(), torch.nan)
    rank = (ranked_wrong(clean, labels) == predictions[1][:, None]).double().argmax(dim=1) + 1.0
    same = {
        "index": torch.as_tensor(index).cpu(),
        "label": labels,
        "num_classes": torch.full_like(labels, clean.shape[1]),
        "clean_correct": right,
        "success": fell,
        "min_eps": eps,
        "landed": landed,
        "landing_rank": torch.where(landed.isnan(), torch.nan, rank),
    }
    shared = pd.DataFrame({name: column.numpy() for name, column in same.items()})
    both = [
        shared.assign(view=view, prediction=prediction.numpy()).join(statistics(z, labels))
        for view, prediction, z in zip(VIEWS, predictions, (clean, adv), strict=True)
    ]
    return pd.concat(both, ignore_index=True)[list(COLUMNS)]


def collect(
    model: nn.Module,
    data: Split | Iterable[Batch],
    attack: Attack,
    threat: ThreatModel,
    *,
    min_norm_attack: Attack | None = None,
    batch_size: int = 128,
) -> Table:
    """Apply `collect_batch` to each batch, and put the tables one below the other.

    Raises:
        UnmovedError: no batch; as `collect_batch`.
    """
    batch_size = require_whole("batch_size", batch_size, at_least=1)
    batches = data if isinstance(data, Iterable) else data.batches(batch_size)
    tables = [collect_batch(model, batch, attack, threat, min_norm_attack) for batch in batches if len(batch)]
    if not tables:
        raise UnmovedError("collect: expected at least one sample, came none")
    return pd.concat(tables, ignore_index=True)


def collect_batch(
    model: nn.Module, batch: Batch, attack: Attack, threat: ThreatModel, min_norm_attack: Attack | None = None
) -> Table:
    """Attack one batch and `observe` it: beside the attacks' is_true passes, one over the clean and two over attacked.

    Both attacks run once, on the samples that the model gets right; one that is wrong as it is has fallen, with
    min_eps 0 and the clean image in both views. Success is a wrong prediction within eps (up to the threat model's
    tolerance). ``min_eps`` is the smaller distance of the two attacks' images, of those that are misclassified: an
    upper bound; NaN where neither is. It decides no success: that is what ``attack`` found alone.

    Args:
        model: images in [0, 1] -> logits; asked in evaluation mode and float32, left as it was found.
        batch: moved to the model's device.
        attack: with a ball of ``threat``; one that declares `minimum_norm` may leave it, and succeeds only within.
        threat: norm, eps and bounds.
        min_norm_attack: `FMN` in the same norm unless given.

    Raises:
        UnmovedError: as `observe`; images out of range; an attack that leaves the threat model.
    """
    require_attack("attack", attack)
    require_threat("threat", threat)
    batch = batch.to(device_of(model))
    require_images(batch.x, threat.bounds)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)  # of a randomised model: what it draws neither depends on the caller nor moves his state
        clean = eval_logits(model, batch.x)
        _checked_logits(clean, batch.y)  # before the long work
        right = clean.argmax(dim=1) == batch.y
        adv, success, rest = clean.clone(), ~right, batch.take(right)
        min_eps = torch.where(right, torch.inf, 0.0).double()
        for k, method in enumerate((attack, min_norm_attack or FMN(threat)) if len(rest) else ()):
            x_adv = judge.propose(model, method, rest, threat, type(method).__name__)
            logits, away = eval_logits(model, x_adv), threat.distance(x_adv, rest.x)
            wrong = logits.argmax(dim=1) != rest.y
            min_eps[right] = torch.where(wrong, torch.minimum(min_eps[right], away), min_eps[right])
            if k == 0:
                adv[right], success[right] = logits, wrong & (away <= threat.radius + threat.tolerance)
    min_eps[min_eps.isinf()] = torch.nan
    return observe(batch.index, batch.y, clean, adv, success, min_eps)


def _checked_logits(logits: Logits, y: Label) -> tuple[Tensor, Tensor]:
    """Check and return both, on the CPU, the logits in float64."""
    z, y = torch.as_tensor(logits).detach().cpu().double(), torch.as_tensor(y).detach().cpu()
    if z.ndim != 2 or z.shape[1] < 2 or y.dtype != torch.int64 or y.shape != z.shape[:1]:
        raise UnmovedError(
            "softmax: expected logits (B, K), K >= 2, and int64 labels (B,), "
            f"came {tuple(z.shape)} and {y.dtype} {tuple(y.shape)}"
        )
    if not torch.isfinite(z).all():
        raise UnmovedError("softmax: expected finite logits, came NaN or infinity; they have no distribution")
    require_labels(y, z.shape[1])
    return z, y
