"""Image classifiers of transformers, and stand-ins with their output, as plain modules on [0, 1] images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmoved import Batch, ThreatModel, UnmovedError, attacks, interop
from unmoved.models import Normalize

PROCESSOR = {
    "do_resize": True,
    "size": {"height": 12, "width": 12},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.25, 0.5, 0.5],
}


class Stand(nn.Module):
    """Returns an object with ``.logits``, and keeps what it was given."""

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        self.seen = pixel_values
        return SimpleNamespace(logits=pixel_values.flatten(1)[:, :5], loss=None)


def seen(x: Tensor, **settings: Any) -> Tensor:
    """What reaches the model."""
    model = Stand()
    interop.hugging_face(model, {**PROCESSOR, **settings})(x)
    return model.seen


def test_logits_are_taken_out() -> None:
    x = torch.rand(2, 3, 12, 12)
    assert torch.equal(interop.hugging_face(Stand())(x), x.flatten(1)[:, :5])
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 5))
    assert torch.equal(interop.hugging_face(plain)(x), plain(x))


def test_images_are_normalised_and_of_their_own_size_unchanged() -> None:
    x = torch.rand(2, 3, 12, 12)
    assert torch.equal(seen(x), Normalize([0.5, 0.4, 0.3], [0.25, 0.5, 0.5])(x))
    assert torch.equal(seen(x, do_normalize=False), x)


def test_the_shorter_side_is_resized_and_the_middle_cropped() -> None:
    x = torch.rand(2, 3, 8, 16)
    found = seen(x, size={"shortest_edge": 8}, do_normalize=False, do_center_crop=True, crop_size=6)
    assert torch.equal(found, x[..., 1:7, 5:11])
    assert seen(x, size={"shortest_edge": 16}).shape == (2, 3, 16, 32)
    with pytest.raises(UnmovedError, match="at least 9x9 to crop, came 8x16"):
        seen(x, size={"shortest_edge": 8}, do_center_crop=True, crop_size={"height": 9, "width": 9})


@pytest.mark.parametrize("resample", [0, 2, 3])
def test_resizing_keeps_a_constant_image_and_carries_gradients(resample: int) -> None:
    x = torch.full((1, 3, 7, 5), 0.25, requires_grad=True)
    found = seen(x, resample=resample, do_normalize=False)
    assert found.shape == (1, 3, 12, 12)
    assert torch.allclose(found, torch.full_like(found, 0.25))
    assert torch.autograd.grad(found.sum(), x)[0].sum() == pytest.approx(3 * 144, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rescale_factor": 1 / 127.5}, "expected a processor that divides by 255"),
        ({"rescale_offset": True}, "rescale_offset=True is not known here"),
        ({"do_pad": True}, "do_pad=True is not known here"),
        ({"crop_pct": 0.875}, "crop_pct=0.875 is not known here"),
        ({"resample": 1}, "came resample=1"),
        ({"size": {"longest_edge": 9}}, "expected a size with height and width"),
    ],
)
def test_what_a_processor_does_otherwise_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnmovedError) as caught:
        interop.hugging_face(Stand(), {**PROCESSOR, **settings})
    assert words in str(caught.value)


def test_a_vision_transformer_sees_what_its_processor_makes() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_labels=5,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config).eval()
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    images = torch.randint(256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = processor(images=list(images.numpy()), return_tensors="pt", input_data_format="channels_first")
    whole = interop.hugging_face(model, processor)
    x = images.float() / 255
    # Pillow rounds to bytes after the rows and after the columns: at most one byte, in units of std 0.5.
    inside = whole.normalize(whole._resized(x))
    assert (inside - given["pixel_values"]).abs().max() <= 2.01 / 255
    with torch.no_grad():
        assert torch.allclose(whole(x), model(**given).logits, atol=0.02)
    threat = ThreatModel("linf", 8 / 255)
    y = whole(x).argmax(dim=1)
    x_adv = attacks.PGD(threat, steps=5)(whole, Batch(x, y))
    assert x_adv.shape == x.shape
    threat.check(x_adv, x)
    with torch.no_grad():
        assert (
            F.cross_entropy(whole(x_adv), y, reduction="none") > F.cross_entropy(whole(x), y, reduction="none")
        ).all()
