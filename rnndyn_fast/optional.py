"""Packages that `import rnndyn_fast` does not need: what each is for, and the extra that installs it."""

from __future__ import annotations

import importlib
from typing import NamedTuple


class OptionalPackage(NamedTuple):
    """A package on the index, what it is used for here, and the extra of rnndyn-fast that lists it."""

    distribution: str
    purpose: str
    extra: str = "cli"


# By the name under which it is imported.
OPTIONAL_PACKAGES = {
    "h5py": OptionalPackage("h5py", "image files, results and trajectories"),
    "cmaes": OptionalPackage("cmaes", "the search by CMA-ES (--sampler cmaes)", "search"),
    "jsonargparse": OptionalPackage("jsonargparse", "the options of commands"),
    "kornia": OptionalPackage("kornia", "augmentation in training"),
    "matplotlib": OptionalPackage("matplotlib", "figures"),
    "networkx": OptionalPackage("networkx", "drawings of automata"),
    "lightning": OptionalPackage("lightning", "training with Lightning", "lightning"),
    "optuna": OptionalPackage("optuna", "the architecture search", "search"),
    "PIL": OptionalPackage("pillow", "folders of image files"),
    "psycopg": OptionalPackage("psycopg", "trials in a PostgreSQL database (--storage)", "search-postgresql"),
    "pynwb": OptionalPackage("pynwb", "recordings in NWB files", "nwb"),
    "pytorch_optimizer": OptionalPackage("pytorch-optimizer", "optimisers for large batches (--optimizer lars, lamb)", "large-batch"),
    "rich": OptionalPackage("rich", "progress bars"),
    "rsatoolbox": OptionalPackage("rsatoolbox", "comparing RDMs with those of subjects", "rsa"),
    "scipy": OptionalPackage("scipy", "statistics, clustering and interpolation"),
    "sklearn": OptionalPackage("scikit-learn", "the bundled digits, decoders, PLS and multidimensional scaling"),
    "tensorboard": OptionalPackage("tensorboard", "TensorBoard's files (--tensorboard)", "tensorboard"),
    "triton": OptionalPackage("triton", "the Triton kernels of convolutions on GPUs", "triton"),
    "wandb": OptionalPackage("wandb", "Weights & Biases (--wandb)", "wandb"),
    "webdataset": OptionalPackage("webdataset", "images in tar shards", "webdataset"),
    "yaml": OptionalPackage("PyYAML", "configuration files and network files"),
}


def install_hint(name: str) -> str:
    """The command that installs an optional package.

    >>> install_hint("pynwb")
    'pip install "rnndyn-fast[nwb]"'
    """
    return f'pip install "rnndyn-fast[{OPTIONAL_PACKAGES[name].extra}]"'


def require(*names: str) -> None:
    """Import optional packages, to be called before a local ``import`` of them.

    Raises:
        ImportError: one of them cannot be imported; the message says what it is for and how to install it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            package = OPTIONAL_PACKAGES[name]
            why = "" if isinstance(error, ModuleNotFoundError) and error.name == name else f" ({error})"
            raise ImportError(f"{package.distribution} is needed for {package.purpose}{why}: {install_hint(name)}") from error
