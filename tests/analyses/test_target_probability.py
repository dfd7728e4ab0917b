"""The probability of the true class, per class: an exact sum, a case by hand, a population whose parts are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unmoved.analyses.bias_variance import decompose_mse
from unmoved.analyses.target_probability import PARTS, target_probability
from unmoved.core.errors import UnmovedError


def of_truth(values: torch.Tensor, y: torch.Tensor, num_classes: int = 3) -> torch.Tensor:
    """(k, N) probabilities of the true class -> (k, N, K), the rest spread evenly."""
    p = ((1 - values) / (num_classes - 1))[:, :, None].repeat(1, 1, num_classes)
    return p.scatter(2, y.expand(len(values), -1)[:, :, None], values[:, :, None])


def test_by_hand() -> None:
    """Class 0: P = .7 .5 (one image) and .9 .9; class 2: .4 .2."""
    y = torch.tensor([0, 2, 0])
    p = of_truth(torch.tensor([[0.7, 0.4, 0.9], [0.5, 0.2, 0.9]], dtype=torch.float64), y)
    rows = target_probability(p, y, torch.tensor([0.6, 0.5, 0.4])).set_index("class")
    assert rows.index.tolist() == [0, 2]
    first = rows.loc[0]
    assert (first["k"], first["n"], first["q"]) == (2, 2, pytest.approx(0.6))
    assert first["mean"] == pytest.approx(0.75)
    assert first["bias2"] == pytest.approx(0.0625)
    assert first["between_models"] == pytest.approx((0.02 + 0) / 2)  # (.7 - .5)^2 / 2 = .02
    assert first["between_examples"] == pytest.approx(0.15**2 - 0.01 / 2)  # Pbar = .6, .9
    assert first["risk"] == pytest.approx((0.09 + 0.25 + 0.01 + 0.01) / 4)
    assert first["geometric"] == pytest.approx((0.7 * 0.5 * 0.81) ** 0.25)
    assert rows.loc[2, "between_models"] == pytest.approx(0.02)
    assert rows.loc[2, "between_examples"] == pytest.approx(-0.01)  # one image: nothing but its models' spread / k


def test_the_parts_add_up_and_between_models_is_the_squared_error_of_one_number() -> None:
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(3, (90,), generator=draw)
    values = torch.rand(4, 90, generator=draw, dtype=torch.float64)
    p = of_truth(values, y)
    rows = target_probability(p, y)
    np.testing.assert_allclose(rows["risk"], rows["bias2"] + rows["between_models"] + rows["between_examples"])
    assert rows["q"].isna().all()
    for row in rows.itertuples():
        own = y == row[1]
        assert row.risk == pytest.approx(((1 - values[:, own]) ** 2).mean().item())
        assert row.bias2 == pytest.approx((1 - values[:, own].mean().item()) ** 2)
        two = torch.stack([values[:, own], 1 - values[:, own]], dim=2)  # as two classes, each number counts twice
        one = decompose_mse(two, torch.zeros(int(own.sum()), dtype=torch.long))
        assert row.between_models == pytest.approx(one.variance / 2)


def test_a_population_with_known_parts() -> None:
    """P = .5 + u_i + v_{k,i}: both spreads within three standard errors of the truth, for two models already."""
    draw = torch.Generator().manual_seed(1)
    n, found = 400, []
    y = torch.zeros(n, dtype=torch.long)
    for _ in range(100):
        u = 0.2 * (torch.rand(n, generator=draw, dtype=torch.float64) - 0.5)
        v = 0.6 * (torch.rand(2, n, generator=draw, dtype=torch.float64) - 0.5)
        rows = target_probability(of_truth(0.5 + u + v, y), y, bootstraps=0)
        found.append(rows[["between_models", "between_examples"]].iloc[0])
    means, errors = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / 10
    truth = np.array([0.6**2 / 12, 0.2**2 / 12 * (1 - 1 / n)])
    assert (abs(means - truth) < 3 * errors).all()
    assert abs(means[1] + means[0] / 2 - truth[1]) > 10 * errors[1]  # not so without the correction


def test_intervals_hold_the_estimate_and_shrink_with_images() -> None:
    draw, widths = torch.Generator().manual_seed(2), []
    for n in (100, 1600):
        y = torch.zeros(n, dtype=torch.long)
        values = torch.rand(3, n, generator=draw, dtype=torch.float64)
        row = target_probability(of_truth(values, y), y, bootstraps=2000).iloc[0]
        for name in PARTS:
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
        widths.append(row["mean_high"] - row["mean_low"])
        assert widths[-1] == pytest.approx(2 * 1.96 * values.mean(0).std().item() / n**0.5, rel=0.1)
    assert widths[0] > 3 * widths[1]


def test_the_learned_probability_of_several_models_is_their_mean() -> None:
    y = torch.tensor([0, 1, 2])
    p = of_truth(torch.full((2, 3), 0.5, dtype=torch.float64), y)
    q = torch.tensor([[0.2, 0.4, 0.6], [0.4, 0.6, 0.8]], requires_grad=True)
    assert target_probability(p, y, q)["q"].tolist() == pytest.approx([0.3, 0.5, 0.7])
    for bad in (torch.rand(2), torch.rand(3, 3), torch.tensor([-1.0, 0.5, 0.5])):
        with pytest.raises(UnmovedError, match="not its theta"):
            target_probability(p, y, bad)
    with pytest.raises(UnmovedError, match="at least 2 models"):
        target_probability(p[:1], y)
