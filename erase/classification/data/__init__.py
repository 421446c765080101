"""Data sets of labelled images for classifiers: built-in ones, CIFAR's own files, image folders, and the hub.

`load` returns a `Dataset` by name or folder; `Images` is what all other modules work on.
"""

from erase.classification.data.augmentation import augment, loader
from erase.classification.data.built_in import digits, drawings
from erase.classification.data.cifar import cifar
from erase.classification.data.folder import image_folder
from erase.classification.data.hub import SOURCES
from erase.classification.data.labelled import Dataset, Images, require_labels
from erase.classification.data.registry import load

__all__ = [
    "SOURCES",
    "Dataset",
    "Images",
    "augment",
    "cifar",
    "digits",
    "drawings",
    "image_folder",
    "load",
    "loader",
    "require_labels",
]
