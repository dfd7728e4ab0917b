"""Load the digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

from unmoved.data.dataset import DataSet
from unmoved.data.split import ArraySplit


def digits(*, test: float = 0.25, seed: int = 0) -> DataSet:
    """Load the 1797 handwritten digits of scikit-learn, (1, 8, 8), pixels k/16 kept exact as float32.

    Args:
        test: share in (0, 1) or number of the samples that are held out for testing.
        seed: of that choice; it is stratified by class.

    Raises:
        UnmovedError: a share that leaves one side empty.
    """
    from sklearn.datasets import load_digits  # a third of a second that only these data cost

    source = load_digits()
    names = tuple(str(name) for name in source.target_names)
    samples = ArraySplit.of(source.images / 16, source.target, classes=names, name="digits")
    return DataSet.of(*samples.hold_out(test, seed), name="digits")
