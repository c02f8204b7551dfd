"""``ctrnn_train``: an epoch of many networks in one call; each network's epoch is one thread's work and depends on that network alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from rnndyn_fast.ops import core, sequence_launches
from rnndyn_fast.ops.ctrnn_launch import activation_codes
from rnndyn_fast.reference.ctrnn_train import CtrnnTraining
from rnndyn_fast.reference.ctrnn_train import ctrnn_train as reference_ctrnn_train


def can_run_ctrnn_train(run: CtrnnTraining, raise_error: bool = False) -> bool:
    """Whether the native backend takes this training: float32 or float64 parameters on the CPU.

    Raises:
        ValueError: it does not, and ``raise_error``; the message is the reason.
    """
    reason = core.unavailable
    if reason is None and run.parameters.device.type != "cpu":
        reason = f"parameters are on {run.parameters.device}, and the native backend runs on the CPU"
    elif reason is None and run.parameters.dtype not in (torch.float32, torch.float64):
        reason = f"parameters have dtype {run.parameters.dtype}, and the native backend takes float32 and float64"
    if reason is not None and raise_error:
        raise ValueError(f"backend='native': {reason}; backend='reference' takes them")
    return reason is None


def _check(run: CtrnnTraining, chosen: Tensor) -> None:  # [K]
    m, n, t, _ = run.train_inputs.shape
    if run.batch < 1 or run.order.dim() != 2 or run.order.shape[0] != m or run.order.shape[1] % run.batch or not run.order.numel():
        raise ValueError(f"order: expected [M, batches * batch] with M = {m} and batch = {run.batch}, got {list(run.order.shape)}")
    if not 1 <= run.loss_steps <= t:
        raise ValueError(f"loss_steps: expected a number in [1, {t}], got {run.loss_steps}")
    for name, rows, size in (("chosen", None, m), ("order", chosen, n)):
        index = chosen if rows is None else run.order[rows]
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(f"{name}: expected indices in [0, {size}), got [{int(index.min())}, {int(index.max())}]")
    if len(chosen.unique()) != len(chosen):
        raise ValueError("chosen: expected every model once at most")
    if len(run.activations) != m:
        raise ValueError(f"activations: expected {m}, one per model, got {len(run.activations)}")
    steps = (int(run.epoch.max()) + 1) * (run.order.shape[1] // run.batch)
    if int(run.epoch.min()) < 0 or 2 * steps >= 2**31:
        raise ValueError("epoch: expected at least 0, and fewer than 2^30 optimiser steps in all: noise has that many streams")


def ctrnn_train(run: CtrnnTraining, chosen: Sequence[int], backend: str | None = None) -> None:
    """One epoch of the chosen models: forward, loss, BPTT, AdamW and metrics of every batch, then the validation trials.

    The equations are those of ``reference.ctrnn_train``. ``run.parameters``, the moments and ``run.metrics`` of the chosen models are
    written; ``run.epoch`` is left to the caller.

    Args:
        run: networks, data and state of the optimiser.
        chosen: the models to train; others are not touched, and cost nothing.
        backend: "native", "reference" (plain PyTorch) or None: native where ``can_run_ctrnn_train`` says so, else the reference with a
            warning.

    Raises:
        ValueError: naming the argument, what was expected, what came.

    Differentiable: no. Deterministic: yes, for any number of threads and whichever other models are chosen.
    Memory: about 1 MB per thread at the published sizes.

    Source: Murray, arXiv 2310.07908, and the published training code's settings.
    """
    index = torch.as_tensor(chosen, dtype=torch.int64)
    _check(run, index)
    if backend not in (None, "native", "reference"):
        raise ValueError(f'backend: expected "native", "reference" or None, got {backend!r}')
    if backend is None and not can_run_ctrnn_train(run):
        try:
            can_run_ctrnn_train(run, raise_error=True)
        except ValueError as reason:
            warnings.warn(f"training with slow plain PyTorch: {reason}", stacklevel=2)
        backend = "reference"
    elif backend == "native":
        can_run_ctrnn_train(run, raise_error=True)
    if len(index) == 0:
        return
    if backend == "reference":
        reference_ctrnn_train(run, index.tolist())
    else:
        _launch(run, index)


def _launch(run: CtrnnTraining, chosen: Tensor) -> None:  # [K]
    o, (units, inputs) = run.optimiser, (run.h0.shape[1], run.train_inputs.shape[3])
    sequence_launches.ctrnn_train(
        parameters=run.parameters, first_moment=run.first_moment, second_moment=run.second_moment, train_inputs=run.train_inputs,
        train_labels=run.train_labels, val_inputs=run.val_inputs, val_labels=run.val_labels, order=run.order, chosen=chosen, h0=run.h0,
        alpha=run.alpha, noise_std=run.noise_std, activations=activation_codes(run.activations, chosen.device), seeds=run.seeds,
        epoch=run.epoch, learning_rate=run.learning_rate, metrics=run.metrics, trials=run.batch,
        parameters_of_one=(units + inputs + 1) * units + units + 1, batches=run.order.shape[1] // run.batch,
        beta1=o.beta1, beta2=o.beta2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm, activity_weight=run.activity_weight,
        loss_steps=run.loss_steps, metrics_after=run.metrics_after,
    )  # fmt: skip
