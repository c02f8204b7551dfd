"""Checkpoints of the published ConvRNNs: their variables under our names.

Variables are named ``tnn_model/<layer>/<part>``; layouts as in :mod:`rnndyn_fast.models.checkpoint_names`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rnndyn_fast.models.checkpoint_names import Entry, Mapped, dense, depthwise, kernel, load_mapped, same, stacked
from rnndyn_fast.models.convrnn_nets import ConvRNN

PREFIX = "tnn_model/"
_NORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "gru": {"gates_norm": ("gates/r_pre", "gates/u_pre"), "candidate_norm": ("candidates/c_pre",)},
    "lstm": {"gates_norm": ("input", "transform", "forget", "output"), "state_norm": ("state",)},
    "intersectionrnn": {"gates_norm": ("gh_act", "h_act", "gy_act", "y_act")},
    "simplernn": {"layer_norm": ("layer_norm",)},
    "rgc_shallow": {"cell_layer_norm": ("cell_layer_norm",), "out_layer_norm": ("out_layer_norm",)},
    "rgc_median": {"layer_norm": ("layer_norm",)},
}
# Convolutions whose variables have no scope of their own: <name>_weights, <name>_bias.
_UNSCOPED = {
    "rgc_shallow": ("input_to_out",),
    "rgc_median": (
        "cell_to_cell", "out_to_cell", "residual_to_cell", "input_to_cell", "input_to_cell_tau", "input_to_cell_gate",
        "residual_to_cell_tau", "residual_to_cell_gate", "out_to_out", "cell_to_out", "input_to_out", "input_to_out_tau",
        "input_to_out_gate", "residual_to_out_tau", "residual_to_out_gate", "feedback_to_input", "feedback_to_cell", "feedback_to_out",
    ),
}  # fmt: skip
_KIND = {"weight": "weights", "bias": "bias"}
_AFFINE = {"weight": "gamma", "bias": "beta"}


def _peepholes(*arrays: np.ndarray) -> np.ndarray:
    return np.stack(arrays).transpose(0, 3, 1, 2)


def _entry(name: str, cell: str) -> Entry:
    """Which variables make one of our parameters."""
    path = name.split(".")
    *scope, leaf = path
    if scope and scope[-1] in _NORMS.get(cell, {}):
        parts = _NORMS[cell][scope[-1]]
        return Entry(name, tuple("/".join([*scope[:-1], part, _AFFINE[leaf]]) for part in parts), stacked)
    if leaf == "peepholes":
        return Entry(name, tuple("/".join([*scope, "peepholes", f"w_{gate}_diag"]) for gate in "fio"), _peepholes)
    if leaf not in _KIND:
        return Entry(name, ("/".join(path),), same)
    theirs, convert = _KIND[leaf], kernel if leaf == "weight" else same
    owner = scope[-1]
    if owner.startswith("pre_") and scope[0] != "imnetds" and leaf == "weight":
        theirs = "weights_basenet"
    elif owner == "pre_3" and leaf == "weight":
        convert = dense
    elif owner == "gates" and scope[-2] in ("ConvLSTMCell", "ConvUGRNNCell", "ConvIntersectionRNNCell"):
        scope = scope[:-1]
    elif owner.endswith("_depthwise_0"):
        scope, theirs, convert = [*scope[:-1], owner.removesuffix("_depthwise_0")], "depthwise_weights_0", depthwise
    elif owner.endswith("_depthwise"):
        scope, theirs, convert = [*scope[:-1], owner.removesuffix("_depthwise")], "depthwise_weights", depthwise
    elif owner.endswith("_pointwise"):
        scope = [*scope[:-1], owner.removesuffix("_pointwise")]
        theirs = "pointwise_weights" if leaf == "weight" else "bias"
    elif owner == "residual_add" or owner in _UNSCOPED.get(cell, ()):
        scope, theirs = scope[:-1], f"{owner}_{theirs}"
    return Entry(name, ("/".join([*scope, theirs]),), convert)


def entries_of(names: Sequence[str], cell: str) -> list[Entry]:
    """How each of our parameters is made; ``cell`` is the kind of cell in the network."""
    return [_entry(name, cell) for name in names]


def load_tf_checkpoint(net: ConvRNN, checkpoint: Mapping[str, np.ndarray] | str | os.PathLike[str]) -> Mapped:
    """Fill a network from a published checkpoint.

    Args:
        net: of :func:`rnndyn_fast.models.convrnn`, with the checkpoint's layers and sizes.
        checkpoint: arrays by variable name (with or without "tnn_model/"), or an NPZ file of them (names with "/", or "__" for it).

    Returns: which variable went where; ``print`` it.

    Raises:
        ValueError: variables missing, unexpected or of the wrong shape, or a decay of a layer that has none: all are listed, and
            nothing is loaded.
    """
    if not isinstance(checkpoint, Mapping):
        path = Path(checkpoint)
        if not path.is_file():
            raise ValueError(f"checkpoint: no file {path}")
        with np.load(path, allow_pickle=False) as data:
            checkpoint = {name: data[name] for name in data.files}
    arrays = {name.replace("__", "/").removeprefix(PREFIX): value for name, value in checkpoint.items()}
    ours = [name for name, _ in net.named_parameters() if not name.startswith("decoder.")]
    entries = entries_of(ours, net.layers.kind)
    entries += [
        Entry(f"decoder.{name}", ("normalize/softmax_beta" if name == "softmax_beta" else name,), same)
        for name, _ in [*net.decoder.named_parameters(), *net.decoder.named_buffers()]
    ]
    # Every layer without recurrence has a decay too, fixed at zero.
    ignored = {f"{layer}/memory_decay": "a fixed decay of 0" for layer in (*net.layers.channels, "imnetds")}
    for name in ignored.keys() & arrays.keys() - {theirs for e in entries for theirs in e.theirs}:
        if np.any(arrays[name]):
            raise ValueError(f"checkpoint: {name} is {float(np.ravel(arrays[name])[0])}, but this network's layer has no decay")
    ignored |= {f"{part}/softmax_beta": "used by no shipped decoder" for part in ("probs", "alpha")}
    return load_mapped(net, arrays, entries, ignored)
