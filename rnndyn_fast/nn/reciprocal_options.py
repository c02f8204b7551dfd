"""Options of the reciprocal gated cell, and its two published forms as presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.suggestions import check_choice, nearest

KernelSize = int | tuple[int, int]
FORMS = ("shallow", "median")
ENTRIES = ("input", "cell", "out")
MEDIAN_TAU, MEDIAN_GATE = 0.9219348064291611, 0.7006566684988862
# Without effect in the shallow form.
MEDIAN_ONLY = (
    "tau_bias", "gate_bias", "residual_to_cell_tau", "residual_to_cell_gate", "residual_to_out_tau", "input_to_tau", "input_to_gate",
)  # fmt: skip
_KERNELS = ("tau_kernel_size", "cell_tau_kernel_size", "gate_kernel_size", "ff_kernel_size", "in_out_kernel_size", "feedback_kernel_size")
_NUMBERS = ("tau_bias", "gate_bias", "tau_multiplier", "gate_multiplier", "tau_offset", "gate_offset")
_ACTIVATIONS = (
    "tau_nonlinearity", "gate_nonlinearity", "input_activation", "feedback_activation", "cell_activation", "out_activation",
)  # fmt: skip


@dataclass(frozen=True)
class ReciprocalOptions:
    r"""What a reciprocal gated cell computes. The defaults are the shallow form as published; :data:`MEDIAN` is the median form.

    With x the input, r the layer's own input ("residual"), F the feedback, c and o the states (all of the step before), ``g(v)`` one of
    the two gains ``offset + multiplier * nonlinearity(v)``, LN there with ``layer_norm``, and a term there if its option says so::

        a  = input_activation(x [+ feedback_activation(W F)])
        ci = [Wr r: cell_residual] + [Wx a: input_to_cell] [+ feedback_activation(W F)]
        c' = cell_activation(LN?(g_tau(W c [+ W a: input_to_tau] [+ W r: residual_to_cell_tau]) . c
                               + g_gate(W o [+ W a: input_to_gate] [+ W r: residual_to_cell_gate]) . ci))
        oi = (W a: input_to_out, else a) [+ W c: cell_to_out] [+ r or P r: out_residual] [+ feedback_activation(W F)]
        o' = out_activation(LN?(g_tau(W o [+ W a] [+ W r: residual_to_out_tau]) . o
                              + g_gate(W c: unless cell_to_out [+ W a] [+ W r: residual_to_out_gate]) . oi))

    form: "shallow": dense convolutions have no biases, and all but in-out are cut to the map; feedback into the cell is
        ``feedback_activation(F + W F)``; MEDIAN_ONLY has no effect. "median": the convolutions have biases (but those of ``input_to_*`` and
        ``residual_to_*`` of tau and gate), dense ones are not cut, dense tau and gate add the constants ``tau_bias`` and ``gate_bias``.
        Depthwise kernels are cut in both, and separable convolutions have a bias (of the median form's residual to the out gate: none).
    cell_channels: of c; None: as many as the output has.
    kernel sizes: a number, or (height, width). ``gate_kernel_size=0``: there is no cell memory c. ``cell_tau_kernel_size`` None: tau's.
    separable_repeat: (shallow) a depthwise convolution of the same size, and elu, before each separable one.
    feedback_entry: where F enters: "input", "cell" or "out".
    gating: False (a control, not published): no gate, ``g_gate`` is 1.
    """

    form: str = "shallow"
    cell_channels: int | None = None
    tau_kernel_size: KernelSize = 3
    cell_tau_kernel_size: KernelSize | None = None
    gate_kernel_size: KernelSize = 3
    ff_kernel_size: KernelSize = 3
    in_out_kernel_size: KernelSize = 3
    feedback_kernel_size: KernelSize = 3
    tau_separable: bool = False
    gate_separable: bool = False
    ff_separable: bool = False
    in_out_separable: bool = False
    feedback_separable: bool = False
    separable_repeat: bool = False
    tau_nonlinearity: Activation = Activation.SIGMOID
    gate_nonlinearity: Activation = Activation.SIGMOID
    tau_bias: float = 0.0
    gate_bias: float = 0.0
    tau_multiplier: float = -1.0
    gate_multiplier: float = -1.0
    tau_offset: float = 1.0
    gate_offset: float = 1.0
    input_activation: Activation = Activation.IDENTITY
    feedback_activation: Activation = Activation.IDENTITY
    cell_activation: Activation = Activation.ELU
    out_activation: Activation = Activation.ELU
    feedback_entry: str = "out"
    cell_residual: bool = False
    out_residual: bool = False
    residual_to_cell_tau: bool = False
    residual_to_cell_gate: bool = False
    residual_to_out_tau: bool = False
    residual_to_out_gate: bool = True
    input_to_tau: bool = False
    input_to_gate: bool = False
    input_to_cell: bool = True
    input_to_out: bool = False
    cell_to_out: bool = False
    layer_norm: bool = False
    gating: bool = True

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)
        check_choice("feedback_entry", self.feedback_entry, ENTRIES)
        for name in _ACTIVATIONS:
            value = getattr(self, name)
            if not isinstance(value, Activation):
                check_choice(name, value, [activation.value for activation in Activation])
                object.__setattr__(self, name, Activation(value))
        for name in _KERNELS:
            object.__setattr__(
                self, name, kernel_size(name, getattr(self, name), none=name == "cell_tau_kernel_size", zero=name == "gate_kernel_size")
            )
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        for field in dataclasses.fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise ValueError(f"{field.name}: expected true or false, got {getattr(self, field.name)!r}")
        if self.cell_channels is not None and (isinstance(self.cell_channels, bool) or self.cell_channels < 1):
            raise ValueError(f"cell_channels: expected at least 1, got {self.cell_channels!r}")
        self._check_combination()

    def _check_combination(self) -> None:
        if self.form == "shallow":
            for name in MEDIAN_ONLY:
                if getattr(self, name):
                    raise ValueError(f"{name}: the shallow form has no such term (expected form='median'), got {getattr(self, name)!r}")
        elif self.separable_repeat:
            raise ValueError("separable_repeat: the median form has no such convolutions (expected form='shallow'), got True")
        for gain in ("tau", "gate"):
            if getattr(self, f"{gain}_bias") and getattr(self, f"{gain}_separable"):
                raise ValueError(f"{gain}_bias: it has no effect on separable convolutions, expected 0 with {gain}_separable")
        if self.separable_repeat and not any(getattr(self, f"{name}_separable") for name in ("tau", "gate", "ff", "in_out", "feedback")):
            raise ValueError("separable_repeat: expected a separable convolution (tau_separable, gate_separable, ...)")
        if not self.gating:
            for name in ("residual_to_out_gate", "residual_to_cell_gate", "input_to_gate", "gate_bias"):
                if getattr(self, name):
                    raise ValueError(f"{name}: there is no gate with gating=False, got {getattr(self, name)!r}")
        if not self.has_cell:
            for name in ("residual_to_out_gate", "input_to_gate", "cell_to_out", "cell_residual", "residual_to_cell_tau"):
                if getattr(self, name):
                    raise ValueError(f"{name}: there is no cell memory and no gate with a gate kernel of size 0, expected false, got true")
        elif not (self.input_to_cell or self.cell_residual):
            raise ValueError("input_to_cell: nothing enters the cell memory, expected it or cell_residual (or gates of size 0)")

    @property
    def has_cell(self) -> bool:
        """Whether there is a cell memory c."""
        return self.gate_kernel_size != 0

    @property
    def states(self) -> tuple[str, ...]:
        """Its states in the published order."""
        return ("c", "o") if self.has_cell else ("o",)


def kernel_size(name: str, value: Any, *, none: bool = False, zero: bool = False) -> KernelSize | None:
    """A kernel size as a number where it is square, else (height, width); ``none``, ``zero``: whether it may be None, or 0.

    Raises: ``ValueError`` naming the option.
    """
    if none and value is None:
        return None
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int | float) or n != int(n) for n in pair):
        raise ValueError(f"{name}: expected a whole number or (height, width), got {value!r}")
    height, width = int(pair[0]), int(pair[1])
    if min(height, width) < 1 and not (zero and (height, width) == (0, 0)):
        raise ValueError(f"{name}: expected at least 1, got {value!r}")
    return height if height == width else (height, width)


SHALLOW = ReciprocalOptions()
MEDIAN = ReciprocalOptions(
    form="median", cell_channels=64, tau_kernel_size=7, gate_kernel_size=7, ff_kernel_size=2, feedback_kernel_size=1, tau_separable=True,
    gate_separable=True, gate_nonlinearity=Activation.TANH, tau_multiplier=-MEDIAN_TAU, tau_offset=MEDIAN_TAU,
    gate_multiplier=-MEDIAN_GATE, gate_offset=MEDIAN_GATE, input_activation=Activation.ELU, out_residual=True,
    residual_to_out_gate=False, input_to_out=True,
)  # fmt: skip
PRESETS = {"shallow": SHALLOW, "median": MEDIAN}


def reciprocal_options(options: Mapping[str, Any]) -> ReciprocalOptions:
    """The preset of a form (``form``, shallow if it is not named) with other values. ``kernel_size`` is that of tau, gate and feed-forward
    convolutions that are not named.

    Raises: ``ValueError`` naming the option; of an unknown one with the nearest.
    """
    given = dict(options)
    form = given.get("form", "shallow")
    check_choice("form", form, FORMS)
    known = [field.name for field in dataclasses.fields(ReciprocalOptions)]
    if "kernel_size" in given:
        size = given.pop("kernel_size")
        for name in ("tau_kernel_size", "gate_kernel_size", "ff_kernel_size"):
            given.setdefault(name, size)
    for name in given:
        if name not in known:
            raise ValueError(f"options: a reciprocal gated cell has no option {name!r}{nearest(name, known)}; there are {known}")
    if given.get("gate_kernel_size") in (0, (0, 0), [0, 0]) or given.get("gating") is False:  # (the preset's, not the caller's)
        given.setdefault("residual_to_out_gate", False)
    return dataclasses.replace(PRESETS[form], **given)
