"""The declarations of ops that compute areas at one time step (:class:`rnndyn_fast.ops.launch.Op`); the CPU's convolutions have theirs in
:mod:`rnndyn_fast.ops.winograd_conv` and :mod:`rnndyn_fast.ops.amx_conv`.

Maps are channels-last and contiguous, [samples, height, width, channels]. Mathematics: the header of each op, ``csrc/NAME.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import core, cuda_module
from rnndyn_fast.ops.addresses import Use
from rnndyn_fast.ops.launch import PARAMETER, Buffer, Numbers, Op, expect_size, read, update, write

_MAP = "samples height width channels"
_POOLED = "samples height//2 width//2 channels"
_ROW = "channels"
_PER_ELEMENT = "height width channels"

# ---------------------------------------------------------------- area_step


def _check_partial(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    if not device:
        expect_size("partial", sizes, "chunks", core.num_chunks(sizes["height"], sizes["width"], sizes["channels"]))
    return {}


def _check_moments(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    if given.get("moments") is not None:
        expect_size("moments", sizes, "groups", given["moment_groups"][0])
    return {}


def _statistics_of_step(given: Numbers) -> Use:
    return Use.WRITE  # (on devices, always; on the CPU ``complete`` says that they are there)


area_step_forward = Op(
    "area_step_forward",
    sizes=_MAP,
    numbers="modulator_complete eps rectify moment_groups",
    cpu_numbers="complete",  # mean and rstd are there, and the one drive is the value, or there is none, and it is made again
    buffers={
        "drives": read(_MAP),
        "value": Buffer(_MAP, lambda given: Use.READ if given.get("moments") is not None else Use.WRITE),
        "modulators": read(_MAP),
        "drive_bias": read(_ROW, PARAMETER),
        "modulator_bias": read(_ROW, PARAMETER),
        "gamma": read(_PER_ELEMENT, PARAMETER),
        "beta": read(_PER_ELEMENT, PARAMETER),
        "modulator_sum": write(_MAP),
        "state": write(_MAP),
        "max_pooled": write(_POOLED),
        "argmax": write(_POOLED, torch.uint8),
        "mean_pooled": write("samples 1 1 channels"),
        "mean": Buffer("samples", _statistics_of_step, PARAMETER, wide=False),
        "rstd": Buffer("samples", _statistics_of_step, PARAMETER, wide=False),
        "moments": read("samples groups 2", torch.float32),  # on devices, of a fused convolution that left the value too
    },
    derive=_check_moments,
    vectors=True,
)

area_step_backward = Op(
    "area_step_backward",
    sizes=_MAP,
    numbers="multiplicative rectify",
    buffers={
        "grad_states": read(_MAP),
        "value": read(_MAP),
        "drives": read(_MAP),
        "grad_drive": write(_MAP),
        "grad_modulator": write(_MAP),
        "modulator_sum": read(_MAP),
        "grad_max_pooled": read(_POOLED),
        "argmax": read(_POOLED, torch.uint8),
        "grad_mean_pooled": read("samples 1 1 channels"),
        "drive_bias": read(_ROW, PARAMETER),
        "mean": read("samples", PARAMETER, wide=False),
        "rstd": read("samples", PARAMETER, wide=False),
        "gamma": read(_PER_ELEMENT, PARAMETER),
        "beta": read(_PER_ELEMENT, PARAMETER),
        "grad_drive_sum": update(_MAP, PARAMETER),
        "grad_gamma": update(_PER_ELEMENT, PARAMETER),
        "grad_beta": update(_PER_ELEMENT, PARAMETER),
        "partial": write("samples chunks 2", torch.float64, scratch=True),
    },
    derive=_check_partial,
    vectors=True,
)

# ---------------------------------------------------------------- gate_step


def _all_pixels(sizes: dict[str, int]) -> int:
    return sizes["samples"] * sizes["height"] * sizes["width"]


def _gate_sizes(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    pixels, channels = _all_pixels(sizes), [sizes[f"port{k}"] for k in range(len(given["ports"]))]
    if "floats" in sizes:
        expect_size("workspace", sizes, "floats", core.gate_workspace_size(pixels, sum(channels)))
    return {"pixels": pixels, "port_channels": channels}


_gate_step = Op(
    "gate_step",
    sizes="channels",
    numbers="rule forget_bias tau gate activation backward",
    buffers={
        "states": Buffer(_MAP, lambda given: Use.READ if given["backward"] else Use.WRITE),
        "ports": read("samples height width port#"),
        "biases": read("port#", PARAMETER),
        "sums": write("samples height width port#"),
        "grad_ports": write("samples height width port#"),
        "more": read(_MAP, cpu_only=True),
        "grad_biases": write("port#", PARAMETER, cpu_only=True),
        "workspace": write("floats", torch.float32, scratch=True),
    },
    derive=_gate_sizes,
)

GateScalars = tuple[int, float, list[float], list[float], int]  # rule, forget bias, gains (constant, factor, slope), activation


def gate_step(
    scalars: GateScalars,
    *,
    states: Sequence[Tensor],  # [N, H, W, D] each, in the order of the cell: outputs, or in the backward pass their gradients
    more: Sequence[Tensor | None] = (),  # second summands of the states' gradients
    backward: bool = False,
    **buffers: Any,
) -> None:
    """Launch ``gate_step``; the order of ports is that of the cell."""
    if more and core.on_device(states[0]):
        states, more = [s if m is None else s + m for s, m in zip(states, more, strict=True)], ()
    numbers = dict(zip(("rule", "forget_bias", "tau", "gate", "activation"), scalars, strict=True))
    _gate_step(**numbers, states=states, more=more, backward=backward, **buffers)


def _activation_sizes(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    pixels = _all_pixels(sizes)
    expect_size("workspace", sizes, "floats", core.gate_workspace_size(pixels, sizes["channels"]))
    return {"pixels": pixels}


activation_backward = Op(
    "activation_backward",
    sizes="channels",
    numbers="activation",
    buffers={
        "grad": read(_MAP),
        "more": read(_MAP),  # added to it
        "state": read(_MAP),
        "grad_drive": write(_MAP),
        "grad_bias": write(_ROW),
        "workspace": write("floats", torch.float32),
    },
    derive=_activation_sizes,
)

# ---------------------------------------------------------------- norm_step


def _norm_sizes(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    pixels = sizes["height"] * sizes["width"]
    if "floats" in sizes:
        expect_size("workspace", sizes, "floats", core.norm_workspace_size(sizes["samples"], pixels, sizes["channels"], sizes["groups"]))
    return {"pixels": pixels}


def _statistics(given: Numbers) -> str:
    return "samples groups" if given["norm"] == 1 else _ROW


def _statistics_use(given: Numbers) -> Use:
    return Use.READ if given["norm"] == 3 else Use.WRITE  # (of FIXED they are given)


_NORM_NUMBERS = "norm activation rectify_drive squash eps"

norm_step_forward = Op(
    "norm_step_forward",
    sizes="samples channels groups",
    numbers=_NORM_NUMBERS,
    buffers={
        "state": write(_MAP),
        "drives": read(_MAP),
        "modulators": read(_MAP),
        "drive_bias": read(_ROW, PARAMETER),
        "modulator_bias": read(_ROW, PARAMETER),
        "gamma": read(_ROW, PARAMETER),
        "beta": read(_ROW, PARAMETER),
        "drive_sum": write(_MAP),
        "modulator_sum": write(_MAP),
        "mean": Buffer(_statistics, _statistics_use, PARAMETER),
        "rstd": Buffer(_statistics, _statistics_use, PARAMETER),
        "variance": write(_ROW, PARAMETER),
        "workspace": write("floats", torch.float32, scratch=True),
    },
    derive=_norm_sizes,
)

norm_step_backward = Op(
    "norm_step_backward",
    sizes="samples channels groups",
    numbers=_NORM_NUMBERS,
    buffers={
        "grad_state": read(_MAP),
        "drive": read(_MAP),
        "modulator": read(_MAP),
        "gamma": read(_ROW, PARAMETER),
        "beta": read(_ROW, PARAMETER),
        "mean": read(_statistics, PARAMETER),
        "rstd": read(_statistics, PARAMETER),
        "grad_drive": write(_MAP),
        "grad_modulator": write(_MAP),
        "grad_gamma": write(_ROW, PARAMETER),
        "grad_beta": write(_ROW, PARAMETER),
        "grad_drive_bias": write(_ROW, PARAMETER, cpu_only=True),
        "grad_modulator_bias": write(_ROW, PARAMETER, cpu_only=True),
        "workspace": write("floats", torch.float32, scratch=True),
    },
    derive=_norm_sizes,
)

# ---------------------------------------------------------------- depthwise_conv, separable_conv, channels_last

_SOURCE = "samples in_height in_width in_channels"
_KERNEL = "kernel_height kernel_width group_in channels"
_DEPTHWISE_SIZES = "samples channels in_height in_width out_height out_width kernel_height kernel_width group_in"


def _group(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    """Channels of a group in the result; where the kernel begins."""
    inputs, channels = sizes["group_in"], sizes["channels"]
    groups = sizes["in_channels"] // inputs
    if groups * inputs != sizes["in_channels"] or channels % groups:
        raise ValueError(f"weight: expected whole groups of {inputs} of {sizes['in_channels']} channels, and of the result's {channels}")
    top, left = given["before"]
    return {"group_out": channels // groups, "top": top, "left": left, "dilation": given.get("dilation", 1)}


depthwise_conv = Op(
    "depthwise_conv",
    sizes=_DEPTHWISE_SIZES,
    numbers="step",
    buffers={
        "x": read(_SOURCE),
        "weight": read(_KERNEL),
        "bias": read(_ROW, PARAMETER),
        "out": write("samples out_height out_width channels"),
    },
    derive=_group,
)

depthwise_weight_grad = Op(
    "depthwise_weight_grad",
    sizes=_DEPTHWISE_SIZES,
    numbers="step",
    buffers={
        "x": read(_SOURCE),
        "grad": read("samples out_height out_width channels"),
        "grad_weight": write(_KERNEL, PARAMETER),
    },
    derive=_group,
)

separable_conv = Op(
    "separable_conv",
    sizes=f"{_DEPTHWISE_SIZES} out_channels pointwise_stride",
    numbers="step",
    buffers={
        "x": read(_SOURCE),
        "weight": read(_KERNEL),
        "bias": read(_ROW),
        "pointwise": read("channels pointwise_stride"),  # the stride a multiple of 32
        "out": write("samples out_height out_width out_channels"),
    },
    derive=_group,
)

channels_last = Op(
    "channels_last",
    sizes="samples channels",
    numbers="",
    buffers={"x": read("samples channels height width"), "out": write(_MAP)},
    derive=lambda given, sizes, values, device: {"pixels": sizes["height"] * sizes["width"]},
)

# ---------------------------------------------------------------- recurrent_conv, on devices


def _conv_terms(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    """With output pixel h and tap i, a term reads row h * stride + i - padding, or, transposed, the row that a convolution of that stride
    would have sent there, (h + padding - i) / stride."""
    if "groups" in sizes:
        expect_size("moments", sizes, "groups", cuda_module.moment_groups(*(sizes[name] for name in _MAP.split()))[0])
    xs, weights = values.pop("xs"), values.pop("weights")
    terms = []
    for k, (x, weight, (stride, padding, transposed)) in enumerate(zip(xs, weights, given["settings"], strict=True)):
        numbers = [sizes[f"height{k}"], sizes[f"width{k}"], sizes[f"channels{k}"], sizes[f"kernel{k}"], stride, padding]
        terms.append((x, weight, numbers, transposed))
    return {"terms": terms}


# value = s, or drive * (1 + s), with s the sum of the terms, the bias and what is added. settings: stride, padding, transposed.
recurrent_conv = Op(
    "recurrent_conv",
    sizes=_MAP,
    numbers="",
    buffers={
        "value": write(_MAP),
        "xs": read("samples height# width# channels#"),
        "weights": read("channels kernel# kernel# channels#"),
        "bias": read(_ROW, PARAMETER),
        "added": read(_MAP),
        "drive": read(_MAP),
        "modulator_sum": write(_MAP),
        "moments": write("samples groups 2", torch.float32),
    },
    derive=_conv_terms,
    vectors=True,
)

# Of a convolution, rows are the output's gradient and gathered is its input; of a transposed one, the other way round.
recurrent_conv_weight_grad = Op(
    "recurrent_conv_weight_grad",
    sizes="samples height width row_channels gathered_height gathered_width gathered_channels kernel",
    numbers="stride padding",
    buffers={
        "rows": read("samples height width row_channels"),
        "gathered": read("samples gathered_height gathered_width gathered_channels"),
        "grad_weight": write("row_channels kernel kernel gathered_channels", torch.float32),
    },
    vectors=True,
)
