"""The declarations of ops (:class:`rnndyn_fast.ops.launch.Op`) but for the CPU's convolutions, which stand beside those.

Maps are channels-last and contiguous, [samples, height, width, channels]. Mathematics: the header of each op, ``csrc/NAME.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import core, cuda_module
from rnndyn_fast.ops.addresses import Use
from rnndyn_fast.ops.launch import PARAMETER, Buffer, Numbers, Op, read, update, write

_MAP = "samples height width channels"
_POOLED = "samples height//2 width//2 channels"
_ROW = "channels"
_PER_ELEMENT = "height width channels"

# ---------------------------------------------------------------- area_step


def _expect(name: str, sizes: dict[str, int], size: str, expected: int) -> None:
    """Check a size that others tell, of a buffer that may be absent."""
    if sizes.get(size, expected) != expected:
        raise ValueError(f"{name}: expected {expected} {size}, got {sizes[size]}")


def _check_partial(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    if not device:
        _expect("partial", sizes, "chunks", core.num_chunks(sizes["height"], sizes["width"], sizes["channels"]))
    return {}


def _check_moments(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    if given.get("moments") is not None:
        _expect("moments", sizes, "groups", given["moment_groups"][0])
    return {}


def _given_before(given: Numbers) -> Use:
    return Use.READ if given.get("complete") else Use.WRITE


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
        "mean": Buffer("samples", _given_before, PARAMETER, wide=False),
        "rstd": Buffer("samples", _given_before, PARAMETER, wide=False),
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
        _expect("workspace", sizes, "floats", core.gate_workspace_size(pixels, sum(channels)))
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
    _expect("workspace", sizes, "floats", core.gate_workspace_size(pixels, sizes["channels"]))
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
        _expect("workspace", sizes, "floats", core.norm_workspace_size(sizes["samples"], pixels, sizes["channels"], sizes["groups"]))
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
        _expect("moments", sizes, "groups", cuda_module.moment_groups(*(sizes[name] for name in _MAP.split()))[0])
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

# ---------------------------------------------------------------- readout_zones, trajectory_norms


def _zone_strides(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    representations, previous, log_probs = given["representations"], given.get("previous"), given.get("log_probs")
    strides: dict[str, Any] = {
        "representation_strides": representations.stride()[:2],
        "previous_stride": 0 if previous is None else previous.stride(0),
    }
    if not device:
        strides["log_prob_strides"] = (0, 0) if log_probs is None else log_probs.stride()[:2]
    return strides


_TABLE = "timesteps samples"

# Labels must lie in [0, C). Without weight, cosine holds the products r . w_c on entry; on devices always.
readout_zones = Op(
    "readout_zones",
    sizes="timesteps samples dims classes",
    numbers="",
    buffers={
        "representations": read("timesteps samples dims", rows_apart=True),
        "previous": read("samples dims", rows_apart=True),
        "cosine": update("timesteps samples classes", PARAMETER),
        "log_probs": read("timesteps samples classes", PARAMETER, rows_apart="cpu"),
        "labels": read("samples", torch.int64),
        "bias": read("classes", PARAMETER),
        "weight_norm": read("classes", PARAMETER),
        "inverse_distance": read("classes classes", PARAMETER),
        "weight": read("classes dims", torch.float32, cpu_only=True),
        "predicted": write(_TABLE, torch.int64),
        **{name: write(_TABLE, PARAMETER) for name in ("norm", "cos_predicted", "cos_label", "margin", "boundary_distance", "change")},
    },
    derive=_zone_strides,
)


def _row_strides(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    _expect("change", sizes, "changes", sizes["timesteps"] - 1)
    return dict(zip(("step_stride", "row_stride"), given["values"].stride()[:2], strict=True))


trajectory_norms = Op(
    "trajectory_norms",
    sizes="timesteps samples dims",
    numbers="",
    buffers={
        "values": read("timesteps samples dims", rows_apart=True),
        "norm": write(_TABLE, torch.float64),
        "change": write("changes samples", torch.float64),
    },
    derive=_row_strides,
)

# ---------------------------------------------------------------- ctrnn

_RATES = "models trials steps units"
_CTRNN_SIZES = "models trials steps inputs_per_step units"


def _input_stride(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    inputs = given["inputs"]
    if inputs.shape[0] not in (1, sizes["models"]):
        raise ValueError(f"inputs: expected those of 1 or {sizes['models']} models, got {inputs.shape[0]}")
    _expect("grad_weights", sizes, "rows", sizes["units"] + sizes["inputs_per_step"] + 1)
    return {"input_model_stride": inputs[0].numel() if inputs.shape[0] == sizes["models"] else 0}


_NETWORK = {
    "w_rec": read("models units units"),
    "h0": read("models trials units"),
    "alpha": read("models"),
    "activations": read("models", torch.int32),
}

ctrnn_forward = Op(
    "ctrnn_forward",
    sizes=_CTRNN_SIZES,
    numbers="stream first_trial",
    buffers={
        "rates": write(_RATES),
        "inputs": read("input_models trials steps inputs_per_step"),  # one for all models, or one for each
        **_NETWORK,
        "b_rec": read("models units"),
        "w_in": read("models inputs_per_step units"),
        "noise_std": read("models"),
        "noise_seeds": read("models", torch.int64),
        "states": write(_RATES),
    },
    derive=_input_stride,
)

# The gradients of w_rec, w_in and b_rec lie below one another in grad_weights.
ctrnn_backward = Op(
    "ctrnn_backward",
    sizes=_CTRNN_SIZES,
    numbers="",
    buffers={
        "rates": read(_RATES),
        "inputs": read("input_models trials steps inputs_per_step"),
        **_NETWORK,
        "w_in": read("models inputs_per_step units"),
        "grad_rates": read(_RATES),
        "grad_states": read(_RATES),
        "grad_inputs": write("models trials steps inputs_per_step"),
        "grad_weights": write("models rows units"),
        "grad_h0": write("models trials units"),
    },
    derive=_input_stride,
)

# On devices: d, the gradient of what enters each step's bracket, from which products make the gradients of weights; rates0 = f(h0).
ctrnn_backward_steps = Op(
    "ctrnn_backward",
    sizes=_CTRNN_SIZES,
    numbers="",
    buffers={
        "rates": read(_RATES),
        **_NETWORK,  # w_rec transposed
        "grad_rates": read(_RATES),
        "grad_states": read(_RATES),
        "d": write(_RATES),
        "grad_h0": write("models trials units"),
        "rates0": write("models trials units"),
    },
)


def _check_training(given: Numbers, sizes: dict[str, int], values: dict[str, Any], device: bool) -> dict[str, Any]:
    _expect("order", sizes, "order_of_one", given["batches"] * sizes["trials"])
    return {}


# An epoch of the chosen models. ``trials``: of a batch; ``parameters_of_one``: of a model.
ctrnn_train = Op(
    "ctrnn_train",
    sizes=f"{_CTRNN_SIZES} num_chosen train_trials val_trials",
    numbers="batches beta1 beta2 eps weight_decay clip_norm activity_weight loss_steps metrics_after",
    buffers={
        "parameters": update("models parameters_of_one"),
        "first_moment": update("models parameters_of_one"),
        "second_moment": update("models parameters_of_one"),
        "train_inputs": read("models train_trials steps inputs_per_step", torch.float32),
        "train_labels": read("models train_trials", torch.float32),
        "val_inputs": read("models val_trials steps inputs_per_step", torch.float32),
        "val_labels": read("models val_trials", torch.float32),
        "order": read("models order_of_one", torch.int64),
        "chosen": read("num_chosen", torch.int64),
        "h0": read("models units"),
        "alpha": read("models"),
        "noise_std": read("models"),
        "activations": read("models", torch.int32),
        "seeds": read("models", torch.int64),
        "epoch": read("models", torch.int64),
        "learning_rate": read("models"),
        "metrics": write("models 3 3", torch.float64),
    },
    derive=_check_training,
)
