"""Measure curvature at the weights: trace and largest eigenvalue of the Hessian of the loss.

Hessian-vector products are curvlinops' (``pip install 'unmoved[hessian]'``), the Lanczos iteration is scipy's.
"""

from __future__ import annotations

import importlib
import math
import warnings
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pandas as pd
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import nn

from unmoved.analyses.corruption import RANDOM
from unmoved.analyses.flatness import LOSS
from unmoved.analyses.risks import ModelRisk
from unmoved.core.errors import UnmovedError, require_columns, require_number, require_whole


@dataclass(frozen=True)
class Curvature:
    """Hold trace and top eigenvalue of the Hessian H of the mean cross-entropy by the parameters of one scope.

    Attributes:
        scope: of the `ModelRisk`.
        k: parameters.
        trace: tr(H), estimated.
        trace_error: its standard error over the probing vectors.
        top: the largest eigenvalue (not the largest in size: a negative one may be larger).
        images: how many the loss is a mean over.
    """

    scope: str
    k: int
    trace: float
    trace_error: float
    top: float
    images: int


def curvature(
    risk: ModelRisk, *, vectors: int = 30, tolerance: float = 1e-3, iterations: int = 200, seed: int = 0
) -> Curvature:
    """Estimate tr(H) by Hutchinson, ``mean_j v_j.Hv_j`` with random signs v_j, and H's top eigenvalue by Lanczos.

    Exact products with the Hessian of all images, in evaluation mode, one at a time (forward over reverse, so no graph
    of a graph). The vectors come from ``seed``.

    Args:
        vectors: Hutchinson's m, at least 2; his variance is ``2 (||H||_F^2 - sum_i H_ii^2) / m``.
        tolerance: relative accuracy of the eigenvalue.
        iterations: most restarts of Lanczos.

    Raises:
        UnmovedError: curvlinops is not installed; fewer than 2 vectors or 3 parameters; Lanczos did not converge.
    """
    operators = _curvlinops()
    vectors = require_whole("vectors", vectors, at_least=2)
    tolerance = require_number("tolerance", tolerance, above=0)
    iterations = require_whole("iterations", iterations, at_least=1)
    k = sum(t.numel() for t in risk.parameters)
    if k < 3:
        raise UnmovedError(f"curvature: expected at least 3 parameters, came {k}; compute the Hessian itself")
    generator = np.random.default_rng(require_whole("seed", seed, at_least=0))
    first = risk.parameters[0]
    with risk.held(), warnings.catch_warnings():
        # torch's own forward derivatives compile something old at their first use.
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        h = operators.HessianLinearOperator(
            risk.model,
            nn.CrossEntropyLoss(),
            risk.parameters,
            risk.chunks,
            check_deterministic=False,  # the images are fixed and so is the random state, below
            num_data=risk.images,
        )

        def product(v: np.ndarray) -> np.ndarray:
            torch.default_generator.manual_seed(0)
            image = h @ torch.as_tensor(v, dtype=first.dtype, device=first.device)
            return np.asarray(image.detach().cpu().double())

        signs = (2.0 * generator.integers(0, 2, size=k) - 1 for _ in range(vectors))
        samples = np.array([float(v @ product(v)) for v in signs])
        operator = LinearOperator((k, k), matvec=product, dtype=np.float64)
        try:
            top = eigsh(operator, 1, which="LA", v0=generator.standard_normal(k), tol=tolerance, maxiter=iterations)[0]
        except ArpackNoConvergence as error:
            raise UnmovedError(
                f"curvature: Lanczos did not reach tolerance {tolerance:g} in {iterations} restarts; raise one of them"
            ) from error
    error_of_mean = float(samples.std(ddof=1)) / math.sqrt(vectors)
    return Curvature(risk.scope, k, float(samples.mean()), error_of_mean, float(top[0]), risk.images)


def second_order(summary: pd.DataFrame, of: Curvature) -> pd.DataFrame:
    """Set I_ave beside its second-order theory, ``E[DL(r)] = E||r||_2^2 tr(H) / (2k)``, for the scope of ``of``.

    ``||r||_2^2`` is eps^2 for p = 2, with n or without; for p = inf (random signs) it is eps^2 k, or eps^2 n. The
    theory is that of a smooth loss: the kinks of ReLU and max pooling, which the Hessian does not see, change the
    average at the same order, so a gap between the two is not a fault of either.

    Args:
        summary: from `flatness.summarise`, of the same model and images.

    Returns:
        Its rows of measure "loss", kind "random" and that scope, with predicted (to compare with controlled: mean has
        the noise of the slope too), predicted_error (from the standard error of the trace), and predicted_top,
        ``eps^2 top / 2``: I_max to second order for p = 2 where the gradient is 0 (NaN for p = inf).

    Raises:
        UnmovedError: no such row.
    """
    require_columns(summary, ("measure", "kind", "scope", "p", "n", "eps", "mean"), "second_order")
    rows = summary[(summary["measure"] == LOSS) & (summary["kind"] == RANDOM) & (summary["scope"] == of.scope)]
    if rows.empty:
        raise UnmovedError(
            f"second_order: expected random rows of scope {of.scope!r}, came scopes {sorted(set(summary['scope']))}"
        )
    moved = rows["n"].fillna(of.k).where(rows["p"] != 2, 1.0)
    scale = rows["eps"] ** 2 * moved / (2 * of.k)
    top = (rows["eps"] ** 2 * of.top / 2).where(rows["p"] == 2)
    return rows.assign(
        predicted=scale * of.trace, predicted_error=scale * of.trace_error, predicted_top=top
    ).reset_index(drop=True)


def _curvlinops() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations in its own dependencies are not the user's affair
            return importlib.import_module("curvlinops")
    except ImportError as error:
        raise UnmovedError(
            f"curvature: expected the package curvlinops-for-pytorch, came {error}; pip install 'unmoved[hessian]'"
        ) from error
