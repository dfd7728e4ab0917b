"""Sources, splits, on-device batches and augmentation.

A source is a function that returns a `DataSet`; recipes use it by its name, and its parameters are their settings.
"""

from unmoved.data.augment import Augmentation, Chain, Flip, PadCrop, augmentation
from unmoved.data.bundled import digits
from unmoved.data.cifar import cifar10
from unmoved.data.hub import hf
from unmoved.data.idx import mnist
from unmoved.data.images import folder
from unmoved.data.npz import arrays
from unmoved.data.sets import DataSet, Unread
from unmoved.data.splits import ArraySplit, Selection

__all__ = [
    "ArraySplit",
    "Augmentation",
    "Chain",
    "DataSet",
    "Flip",
    "PadCrop",
    "Selection",
    "Unread",
    "arrays",
    "augmentation",
    "cifar10",
    "digits",
    "folder",
    "hf",
    "mnist",
]

SOURCES = ("arrays", "cifar10", "digits", "folder", "hf", "mnist")
