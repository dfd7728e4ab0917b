from __future__ import annotations

import pytest
import torch
from torch import nn

from unmoved.core.batch import Batch


@pytest.fixture(scope="session")
def trained():
    """A small convolutional network trained on synthetic stripes, and its data: enough for attacks to have work."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(4, (256,), generator=draw)
    x = 0.5 + 0.12 * torch.randn(256, 1, 8, 8, generator=draw)
    for k in range(4):
        x[y == k, :, 2 * k : 2 * k + 2] += 0.35
    x = x.clamp(0, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return model, Batch(x, y)
