"""What a search may choose of the reciprocal gated cell, and when a choice means anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rnndyn_fast.nn.reciprocal_options import ENTRIES, MEDIAN, ReciprocalOptions, reciprocal_options
from rnndyn_fast.ops.activations import Activation

PREFIX = "rgc_"
RECIPROCAL = "reciprocal"
LAYER = "layer"  # the entry of feedback into the layer's first convolution, before the cell
_ELSEWHERE = ("cell_channels", "gating")  # fields of an architecture (memory_ratio, gating)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Activation) else value


# Choices by name, with their defaults: the published median form. (x is rectified already.)
DEFAULTS: dict[str, Any] = {
    **{PREFIX + f.name: _plain(getattr(MEDIAN, f.name)) for f in dataclasses.fields(ReciprocalOptions) if f.name not in _ELSEWHERE},
    "rgc_input_activation": "identity",
    "rgc_feedback_entry": LAYER,
    "rgc_cell_tau_kernel_size": 0,  # (tau's)
}

Choices = Mapping[str, Any]  # of one layer: fields of an architecture, choices of the cell, "feedback" that enters the layer


def of(a: Choices, option: str) -> Any:
    """An option of the cell, as chosen or by default."""
    return a.get(PREFIX + option, DEFAULTS[PREFIX + option])


def _cell(a: Choices) -> bool:
    return a["cell"] == RECIPROCAL


def _memory(a: Choices) -> bool:
    return _cell(a) and of(a, "gate_kernel_size") != 0


def _median(a: Choices) -> bool:
    return _cell(a) and of(a, "form") == "median"


def _gated(a: Choices) -> bool:
    return _memory(a) and bool(a["gating"])


def _separable(a: Choices) -> bool:
    names = ("tau", "gate", "ff", "in_out", "feedback")
    return any(MEANT[f"rgc_{name}_separable"](a) and of(a, f"{name}_separable") for name in names)


def _entering(a: Choices) -> bool:
    return _cell(a) and bool(a["feedback"]) and of(a, "feedback_entry") != LAYER


_IN_MEMORY = ("cell_tau_kernel_size", "ff_kernel_size", "ff_separable", "cell_activation", "cell_residual", "cell_to_out")
MEANT: dict[str, Callable[[Choices], bool]] = {
    **dict.fromkeys(DEFAULTS, _cell),
    **dict.fromkeys((PREFIX + name for name in _IN_MEMORY), _memory),
    "rgc_gate_separable": lambda a: _memory(a) and bool(a["gating"] or of(a, "cell_to_out")),
    **dict.fromkeys(("rgc_gate_nonlinearity", "rgc_gate_multiplier", "rgc_gate_offset", "rgc_residual_to_out_gate"), _gated),
    "rgc_tau_bias": lambda a: _median(a) and not of(a, "tau_separable"),
    "rgc_gate_bias": lambda a: _median(a) and _gated(a) and not of(a, "gate_separable"),
    "rgc_residual_to_cell_tau": lambda a: _median(a) and _memory(a),
    **dict.fromkeys(("rgc_residual_to_cell_gate", "rgc_input_to_gate"), lambda a: _median(a) and _gated(a)),
    **dict.fromkeys(("rgc_residual_to_out_tau", "rgc_input_to_tau"), _median),
    "rgc_input_to_cell": lambda a: _memory(a) and bool(of(a, "cell_residual")),
    **dict.fromkeys(("rgc_in_out_kernel_size", "rgc_in_out_separable"), lambda a: _cell(a) and bool(of(a, "input_to_out"))),
    "rgc_feedback_entry": lambda a: _cell(a) and bool(a["feedback"]),
    **dict.fromkeys(("rgc_feedback_kernel_size", "rgc_feedback_separable", "rgc_feedback_activation"), _entering),
    "rgc_separable_repeat": lambda a: _cell(a) and not _median(a) and _separable(a),
}
# Those that others depend on, in the order in which they are made; all others come after them.
FIRST = (
    "gating", "rgc_form", "rgc_gate_kernel_size", "rgc_feedback_entry", "rgc_cell_residual", "rgc_input_to_out", "rgc_cell_to_out",
    "rgc_tau_separable", "rgc_gate_separable", "rgc_ff_separable", "rgc_in_out_separable", "rgc_feedback_separable",
)  # fmt: skip


def check_choice_of_cell(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless the value makes sense for that choice, whatever the others are."""
    option = name.removeprefix(PREFIX)
    if name in ("rgc_feedback_entry", "rgc_cell_tau_kernel_size") and value in (LAYER, 0):
        return
    others: dict[str, Any] = {"form": "median", "tau_separable": False, "gate_separable": False}
    if option == "separable_repeat":
        others = {"form": "shallow", "tau_separable": True}
    if option == "input_to_cell":
        others |= {"cell_residual": True}
    reciprocal_options({**others, option: value})


def cell_options(a: Choices) -> dict[str, Any]:
    """Options of the cell for :func:`~rnndyn_fast.nn.reciprocal.reciprocal_gated`: what has no effect beside the others is off."""
    options: dict[str, Any] = {}
    for name, default in DEFAULTS.items():
        value, meant = a.get(name, default), MEANT[name](a)
        if not meant and isinstance(value, bool | float):
            value = name == "rgc_input_to_cell" if isinstance(value, bool) else 0.0 if name.endswith("bias") else value
        options[name.removeprefix(PREFIX)] = value
    if options["feedback_entry"] not in ENTRIES:
        options["feedback_entry"] = "out"  # (the cell gets no feedback)
    options["cell_tau_kernel_size"] = options["cell_tau_kernel_size"] or None
    return {**options, "gating": bool(a["gating"]) or not _memory(a)}


def reads_residual(options: Mapping[str, Any]) -> bool:
    """Whether a cell with these options reads the layer's own input."""
    return any(value is True and "residual" in name for name, value in options.items())
