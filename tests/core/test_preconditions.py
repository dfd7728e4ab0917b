"""The gate: what images, labels and losses have to be, in words that name the likely cause and the mend."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unmoved.core.errors import UnmovedError
from unmoved.core.preconditions import TOLERANCE, require_images, require_labels, require_per_sample, without_waiting

X = torch.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


def one_pixel(value: float) -> Tensor:
    x = X.clone()
    x[1, 2, 3, 0] = value
    return x


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_images_within_the_bounds_pass_up_to_rounding(bounds: tuple[float, float]) -> None:
    low, high = bounds
    x = low + (high - low) * X
    slack = TOLERANCE * (high - low)
    for fine in (x, x.double(), x.half() * 0.99, x - slack / 4, x + slack / 4, x[:0], x[0], x.requires_grad_()):
        require_images(fine, bounds)
    for wrong in (x.detach() - 4 * slack, x.detach() + 4 * slack):
        with pytest.raises(UnmovedError, match="leave it a little"):
            require_images(wrong, bounds)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (X * 255, r"^images: expected pixels in \[0, 1\], came 0 to 255; .* 0\.\.255: divide by 255"),
        (X * 16, r"look like images of 0\.\.16: divide by the largest value that a pixel may have"),
        (X * 1.5, "as after a resize or an augmentation"),
        (X * 65535, "16 bits: divide by 65535"),
        ((X - 0.5) / 0.25, r"came -2 to 2; .* normalised: .* put the normalisation inside the model"),
        ((X * 255 - 120) / 58, "put the normalisation inside the model"),
        (one_pixel(math.nan), "1 of 96 are NaN or infinite: look for a division by zero"),
        (one_pixel(math.inf), "1 of 96 are NaN"),
        (one_pixel(-math.inf), "1 of 96 are NaN"),
        (torch.full_like(X, math.nan), "96 of 96 are NaN"),
        (one_pixel(1.01), r"leave it a little.*clamp\(0, 1\)"),
        (one_pixel(-0.01), "leave it a little"),
    ],
)
def test_images_that_cannot_be(x: Tensor, words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        require_images(x)


@pytest.mark.parametrize(
    ("y", "classes", "words"),
    [
        ([0, 3], 3, r"labels: expected 0\.\.2 for 3 logits, came 3"),
        ([-1, 2], 3, r"labels: expected 0\.\.2, came -1"),
        ([-100, 2], None, r"labels: expected 0\.\.K-1, came -100"),
    ],
)
def test_labels_that_cannot_be(y: list[int], classes: int | None, words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        require_labels(torch.tensor(y), classes)


def test_labels_that_can() -> None:
    require_labels(torch.tensor([0, 2]), 3)
    require_labels(torch.tensor([7]))
    require_labels(torch.tensor([], dtype=torch.int64), 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (lambda v: v.mean(), r"'bad': expected a loss of each sample, floats of shape \(4,\), .* mean over the batch"),
        (lambda v: v[:, None], "squeeze"),
        (lambda v: v[None], "squeeze"),
        (lambda v: v[:, None].expand(4, 3), r"sum over the classes"),
        (lambda v: v[:3], r"shape \(3,\)"),
        (lambda v: v.long(), "int64"),
        (lambda v: (v, v), "came tuple"),
        (lambda v: 1.0, "came float"),
        (lambda v: None, "came NoneType"),
    ],
)
def test_losses_that_cannot_be(values: Callable[[Tensor], object], words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        require_per_sample(values(torch.zeros(4)), 4, "'bad'")


def test_losses_that_can() -> None:
    require_per_sample(torch.zeros(4), 4, "fine")
    require_per_sample(torch.zeros(4, dtype=torch.float64, requires_grad=True), 4, "fine")
    require_per_sample(torch.zeros(0), 0, "fine")


def test_a_device_is_not_waited_for_where_a_step_must_not_wait() -> None:
    # The meta device holds no values: whoever looks at them fails.
    x, y = X.to("meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        require_images(x)
    with without_waiting():
        require_images(x)
        require_labels(y, 3)
    with pytest.raises((RuntimeError, NotImplementedError)):
        require_labels(y, 3)
