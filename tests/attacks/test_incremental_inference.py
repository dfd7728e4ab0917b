"""Incremental inference: patches give the logits of whole passes, for any leading layers; other models are let be."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unmoved import Batch, ThreatModel
from unmoved.attacks import incremental_inference, square
from unmoved.attacks.incremental_inference import Incremental
from unmoved.attacks.receptive_fields import Reach, Stretch, stretches
from unmoved.attacks.square import Square
from unmoved.attacks.traced_layers import first_layers
from unmoved.core import views
from unmoved.models import preact_resnet18, small_cnn

STACKS = {
    "plain": lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.MaxPool2d(2)],
    "padded": lambda: [nn.Conv2d(2, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 3, 5, padding=2), nn.AvgPool2d(2)],
    "strided": lambda: [nn.Conv2d(2, 4, 4, stride=2, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1)],
    "oblong": lambda: [nn.Conv2d(2, 4, (1, 5), padding=(2, 0)), nn.LeakyReLU(), nn.Conv2d(4, 4, (3, 2), stride=(1, 2))],
    "dilated": lambda: [nn.Conv2d(2, 4, 3, dilation=2, padding=2, groups=2), nn.Tanh(), nn.MaxPool2d(3, 2)],
    "skipping": lambda: [nn.Conv2d(2, 4, 1, stride=3), nn.ELU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)],
    "in place": lambda: [nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(inplace=True), nn.Dropout(0.4)],
}


def network(stack: list[nn.Module], height: int = 13, width: int = 11) -> nn.Module:
    features = nn.Sequential(*stack).double().eval()
    for layer in features:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    size = features(torch.zeros(1, 2, height, width, dtype=torch.float64)).numel()
    return nn.Sequential(features, nn.Flatten(), nn.Linear(size, 5)).double().eval()


def layers_of(model: nn.Module, x: torch.Tensor) -> list:
    with torch.no_grad(), first_layers(model, x) as layers:
        views.logits(model, x)
    return layers


def with_windows(x, side, top, left):
    new = x.clone()
    for k, (i, j) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
        new[k, :, i : i + side, j : j + side] = torch.rand(x.shape[1], side, side, dtype=x.dtype)
    return new


@pytest.fixture
def everywhere(monkeypatch):
    """Compute all layers in patches, whatever it costs: in one stretch, or in one for each."""

    def use(kind: str) -> None:
        def choose(layers, shape, side):
            reaches = [Reach.of(layers, axis, shape[1 + axis], side) for axis in (0, 1)]
            cuts = [0, len(layers)] if kind == "one" else range(len(layers) + 1)
            return [Stretch.of(layers, i, j, reaches, shape) for i, j in itertools.pairwise(cuts)] if layers else []

        monkeypatch.setattr(incremental_inference, "stretches", choose)

    return use


@pytest.mark.parametrize("kind", ["one", "each"])
@pytest.mark.parametrize("name", STACKS)
def test_patches_give_the_logits_of_whole_passes(name, kind, everywhere, monkeypatch):
    """Windows at every place, several one after the other, with some kept and some of the images left out."""
    monkeypatch.setattr(incremental_inference, "CHECKED", 0)
    everywhere(kind)
    torch.manual_seed(0)
    model = network(STACKS[name]())
    for side in (1, 2, 5):
        places = torch.cartesian_prod(torch.arange(13 - side + 1), torch.arange(11 - side + 1))
        x = torch.rand(len(places), 2, 13, 11, dtype=torch.float64)
        layers = layers_of(model, x)
        assert len(layers) >= 3
        known, (top, left) = Incremental(model, layers, x, side), places.T
        for _ in range(3):
            rows = torch.arange(len(x))
            new = with_windows(x, side, top, left)
            with torch.no_grad():
                assert torch.allclose(known.logits(new, rows, top, left), model(new), rtol=0, atol=1e-12)
            known.accept(rows[::2], rows[::2])
            x[::2] = new[::2]
            keep = torch.nonzero(torch.rand(len(x)) < 0.9).flatten()
            known.take(keep)
            x, order = x[keep], torch.randperm(len(keep))
            top, left = top[order], left[order]
        some = torch.arange(1, len(x), 3)
        new = with_windows(x[some], side, top[some], left[some])
        with torch.no_grad():
            assert torch.allclose(known.logits(new, some, top[some], left[some]), model(new), rtol=0, atol=1e-12)


def test_what_a_window_reaches_is_all_that_changes():
    torch.manual_seed(0)
    model, x = network(STACKS["strided"]()), torch.rand(1, 2, 13, 11, dtype=torch.float64)
    reach = Reach.of(layers_of(model, x), 0, 13, 3)
    for place in range(11):
        new = x.clone()
        new[:, :, place : place + 3] += 1
        changed = torch.nonzero((model[0](new) != model[0](x)).flatten(0, 1).any(2).any(0)).flatten()
        first = int(reach.starts[-1][place])
        assert first <= changed.min() <= changed.max() < first + reach.sizes[-1]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.last = nn.Linear(128, 3)

    def forward(self, x):
        if x.shape[1] != 1 or x.dtype == torch.int64:  # looks at no value
            raise ValueError
        h = F.relu(self.first(x))
        return self.last((h + self.second(h)).flatten(1))


class Peeking(Branching):
    def forward(self, x):
        return super().forward(x if x.max() > 1 else 2 * x)


class Late(Branching):
    def forward(self, x):
        return super().forward(x) + x.mean(dim=(1, 2, 3))[:, None]


def test_layers_end_before_whatever_else_looks_at_their_results():
    x = torch.rand(3, 1, 8, 8)
    assert [layer.function for layer in layers_of(Branching(), x)] == [torch.conv2d, F.relu]
    assert layers_of(Peeking(), x) == []
    assert layers_of(Late(), x) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_cannot_be_watched_have_no_layers():
    x, model = torch.rand(3, 1, 8, 8), Branching()
    model.second.register_forward_hook(lambda module, images, result: None)
    assert layers_of(model, x) == []
    unknown = nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten(), nn.Linear(128, 2))
    assert layers_of(torch.jit.trace(nn.Sequential(nn.ReLU(), *unknown), x), x) == []
    assert layers_of(unknown, x) == []
    assert layers_of(nn.Sequential(nn.BatchNorm2d(1).train(), *unknown), x) == []
    model = Branching()
    model.register_forward_pre_hook(lambda module, images: None)  # of the whole: it sees no result
    assert len(layers_of(model, x)) == 2


def test_it_is_used_where_it_is_worth_it():
    layers = layers_of(small_cnn((1, 28, 28), 10, width=16).eval(), torch.rand(2, 1, 28, 28))
    assert [len(stretch.layers) for stretch in stretches(layers, (1, 28, 28), 3)] == [5]  # up to the pool
    assert stretches(layers, (1, 28, 28), 20) == []
    narrow = layers_of(preact_resnet18((3, 32, 32), 10, width=4).eval(), torch.rand(2, 3, 32, 32))
    assert stretches(narrow, (3, 32, 32), 3) == []


def case(trained, count=40):
    model, batch = trained
    twin = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    twin.load_state_dict(model.state_dict())
    return twin.double().eval(), Batch(batch.x[:count].double(), batch.y[:count])


ATTACK = Square(ThreatModel("linf", 0.12), queries=120)


def test_square_finds_the_same_with_it(trained, everywhere, monkeypatch):
    model, batch = case(trained)
    plain = ATTACK(model, batch)
    everywhere("each")
    model[0].register_forward_hook(lambda module, images, result: None)
    assert torch.equal(ATTACK(model, batch), plain)  # with whole passes
    model[0]._forward_hooks.clear()
    seen = []
    model.register_forward_pre_hook(lambda module, images: seen.append(images[0]))
    patches, compute = [], Incremental._logits
    monkeypatch.setattr(Incremental, "_logits", lambda *given: patches.append(1) or compute(*given))
    assert torch.allclose(ATTACK(model, batch), plain, atol=1e-12)
    assert len(seen) / 2 < len(patches) < 100  # of 119 iterations, some of which share a pass
    assert all(images.min() >= 0 and images.max() <= 1 for images in seen)  # hooks of the whole see true images


@pytest.mark.parametrize("fault", ["false", "fails"])
def test_a_pass_that_disagrees_with_the_whole_one_is_given_up(trained, everywhere, monkeypatch, fault):
    model, batch = case(trained)
    plain = ATTACK(model, batch)
    everywhere("one")
    called, compute = [], Stretch.__call__

    def faulty(self, *given):
        called.append(1)
        if fault == "fails":
            raise RuntimeError
        patches, where = compute(self, *given)
        return patches + 1e-6, where

    monkeypatch.setattr(Stretch, "__call__", faulty)
    assert torch.equal(ATTACK(model, batch), plain)
    assert 1 <= len(called) <= incremental_inference.CHECKED


def test_no_sample_is_left_on_the_word_of_patches(trained, everywhere, monkeypatch):
    model, batch = case(trained)
    easy = ThreatModel("linf", 1e-3)  # nothing breaks
    with torch.no_grad():
        batch = batch.take(model(batch.x).argmax(1) == batch.y)
    everywhere("one")
    monkeypatch.setattr(incremental_inference, "CHECKED", 0)
    asked = []
    monkeypatch.setattr(Incremental, "logits", lambda self, x, *_: asked.append(len(x)) or -model(x))
    monkeypatch.setattr(Incremental, "accept", lambda *_: None)
    confirmed = square._confirmed(views.Views(model, batch), batch.x, torch.ones(len(batch), dtype=torch.bool))
    assert not confirmed.any()
    Square(easy, queries=30)(model, batch)
    assert len(asked) > 10
