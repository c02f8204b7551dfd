"""Arguments of the published cells' constructors as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rnndyn_fast.nn.reciprocal_options import ENTRIES, FORMS, MEDIAN_ONLY, kernel_size
from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.suggestions import check_choice, nearest, others

# Published name -> ours, where they differ.
RECIPROCAL_ALIASES = {
    "cell_depth": "cell_channels",
    "tau_filter_size": "tau_kernel_size",
    "cell_tau_filter_size": "cell_tau_kernel_size",
    "gate_filter_size": "gate_kernel_size",
    "ff_filter_size": "ff_kernel_size",
    "in_out_filter_size": "in_out_kernel_size",
    "feedback_filter_size": "feedback_kernel_size",
    "tau_depth_separable": "tau_separable",
    "gate_depth_separable": "gate_separable",
    "ff_depth_separable": "ff_separable",
    "in_out_depth_separable": "in_out_separable",
    "feedback_depth_separable": "feedback_separable",
    "ds_repeat": "separable_repeat",
}
# Published defaults, by published name; None: the argument must be given.
_RECIPROCAL: dict[str, Any] = {
    "cell_depth": None, "tau_filter_size": None, "gate_filter_size": None, "ff_filter_size": None, "in_out_filter_size": [3, 3],
    "cell_tau_filter_size": (), "feedback_filter_size": [3, 3], "feedback_entry": "out", "feedback_depth_separable": False,
    "ff_depth_separable": False, "in_out_depth_separable": False, "gate_depth_separable": False, "tau_depth_separable": False,
    "tau_nonlinearity": "tanh", "gate_nonlinearity": "tanh", "tau_bias": 0.0, "gate_bias": 0.0, "tau_multiplier": -1.0,
    "gate_multiplier": -1.0, "tau_offset": 1.0, "gate_offset": 1.0, "input_activation": "identity", "feedback_activation": "identity",
    "cell_activation": "elu", "out_activation": "elu", "cell_residual": False, "out_residual": False, "residual_to_cell_tau": False,
    "residual_to_cell_gate": False, "residual_to_out_tau": False, "residual_to_out_gate": False, "input_to_tau": False,
    "input_to_gate": False, "input_to_cell": False, "input_to_out": False, "cell_to_out": False, "layer_norm": False,
}  # fmt: skip
_GATES: dict[str, Any] = {"filter_size": None, "forget_bias": 1.0}
_CELLS: dict[str, dict[str, Any]] = {
    "shallow": {**_RECIPROCAL, "ds_repeat": False},
    "median": _RECIPROCAL,
    "simplernn": {"filter_size": None, "layer_norm": True, "activation": "elu"},
    "gru": {**_GATES, "layer_norm": False, "activation": "tanh"},
    "lstm": {**_GATES, "layer_norm": False, "activation": "tanh", "use_peepholes": False},
    "ugrnn": _GATES,
    "intersectionrnn": {**_GATES, "layer_norm": False},
}
_ALIASES = {**RECIPROCAL_ALIASES, "filter_size": "kernel_size", "use_peepholes": "peepholes"}
# Initial values, regularisers, the form of a state, and what only batch norm or dropout read: nothing of it is in the numbers.
_INITIAL = ("kernel_initializer", "kernel_initializer_kwargs", "bias_initializer", "bias_initializer_kwargs", "norm_gain", "norm_shift")
_IGNORED = {
    "shallow": (
        *_INITIAL, "weight_decay", "total_training_steps", "batch_norm_decay", "batch_norm_epsilon", "bn_trainable",
        "crossdevice_bn_kwargs", "gate_tau_bn_gamma_init", "edges_init_zero", "is_training", "time_sep", "max_internal_time",
    ),
    "median": (*_INITIAL, "weight_decay"),
    "simplernn": ("kernel_initializer", "bias_initializer", "kernel_regularizer", "bias_regularizer"),
    "lstm": (*_INITIAL, "weight_decay", "state_is_tuple"),
}  # fmt: skip
# What is not here: only these values will do.
_ONLY: dict[str, dict[str, tuple[Any, str]]] = {
    "shallow": {
        "batch_norm": (False, "batch norm within a cell is not here"),
        "batch_norm_cell_out": (False, "batch norm within a cell is not here"),
        "recurrent_keep_prob": (1.0, "dropout within a cell is not here"),
        "data_format": ("channels_last", "the published convolutions take no other"),
    },
    "ugrnn": {"layer_norm": (False, "the published layer norm of a UGRNN fails")},
}


def published_cell(config: Mapping[str, Any], form: str, map_size: tuple[int, int]) -> tuple[str, int, dict[str, Any]]:
    """Kind, output channels and options of the cell that a published constructor makes of these arguments.

    Raises: ``ValueError`` naming the argument.
    """
    check_choice("form", form, list(_CELLS))
    if not isinstance(config, Mapping):
        raise ValueError(f"config: expected a mapping of published arguments, got {type(config).__name__}")
    known, ignored, only = _CELLS[form], _IGNORED.get(form, (*_INITIAL, "weight_decay")), _ONLY.get(form, {})
    there = ["out_depth", "shape", *known, *only, *ignored]
    for name in config:
        if name not in there:
            raise ValueError(f"config: unknown argument {name!r}{others(name, there)}")
    for name, (value, why) in only.items():
        if config.get(name, value) != value:
            raise ValueError(f"config: {name}: expected {value!r} ({why}), got {config[name]!r}")
    if config.get("shape") is not None and tuple(config["shape"]) != map_size:
        raise ValueError(f"config: shape: expected the map size {list(map_size)}, got {config['shape']!r}")
    values = {name: config.get(name, default) for name, default in known.items()}
    missing = [name for name in ("out_depth", *known) if values.get(name, config.get(name)) is None and name != "cell_tau_filter_size"]
    if missing:
        raise ValueError(f"config: missing argument {missing[0]!r}, which has no published default")
    channels = _whole("out_depth", config["out_depth"])
    if form in FORMS:
        return f"rgc_{form}", channels, _reciprocal(values, form)
    return form, channels, {_ALIASES.get(name, name): _value(name, value) for name, value in values.items()}


def _reciprocal(values: dict[str, Any], form: str) -> dict[str, Any]:
    """Options of the reciprocal gated cell, without those that have no effect beside the others."""
    values = dict(values)
    check_choice("config: feedback_entry", values["feedback_entry"], ENTRIES)
    values["cell_tau_filter_size"] = values["cell_tau_filter_size"] or None
    if _value("gate_filter_size", values["gate_filter_size"]) == 0:
        for name in ("cell_to_out", "cell_residual", "residual_to_cell_tau", "residual_to_cell_gate"):
            values[name] = False
    if form == "shallow":
        for name in MEDIAN_ONLY:
            values[name] = 0.0 if name.endswith("bias") else False
        values["ds_repeat"] = values["ds_repeat"] and any(value is True for name, value in values.items() if name.endswith("separable"))
    for gain in ("tau", "gate"):
        if values[f"{gain}_depth_separable"]:
            values[f"{gain}_bias"] = 0.0
    return {_ALIASES.get(name, name): _value(name, value) for name, value in values.items()}


def _value(name: str, value: Any) -> Any:
    if name == "cell_depth":
        return _whole(name, value)
    if name.endswith("filter_size"):
        return kernel_size(f"config: {name}", value, none=name == "cell_tau_filter_size", zero=name == "gate_filter_size")
    if name.endswith("separable") and not isinstance(value, bool):
        raise ValueError(f"config: {name}: expected true or false, got {value!r}")
    if name.endswith(("activation", "nonlinearity")):
        word = getattr(value, "__name__", value)
        words = [activation.value for activation in Activation]
        if word not in words:
            raise ValueError(f"config: {name}: expected one of {words}, got {word!r}{nearest(word, words)}")
        return word
    return value


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
        raise ValueError(f"config: {name}: expected a whole number of at least 1, got {value!r}")
    return int(value)
