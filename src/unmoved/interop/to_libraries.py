"""Call our attacks by the conventions of torchattacks, foolbox, ART and adv-lib, and hand them our models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unmoved.core.batch import Batch, Image, Label, Logits
from unmoved.core.errors import UnmovedError
from unmoved.core.precision import device_of
from unmoved.core.preconditions import require_attack, require_model
from unmoved.core.protocols import Attack, is_minimum_norm, require_in_ball
from unmoved.core.threat import ThreatModel
from unmoved.interop.libraries import ART, FOOLBOX, TORCHATTACKS, load


class _Through(nn.Module):
    """A model of another library as a module; the module inside it, where it is known, is a submodule."""

    def __init__(self, call: Callable[[Image], Logits], model: nn.Module | None = None) -> None:
        super().__init__()
        self.call, self.model = call, model

    def forward(self, x: Image) -> Logits:
        return self.call(x)


def to_torchattacks(attack: Attack, model: nn.Module) -> Any:
    """Return one of our attacks as a ``torchattacks.Attack``: called with (images, labels), returns the images.

    ``set_normalization_used``, ``save`` and ``MultiAttack`` work as with theirs; there is no targeted mode.

    Args:
        attack: made for images in [0, 1].
        model: the model; its mode is the library's business.

    Raises:
        UnmovedError: torchattacks is missing, or something that is no attack or no model.
    """
    require_attack("to_torchattacks", attack)
    require_model(model, "to_torchattacks(attack, model)")
    base = load("torchattacks.attack", TORCHATTACKS.package).Attack

    class Ours(base):  # type: ignore[misc, valid-type]
        """The attack, called by the conventions of torchattacks."""

        def forward(self, inputs: Image, labels: Label) -> Image:
            batch = Batch(inputs.detach().to(self.device), labels.detach().to(self.device))
            return attack(_Through(self.get_logits, self.model), batch)

    return Ours(type(attack).__name__, model)


def to_foolbox(attack: Attack) -> Any:
    """Return one of our attacks as a foolbox attack: ``attack(fmodel, x, y, epsilons=eps)`` -> (raw, clipped, success).

    The radius and the bounds are those of the call and of ``fmodel``; the norm is that of the attack's threat model. An
    attack that seeks the nearest image becomes a ``MinimizationAttack``, which takes ``epsilons=None`` too.

    Raises:
        UnmovedError: foolbox is missing, or the attack is not built from a threat model; at call, a criterion other
            than misclassification.
    """
    require_attack("to_foolbox", attack)
    threat = _threat_of(attack)
    bases = load("foolbox.attacks.base", FOOLBOX.package)
    nearest = is_minimum_norm(attack)
    distances = load("foolbox.distances", FOOLBOX.package)
    eagerpy = load("eagerpy", FOOLBOX.package)

    def run(model: Any, inputs: Any, criterion: Any, eps: float) -> Any:
        x, restore = eagerpy.astensor_(inputs)
        labels = getattr(bases.get_criterion(criterion), "labels", None)
        if labels is None:
            raise UnmovedError(f"to_foolbox: expected labels or Misclassification(labels), came {criterion!r:.80}")
        ball = dataclasses.replace(threat, eps=eps, bounds=(float(model.bounds.lower), float(model.bounds.upper)))
        x_adv = _with(attack, ball)(_Through(model), Batch(x.raw.detach(), labels.raw.long()))
        return restore(eagerpy.astensor(x_adv))

    class Fixed(bases.FixedEpsilonAttack):  # type: ignore[name-defined, misc]
        """The attack within the ball of each epsilon."""

        distance = getattr(distances, threat.norm)

        def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float, **settings: Any) -> Any:
            bases.raise_if_kwargs(settings)
            return run(model, inputs, criterion, epsilon)

    class Nearest(bases.MinimizationAttack):  # type: ignore[name-defined, misc]
        """The attack that seeks the nearest image."""

        distance = getattr(distances, threat.norm)

        def run(
            self, model: Any, inputs: Any, criterion: Any, *, early_stop: float | None = None, **settings: Any
        ) -> Any:
            bases.raise_if_kwargs(settings)
            return run(model, inputs, criterion, threat.radius if early_stop is None else early_stop)

    return (Nearest if nearest else Fixed)()


def to_art(attack: Attack, classifier: Any) -> Any:
    """Return one of our attacks as an ART ``EvasionAttack``: ``attack.generate(x, y)`` on numpy arrays.

    Labels are indices or one-hot; without them, the classifier's own predictions, as ART has it. The classifier's
    preprocessing is attacked with it, and its ``clip_values`` are the bounds of valid images.

    Args:
        attack: built from a threat model.
        classifier: a ``PyTorchClassifier``.

    Raises:
        UnmovedError: ART is missing, another kind of classifier, or an attack that is not built from a threat model.
    """
    require_attack("to_art", attack)
    threat = _threat_of(attack)
    base = load("art.attacks.attack", ART.package).EvasionAttack
    kind = load("art.estimators.classification", ART.package).PyTorchClassifier
    if not isinstance(classifier, kind):
        raise UnmovedError(f"to_art: expected a PyTorchClassifier, came {type(classifier).__name__}")
    if classifier.clip_values is not None:
        low, high = (float(np.min(end)) for end in classifier.clip_values)
        threat = dataclasses.replace(threat, bounds=(low, high))
    bounded = _with(attack, threat)

    class Ours(base):  # type: ignore[misc, valid-type]
        """The attack, called by the conventions of ART."""

        _estimator_requirements = (kind,)

        def generate(self, x: np.ndarray, y: np.ndarray | None = None, **settings: Any) -> np.ndarray:
            guessed = self.estimator.predict(x) if y is None else np.asarray(y)
            labels = guessed.argmax(axis=1) if guessed.ndim == 2 else guessed
            device = self.estimator.device
            images = torch.as_tensor(np.asarray(x, dtype=np.float32), device=device)
            batch = Batch(images, torch.as_tensor(labels, dtype=torch.int64, device=device))
            through = _Through(lambda z: self.estimator._predict_framework(z)[0], self.estimator.model)
            return bounded(through, batch).cpu().numpy()

    return Ours(estimator=classifier)


def to_adv_lib(attack: Attack) -> Callable[..., Tensor]:
    """Return one of our attacks as a function of (model, inputs, labels), as those of adv-lib; adv-lib is not needed.

    The function takes ``eps``, in place of the attack's own, and ``targeted``, which has to be False.

    Raises:
        UnmovedError: something that is no attack; at call, ``targeted=True``.
    """
    require_attack("to_adv_lib", attack)

    def run(
        model: nn.Module, inputs: Image, labels: Label, targeted: bool = False, *, eps: float | None = None
    ) -> Image:
        if targeted:
            raise UnmovedError("to_adv_lib: expected targeted=False: our attacks are handed the true labels")
        own = attack if eps is None else _with(attack, dataclasses.replace(_threat_of(attack), eps=eps))
        return own(model, Batch(inputs.detach(), labels))

    return run


def foolbox_model(model: nn.Module) -> Any:
    """Return a model on [0, 1] images as a foolbox ``PyTorchModel``, on the device that it is on.

    Raises:
        UnmovedError: foolbox is missing, or something that is no model.
    """
    require_model(model, "foolbox_model(model)")
    return load("foolbox", FOOLBOX.package).PyTorchModel(model, bounds=(0.0, 1.0), device=device_of(model))


def art_classifier(model: nn.Module, shape: tuple[int, ...], num_classes: int) -> Any:
    """Return a model on [0, 1] images as an ART ``PyTorchClassifier`` with cross-entropy, on the device that it is on.

    Args:
        model: images (B, *shape) to logits (B, num_classes).
        shape: (C, H, W) of one image.
        num_classes: the number of logits.

    Raises:
        UnmovedError: ART is missing, or something that is no model.
    """
    require_model(model, "art_classifier(model, shape, num_classes)")
    return load("art.estimators.classification", ART.package).PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(shape),
        nb_classes=num_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if device_of(model).type == "cuda" else "cpu",
    )


def _threat_of(attack: Attack) -> ThreatModel:
    """Return the threat model that an attack was built from."""
    require_in_ball("attack", attack)
    threat = getattr(attack, "threat", None)
    if not isinstance(threat, ThreatModel) or not dataclasses.is_dataclass(attack):
        raise UnmovedError(
            f"attack {attack!r:.80}: expected one that is built from a threat model, such as those of unmoved.attacks"
        )
    return threat


def _with(attack: Attack, threat: ThreatModel) -> Attack:
    """Return the same attack on another threat model."""
    return dataclasses.replace(attack, threat=threat)  # type: ignore[type-var]
