"""Images: HDF5 files of the MiniEcoset layout, their batches, augmentation, and making such files from real images."""

from rnndyn_fast.data.augment import Part, TrivialAugmentWide
from rnndyn_fast.data.augmentation import augmentation
from rnndyn_fast.data.challenge import CONDITIONS, Condition, ObjectPool, assign_conditions, challenge
from rnndyn_fast.data.hdf5 import SPLITS, ImageFile, ImageSplit
from rnndyn_fast.data.image_files import fit, read_image
from rnndyn_fast.data.image_folder import list_folder, list_table
from rnndyn_fast.data.loader import Batch, BatchLoader, BatchSource, Request, check_unit_range, normalise
from rnndyn_fast.data.make import make_dataset
from rnndyn_fast.data.resize import resize
from rnndyn_fast.data.sources import ImageSource, load_source, stratified_order

__all__ = [
    "CONDITIONS",
    "SPLITS",
    "Batch",
    "BatchLoader",
    "BatchSource",
    "Condition",
    "ImageFile",
    "ImageSource",
    "ImageSplit",
    "ObjectPool",
    "Part",
    "Request",
    "TrivialAugmentWide",
    "assign_conditions",
    "augmentation",
    "challenge",
    "check_unit_range",
    "fit",
    "list_folder",
    "list_table",
    "load_source",
    "make_dataset",
    "normalise",
    "read_image",
    "resize",
    "stratified_order",
]
