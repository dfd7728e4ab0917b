"""Load data sets, split them, and draw augmented batches.

A source is a function that returns a `DataSet`; recipes use it by its name, and its parameters are their settings.
"""

from unmoved.data.arrays_npz import arrays
from unmoved.data.augment import Augmentation, Chain, CutMix, Cutout, Flip, PadCrop, augmentation
from unmoved.data.cifar10_data import cifar10
from unmoved.data.dataset import DataSet, Unread
from unmoved.data.digits_data import digits
from unmoved.data.folder_data import folder
from unmoved.data.huggingface import hf
from unmoved.data.mnist_idx import mnist
from unmoved.data.split import ArraySplit, Selection

__all__ = [
    "ArraySplit",
    "Augmentation",
    "Chain",
    "CutMix",
    "Cutout",
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
