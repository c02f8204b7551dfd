"""The declarations of ops over whole sequences: readout zones, norms of trajectories, and continuous-time networks
(:class:`rnndyn_fast.ops.launch.Op`). Mathematics: the header of each op, ``csrc/NAME.h``."""

from __future__ import annotations

from typing import Any

import torch

from rnndyn_fast.ops.launch import PARAMETER, Numbers, Op, expect_size, read, update, write

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
    expect_size("change", sizes, "changes", sizes["timesteps"] - 1)
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
    expect_size("grad_weights", sizes, "rows", sizes["units"] + sizes["inputs_per_step"] + 1)
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
    expect_size("order", sizes, "order_of_one", given["batches"] * sizes["trials"])
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
