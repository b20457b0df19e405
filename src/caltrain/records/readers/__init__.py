"""Readers of public image formats: npz, idx, Parquet, CIFAR-10's archive, a folder of pictures per class.

Everything that a file says about itself is bounded and checked; nothing is unpickled or extracted.
"""

from caltrain.records.readers.cifar import CIFAR10_CLASSES, read_cifar_archive
from caltrain.records.readers.dataset import Dataset, Split
from caltrain.records.readers.digits import read_digits
from caltrain.records.readers.folder import read_folder
from caltrain.records.readers.idx import read_idx
from caltrain.records.readers.named import NAMES, load, open_path
from caltrain.records.readers.npz import read_npz
from caltrain.records.readers.parquet import read_parquet

__all__ = [
    "CIFAR10_CLASSES",
    "NAMES",
    "Dataset",
    "Split",
    "load",
    "open_path",
    "read_cifar_archive",
    "read_digits",
    "read_folder",
    "read_idx",
    "read_npz",
    "read_parquet",
]
