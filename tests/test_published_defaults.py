"""Settings that papers or their authors' code give are the defaults here: a name alone is the published method."""

from __future__ import annotations

import inspect

import pytest

from unmoved.runs.components import KINDS

PUBLISHED = {  # kind, name, where from -> settings
    ("terms", "trades", "Zhang et al. 2019, CIFAR-10"): {"beta": 6.0},
    ("terms", "mart", "Wang et al. 2020, their code"): {"beta": 5.0},
    ("terms", "guided_complement_entropy", "Chen et al. 2019"): {"alpha": 1 / 3},
    ("terms", "ce", "plain cross-entropy"): {"label_smoothing": 0.0},
    ("defenses", "awp", "Wu et al. 2020, AT-AWP"): {"gamma": 0.01},
    ("defenses", "sam", "Foret et al. 2021"): {"rho": 0.05},
    ("defenses", "asam", "Kwon et al. 2021, CIFAR-10"): {"rho": 0.5, "eta": 0.01},
    ("defenses", "apd", "the reconstruction"): {"steps": 2, "p": 2, "n": None, "relative": False},
    ("stops", "friendly", "Zhang et al. 2020"): {"tau": 0, "omega": 0.0},
    ("attacks", "pgd", "Madry et al. 2018"): {"start": "uniform", "keep": "last", "restarts": 1},
    ("attacks", "apgd", "Croce and Hein 2020"): {"steps": 100, "restarts": 1},
    ("attacks", "fab", "Croce and Hein 2020, in AutoAttack"): {
        "steps": 100, "restarts": 1, "targets": 9, "alpha_max": 0.1, "eta": 1.05, "beta": 0.9,
    },
    ("attacks", "square", "Andriushchenko et al. 2020, in AutoAttack"): {"queries": 5000, "p": 0.8, "restarts": 1},
    ("attacks", "auto_attack", "Croce and Hein 2020"): {"version": "standard"},
    ("attacks", "cw", "Carlini and Wagner 2017"): {"search_steps": 9, "lr": 0.01, "initial_const": 0.001},
    ("attacks", "deep_fool", "Moosavi-Dezfooli et al. 2016"): {"steps": 50, "overshoot": 0.02, "candidates": 10},
    ("attacks", "nfgsm", "de Jorge et al. 2022"): {"k": 2.0},
    ("attacks", "fmn", "Pintor et al. 2021"): {"step_size": 1.0, "gamma": 0.05},
}  # fmt: skip


@pytest.mark.parametrize("part", PUBLISHED, ids=lambda part: part[1])
def test_a_default_is_what_is_published(part: tuple[str, str, str]) -> None:
    kind, name, _ = part
    parameters = inspect.signature(KINDS[kind][name]).parameters
    assert {key: parameters[key].default for key in PUBLISHED[part]} == PUBLISHED[part]
