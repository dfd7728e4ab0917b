"""Work with other libraries: their attacks as ours, our attacks and models as theirs.

torchattacks, foolbox, ART, adv-lib and transformers are imported when first used and are no requirement.
"""

from unmoved.interop.from_libraries import LibraryAttack, from_adv_lib, from_art, from_foolbox, from_torchattacks
from unmoved.interop.hugging_face import HuggingFaceLogits, hugging_face
from unmoved.interop.to_libraries import (
    art_classifier,
    foolbox_model,
    to_adv_lib,
    to_art,
    to_foolbox,
    to_torchattacks,
)

__all__ = [
    "HuggingFaceLogits",
    "LibraryAttack",
    "art_classifier",
    "foolbox_model",
    "from_adv_lib",
    "from_art",
    "from_foolbox",
    "from_torchattacks",
    "hugging_face",
    "to_adv_lib",
    "to_art",
    "to_foolbox",
    "to_torchattacks",
]
