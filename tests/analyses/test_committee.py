"""The joint model's gradient by hand, its use under attack, and probabilities that leave every model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unmoved.analyses.bias_variance import table
from unmoved.analyses.committee import joint, probabilities
from unmoved.attacks import PGD
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel


def models(count: int = 3, *extra: nn.Module) -> list[nn.Module]:
    torch.manual_seed(0)
    parts = [
        [nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), *extra, nn.Linear(6, 3)] for _ in range(count)
    ]
    return [nn.Sequential(*some).double().eval() for some in parts]


def images(n: int = 7) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 2, 2, generator=draw, dtype=torch.float64), torch.randint(3, (n,), generator=draw)


def test_the_joint_model_is_the_mean_probability_and_so_is_its_gradient() -> None:
    members, (x, y) = models(), images()
    x.requires_grad_(True)
    mean = torch.stack([member(x).softmax(1) for member in members]).mean(0)
    whole = joint(members)(x)
    torch.testing.assert_close(whole.softmax(1), mean)
    torch.testing.assert_close(whole.exp(), mean)
    (expected,) = torch.autograd.grad(-mean.gather(1, y[:, None]).log().sum(), x)
    (found,) = torch.autograd.grad(nn.functional.cross_entropy(whole, y, reduction="sum"), x)
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0
    assert torch.autograd.gradcheck(joint(members), x)
    torch.testing.assert_close(joint(members[:1])(x), members[0](x).log_softmax(1))


def test_very_sure_models_keep_a_finite_gradient() -> None:
    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e4 * torch.cat([x.flatten(1)[:, :1], -x.flatten(1)[:, :1]], dim=1)

    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    loss = -joint([Sure(), Sure()])(x)[:, 1].sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(loss)
    assert gradient.abs().max() == pytest.approx(2e4, rel=1e-3)


def test_the_joint_attack_lowers_the_mean_more_than_an_attack_on_one_and_restores_all() -> None:
    members, (x, y) = models(), images(40)
    members[1].train()
    before = [{name: value.clone() for name, value in member.state_dict().items()} for member in members]
    attack = PGD(ThreatModel("linf", 0.2), steps=20)
    batch = Batch(x, y)

    def risk(x_adv: Tensor) -> float:
        p = probabilities(members, [x_adv] * 3).mean(0)
        return -p.gather(1, y[:, None]).log().mean().item()

    together, alone = attack(joint(members), batch), attack(members[0], batch)
    assert risk(x) < risk(alone) < risk(together)
    assert [member.training for member in members] == [False, True, False]
    for member, state in zip(members, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in member.state_dict().items())
        assert all(weight.grad is None for weight in member.parameters())


def test_probabilities_are_those_of_each_model_on_its_own_images_whatever_the_batch() -> None:
    members, (x, y) = models(), images()
    sets = [x, 1 - x, x / 2]
    expected = torch.stack([member(own).softmax(1) for member, own in zip(members, sets, strict=True)])
    for batch_size in (1, 3, 100):
        found = probabilities(members, sets, batch_size)
        torch.testing.assert_close(found, expected.detach())
        assert not found.requires_grad
    single = probabilities([member.float() for member in members], [own.float() for own in sets])
    assert single.dtype == torch.float64
    assert (single.sum(2) - 1).abs().max() < 1e-12
    assert len(table(single, y, classes=False, bootstraps=5)) == 5


def test_models_and_the_callers_random_state_are_left_as_they_were() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)  # random in eval mode too

    members, (x, _) = models(2, nn.Dropout(0.5), Noisy()), images()
    for member in members:
        member.train()
    members[0][2].eval()
    modes = [module.training for member in members for module in member.modules()]
    before = [value.clone() for member in members for value in member.state_dict().values()]
    state = torch.get_rng_state()
    found = probabilities(members, [x, x], 2)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    assert torch.equal(found, probabilities(members, [x, x], 2)), "whatever the caller has drawn"
    assert modes == [module.training for member in members for module in member.modules()]
    after = [value for member in members for value in member.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    broken = nn.Sequential(Broken()).train()
    with pytest.raises(RuntimeError, match="no"):
        probabilities([broken], [x])
    assert broken[0].training


def test_bad_input() -> None:
    members, (x, _) = models(2), images()
    with pytest.raises(UnmovedError, match="at least one model"):
        joint([])
    for sets, came in (([x], r"sets of \[7\] images for 2"), ([x, x[:3]], r"\[7, 3\]"), (x, "one tensor")):
        with pytest.raises(UnmovedError, match=came):
            probabilities(members, sets)
    for none in ([], [x[:0]]):
        with pytest.raises(UnmovedError, match="length >= 1"):
            probabilities(members[: len(none)], none)
    with pytest.raises(UnmovedError, match="batch_size"):
        probabilities(members, [x, x], 0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 5)).double()
    with pytest.raises(UnmovedError, match=r"same classes, came \[3, 5\]"):
        probabilities([members[0], other], [x, x])


def test_probabilities_are_those_of_float32_inside_autocast() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(8, 1, 4, 4)
    plain = probabilities([model], [x])
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(torch.softmax(model(x).double(), dim=1), plain[0])
        assert torch.equal(probabilities([model], [x]), plain)
