"""RCNN-SAT: the feed-forward and lateral networks of the study of speed-accuracy trade-offs, with batch norms of every time step.

Source: Spoerer, Kietzmann, Mehrer, Charest & Kriegeskorte, "Recurrent neural networks can explain flexible trading of speed and accuracy in
biological vision", PLoS Computational Biology 16(10), 2020. With P a 2 x 2 maximum::

    h_n[t] = relu(BN_{n,t}(W_n * P(h_{n-1}[t]) + L_n * h_n[t-1])),   logits[t] = U mean(h_6[t]) + c
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rnndyn_fast.file_io import reads
from rnndyn_fast.graph.spec.network import Activation, Area, Connection, Input, Network, Norm, Operator, Pool, Readout, Role
from rnndyn_fast.models.checkpoint_names import Entry, Mapped, dense, kernel, load_mapped, same
from rnndyn_fast.nn.recurrent_network import RecurrentNetwork
from rnndyn_fast.optional import require
from rnndyn_fast.suggestions import check_choice

_CHANNELS = (96, 128, 192, 256, 512, 1024, 2048)
LAYERS: dict[str, tuple[tuple[int, int], ...]] = {
    "b": tuple(zip(_CHANNELS, (7, 5, 3, 3, 3, 3, 1), strict=True)),
    "bl": tuple(zip(_CHANNELS, (7, 5, 3, 3, 3, 3, 1), strict=True)),
    "b_k": tuple(zip(_CHANNELS, (11, 7, 5, 5, 5, 5, 3), strict=True)),
    "b_f": tuple(zip((192, 256, 384, 512, 1024, 2048, 4096), (7, 5, 3, 3, 3, 3, 1), strict=True)),
    "b_d": tuple((c, k) for c, k in zip(_CHANNELS, (7, 5, 3, 3, 3, 3, 1), strict=True) for _ in range(2)),
}
EPS, MOMENTUM = 1e-3, 0.01  # Keras' batch norm
SMALLEST = 64


def rcnn_sat_network(
    kind: str, layers: tuple[tuple[int, int], ...], size: tuple[int, int], classes: int, steps: int, cumulative: bool
) -> Network:
    """The spec; parameters are named after the published layers."""
    recurrent = kind == "bl"
    areas, connections, below = [], [], "image"
    for n, (channels, kernel_size) in enumerate(layers):
        name = f"layer{n}"
        norm = f"BatchNorm_Layer_{n}_Time" if recurrent else f"BatchNorm_Layer_{n}"
        areas.append(Area(name, channels, norm=Norm.BATCH, norm_parameter=norm, norm_steps=steps, eps=EPS))
        pooled = n > 0 and (kind != "b_d" or n % 2 == 0)
        connections.append(
            Connection(below, name, Role.BOTTOM_UP, kernel_size=kernel_size, pool=Pool.MAX if pooled else Pool.NONE,
                       parameter=f"RCL_{n}_BConv" if recurrent else f"Conv_Layer_{n}")
        )  # fmt: skip
        if recurrent and steps > 1:
            connections.append(Connection(name, name, Role.LATERAL, kernel_size=kernel_size, parameter=f"RCL_{n}_LConv"))
        below = name
    areas.append(Area("gap", layers[-1][0], norm=Norm.NONE, activation=Activation.IDENTITY))
    connections.append(Connection(below, "gap", Role.BOTTOM_UP, Operator.IDENTITY, pool=Pool.MEAN))
    readout = Readout("gap", classes, parameter="ReadoutDense", clamp=None, cumulative=cumulative)
    return Network(f"rcnn_sat_{kind}", (Input("image", 3, *size),), tuple(areas), tuple(connections), readout=readout)


class RCNNSAT(RecurrentNetwork):
    """A published network; see :func:`rcnn_sat`."""

    def __init__(self, options: dict[str, Any]) -> None:
        kind, steps, size = options["kind"], options["timesteps"], options["image_size"]
        check_choice("kind", kind, list(LAYERS))
        if steps is None:
            steps = options["timesteps"] = 8 if kind == "bl" else 1
        if kind != "bl" and steps != 1:
            raise ValueError(f"timesteps: a feed-forward network ({kind}) has one time step, got {steps}")
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < SMALLEST:
            raise ValueError(f"image_size: expected at least {SMALLEST} (six poolings), got {height} x {width}")
        if options["width_divisor"] < 1:
            raise ValueError(f"width_divisor: expected at least 1, got {options['width_divisor']}")
        layers = tuple((c // options["width_divisor"], k) for c, k in LAYERS[kind])
        network = rcnn_sat_network(kind, layers, (height, width), options["num_classes"], steps, bool(options["cumulative_readout"]))
        super().__init__(network, steps, backend=options["backend"], engine=options["engine"])
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = MOMENTUM
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.config = {"model": "rcnn_sat", **options}


_KERAS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def keras_entry(name: str) -> Entry | None:
    """Which Keras variable makes one of our tensors; None for a counter."""
    owner, _, leaf = name.rpartition(".")
    if leaf == "num_batches_tracked":
        return None
    if owner.startswith("BatchNorm"):
        prefix, step = owner.split(".")
        layer = f"{prefix}_{step}" if prefix.endswith("_Time") else prefix
        return Entry(name, (f"{layer}/{_KERAS[leaf]}",), same)
    if leaf == "bias":
        return Entry(name, (f"{owner}/bias",), same)
    return Entry(name, (f"{owner}/kernel",), dense if owner == "ReadoutDense" else kernel)


@reads("Keras weights file")
def read_keras_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a Keras weights file by ``<layer>/<variable>``, found by name."""
    require("h5py")
    import h5py

    if not Path(path).is_file():
        raise ValueError(f"checkpoint: no file {path}")

    arrays: dict[str, np.ndarray] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            layer, variable = name.split("/")[-2:]
            arrays[f"{layer}/{variable.split(':')[0]}"] = node[()]

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return arrays


def load_keras_checkpoint(net: RCNNSAT, checkpoint: Mapping[str, np.ndarray] | str | os.PathLike[str]) -> Mapped:
    """Fill a network from a published checkpoint.

    Args:
        checkpoint: arrays by "<layer>/<variable>", or a Keras weights file (HDF5). Batch norms of later time steps than the network has
            are ignored, so a file of eight steps fits a shorter network.

    Returns: which variable went where; ``print`` it.

    Raises: ``ValueError`` that lists what is missing, unexpected or of the wrong shape; then nothing is loaded.
    """
    arrays = dict(checkpoint) if isinstance(checkpoint, Mapping) else read_keras_weights(checkpoint)
    entries = [entry for name in net.state_dict() if (entry := keras_entry(name)) is not None]
    ignored = {}
    for name in arrays:
        parts = name.split("/")[0].split("_")
        if name.startswith("BatchNorm_Layer_") and parts[-2] == "Time" and int(parts[-1]) >= net.timesteps:
            ignored[name] = f"the network has {net.timesteps} time steps"
        if net.timesteps == 1 and "_LConv/" in name:
            ignored[name] = "one time step has no lateral connections"
    return load_mapped(net, arrays, entries, ignored)


def rcnn_sat(
    kind: str = "bl",
    num_classes: int = 565,
    *,
    timesteps: int | None = None,
    cumulative_readout: bool = False,
    image_size: int | tuple[int, int] = 128,
    width_divisor: int = 1,
    backend: str | None = None,
    engine: str = "auto",
) -> RCNNSAT:
    """A published network.

    Args:
        kind: "b", "bl" (lateral connections in every layer), or a control: "b_k", "b_f", "b_d" (larger kernels, more maps, deeper).
        num_classes: 565 (ecoset), 1000 (ImageNet).
        timesteps: of "bl", 8 if None; every step has batch norms of its own, so a trained network has no more.
        cumulative_readout: probabilities of the sum of all logits so far (published for testing), else of each step's.
        image_size: at least 64; pretrained networks expect 128.
        width_divisor: all channel numbers are divided by it.
        backend, engine: see :func:`rnndyn_fast.rollout`.

    Returns: a module; ``net(x)`` with x [N, 3, S, S] in [-1, 1] (:func:`rnndyn_fast.models.preprocess.signed_unit`) gives log-probabilities
        [T, N, num_classes]. In training mode batch norms use the batch and move their running statistics.

    Raises: ``ValueError`` naming the option, what was expected, what came.

    Source: Spoerer et al., PLoS Computational Biology 16(10), 2020.

    >>> sum(p.numel() for p in rcnn_sat("bl", 10, timesteps=3, width_divisor=32).parameters())
    28002
    """
    options = dict(
        kind=kind, num_classes=num_classes, timesteps=timesteps, cumulative_readout=cumulative_readout, image_size=image_size,
        width_divisor=width_divisor, backend=backend, engine=engine,
    )  # fmt: skip
    return RCNNSAT(options)
