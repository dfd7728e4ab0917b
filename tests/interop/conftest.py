"""A trained digits network, and the libraries as they are where they are installed."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unmoved import Batch, data, models


@pytest.fixture(scope="package")
def digits() -> tuple[nn.Module, Batch]:
    """A small convolutional network after two epochs on the digits, and 64 test images that it gets right."""
    source = data.digits(test=500)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.small_cnn(source.shape, len(source.classes), width=4, padding=1, dropout=0.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for epoch in range(4):
            for batch in source.train.batches(64, shuffle=epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(batch.x), batch.y).backward()
                optimizer.step()
    model.zero_grad()
    model.eval()
    batch = next(source.test.batches(500))
    with torch.no_grad():
        right = torch.nonzero(model(batch.x).argmax(dim=1) == batch.y).flatten()
    assert len(right) > 400
    return model, Batch(batch.x[right[:64]], batch.y[right[:64]])


@pytest.fixture(scope="package")
def torchattacks() -> types.ModuleType:
    return pytest.importorskip("torchattacks")


@pytest.fixture(scope="package")
def foolbox() -> types.ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("foolbox")


@pytest.fixture(scope="package")
def art() -> types.ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("art.attacks.evasion")
        return pytest.importorskip("art.estimators.classification")


@pytest.fixture(scope="package")
def adv_lib() -> types.ModuleType:
    """adv-lib imports torchvision and visdom for a distance and for plots; without them, empty modules stand in."""
    pytest.importorskip("adv_lib")
    absent = {}
    for name, attributes in {"torchvision": ("models",), "visdom": ("Visdom",)}.items():
        try:
            __import__(name)
        except Exception:
            absent[name] = types.ModuleType(name)
            for attribute in attributes:
                setattr(absent[name], attribute, types.SimpleNamespace())
    with pytest.MonkeyPatch.context() as patch:
        for name, module in absent.items():
            patch.setitem(sys.modules, name, module)
        return pytest.importorskip("adv_lib.attacks")
