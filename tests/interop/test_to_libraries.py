"""Our attacks are called by the conventions of other libraries, and our models work in theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.interop_marks import QUIET, THREAT
from torch import Tensor, nn
from torch.nn import functional as F

from unmoved import Batch, ThreatModel, UnmovedError, attacks, interop
from unmoved.models import Normalize

pytestmark = QUIET
PGD = attacks.PGD(THREAT, steps=5)


def wrong(model: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1) != batch.y


def test_torchattacks_calls_ours(torchattacks: Any, digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    ours = interop.to_torchattacks(PGD, model)
    assert isinstance(ours, torchattacks.attack.Attack)
    assert torch.equal(ours(batch.x, batch.y), PGD(model, batch))
    fgsm = torchattacks.FGSM(model, eps=0.1)
    ours = interop.to_torchattacks(attacks.PGD(THREAT, steps=5, start="none"), model)
    found = torchattacks.MultiAttack([fgsm, ours])(batch.x, batch.y)
    alone = [wrong(model, attack(batch.x, batch.y), batch) for attack in (fgsm, ours)]
    assert (alone[1] & ~alone[0]).any()
    assert torch.equal(wrong(model, found, batch), alone[0] | alone[1])


def test_torchattacks_normalisation_is_attacked_with_the_model(
    torchattacks: Any, digits: tuple[nn.Module, Batch]
) -> None:
    """Their convention: the images come normalised, and go back so; eps is in pixels."""
    model, batch = digits
    mean, std = 0.25, 0.5
    inner = nn.Sequential(Normalize([-mean / std], [1 / std]), model).eval()  # takes normalised images
    whole = nn.Sequential(Normalize([mean], [std]), inner)
    ours = interop.to_torchattacks(PGD, inner)
    ours.set_normalization_used(mean=[mean], std=[std])
    found = ours((batch.x - mean) / std, batch.y) * std + mean
    assert torch.allclose(found, PGD(whole, batch), atol=1e-5)


def test_foolbox_calls_ours(foolbox: Any, digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    fmodel = interop.foolbox_model(model)
    ours = interop.to_foolbox(PGD)
    raw, clipped, success = ours(fmodel, batch.x, batch.y, epsilons=THREAT.radius)
    expected = PGD(model, batch)
    assert torch.equal(raw, expected)
    assert torch.allclose(clipped, expected, atol=1e-6)
    assert torch.equal(success, wrong(model, clipped, batch))
    _, several, success = ours(fmodel, batch.x, foolbox.Misclassification(batch.y), epsilons=[0.02, 0.2])
    assert success.shape == (2, len(batch))
    assert success[0].sum() < success[1].sum()
    for eps, x_adv in zip([0.02, 0.2], several, strict=True):
        assert (x_adv - batch.x).abs().max() <= eps + 1e-6
    assert foolbox.accuracy(fmodel, batch.x, batch.y) == 1.0


def test_foolbox_bounds_are_those_of_its_model(foolbox: Any, digits: tuple[nn.Module, Batch]) -> None:
    """A model on [-1, 1] images: eps is in its units, twice ours."""
    model, batch = digits
    halved = nn.Sequential(Normalize([-1.0], [2.0]), model).eval()
    fmodel = foolbox.PyTorchModel(halved, bounds=(-1, 1), device="cpu")
    deterministic = attacks.PGD(THREAT, steps=5, start="none")
    _, found, _ = interop.to_foolbox(deterministic)(fmodel, 2 * batch.x - 1, batch.y, epsilons=0.2)
    assert torch.allclose((found + 1) / 2, deterministic(model, batch), atol=1e-6)


def test_foolbox_asks_ours_for_the_nearest_image(foolbox: Any, digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    ours = attacks.DeepFool(ThreatModel("l2", 0.5))
    raw, _, success = interop.to_foolbox(ours)(interop.foolbox_model(model), batch.x, batch.y, epsilons=None)
    assert torch.equal(raw, ours(model, batch))
    assert success.float().mean() > 0.9
    assert (raw - batch.x).flatten(1).norm(dim=1).max() > 0.5


def test_foolbox_criteria_with_a_target_are_refused(foolbox: Any, digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    criterion = foolbox.TargetedMisclassification((batch.y + 1) % 10)
    with pytest.raises(UnmovedError, match="expected labels or Misclassification"):
        interop.to_foolbox(PGD)(interop.foolbox_model(model), batch.x, criterion, epsilons=0.1)


def test_art_calls_ours(art: Any, digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    classifier = interop.art_classifier(model, (1, 8, 8), 10)
    ours = interop.to_art(PGD, classifier)
    x, y = batch.x.numpy(), batch.y.numpy()
    expected = PGD(model, batch).numpy()
    for labels in (y, np.eye(10, dtype=np.float32)[y], None):  # all of them are right, so that None is the same
        found = ours.generate(x=x, y=labels)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected)
    assert np.array_equal(classifier.predict(x).argmax(1), y)
    with pytest.raises(UnmovedError, match="expected a PyTorchClassifier, came Sequential"):
        interop.to_art(PGD, model)


def test_art_preprocessing_is_attacked_with_the_model(art: Any, digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    mean, std = 0.25, 0.5
    inner = nn.Sequential(Normalize([-mean / std], [1 / std]), model).eval()
    classifier = art.PyTorchClassifier(
        inner, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1), preprocessing=(mean, std), device_type="cpu"
    )
    found = interop.to_art(PGD, classifier).generate(batch.x.numpy(), batch.y.numpy())
    whole = nn.Sequential(Normalize([mean], [std]), inner)
    assert np.allclose(found, PGD(whole, batch).numpy(), atol=1e-5)


def test_adv_lib_calls_ours_without_adv_lib(digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    ours = interop.to_adv_lib(PGD)
    assert torch.equal(ours(model, batch.x, batch.y), PGD(model, batch))
    assert torch.equal(ours(model=model, inputs=batch.x, labels=batch.y, targeted=False), PGD(model, batch))
    wide = attacks.PGD(ThreatModel("linf", 0.2), steps=5)
    assert torch.equal(ours(model, batch.x, batch.y, eps=0.2), wide(model, batch))
    with pytest.raises(UnmovedError, match="expected targeted=False"):
        ours(model, batch.x, batch.y, targeted=True)


def test_what_is_no_attack_of_ours_is_refused(foolbox: Any) -> None:
    with pytest.raises(UnmovedError, match="to_foolbox: expected something that is called with"):
        interop.to_foolbox(attacks.PGD)
    with pytest.raises(UnmovedError, match="expected one that is built from a threat model"):
        interop.to_foolbox(lambda model, batch: batch.x)
    with pytest.raises(UnmovedError, match=r"model: expected an nn\.Module"):
        interop.foolbox_model(F.relu)


def test_theirs_in_ours_in_theirs_again(torchattacks: Any, foolbox: Any, digits: tuple[nn.Module, Batch]) -> None:
    """An attack of torchattacks, run by foolbox."""
    model, batch = digits
    theirs = interop.from_torchattacks("PGD", THREAT, alpha=0.03, steps=5, random_start=False)
    raw, _, _ = interop.to_foolbox(theirs)(interop.foolbox_model(model), batch.x, batch.y, epsilons=0.1)
    assert torch.allclose(raw, torchattacks.PGD(model, 0.1, 0.03, 5, random_start=False)(batch.x, batch.y), atol=1e-6)
