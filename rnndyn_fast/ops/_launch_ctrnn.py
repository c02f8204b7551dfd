"""Launches of the continuous-time kernels; addresses come from :mod:`rnndyn_fast.ops._launch`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch
from rnndyn_fast.reference.ctrnn import Activation
from rnndyn_fast.reference.ctrnn_train import CtrnnTraining

if _launch.unavailable is None:
    from rnndyn_fast.ops._launch import _core

ACTIVATIONS = tuple(Activation)  # in the order of CtrnnActivation (ctrnn.h)


def _codes(activations: Sequence[Activation]) -> Tensor:
    return torch.tensor([ACTIVATIONS.index(a) for a in activations], dtype=torch.int32, device="cpu")


def ctrnn_forward(
    inputs: Tensor,  # [M, N, T, I], or [1, N, T, I] for all models
    w_rec: Tensor,  # [M, H, H]
    b_rec: Tensor,  # [M, H]
    w_in: Tensor,  # [M, I, H]
    h0: Tensor,  # [M, N, H]
    alpha: Tensor,  # [M]
    noise_std: Tensor,  # [M]
    activations: Sequence[Activation],
    seeds: Tensor | None,  # [M] int64
    stream: int,
    first_trial: int,
    rates: Tensor,  # [M, N, T, H]
    states: Tensor | None,  # [M, N, T, H]
) -> None:
    """Launch ``ctrnn`` forward: rates and states are written."""
    if _launch.on_device(rates):
        from rnndyn_fast.ops import _launch_cells_cuda

        return _launch_cells_cuda.ctrnn_forward(
            inputs, w_rec, b_rec, w_in, h0, alpha, noise_std, _codes(activations), seeds, stream, first_trial, rates, states
        )
    m, n, t, h = full = tuple(rates.shape)
    i, dtype = inputs.shape[3], rates.dtype
    sizes, threads = [m, n, t, i, h], torch.get_num_threads()
    codes = _codes(activations)
    kept, workspace = _launch.workspace_of(-(-_core.ctrnn_forward_workspace(sizes, threads) // 4))
    launch = _core.ctrnn_forward_float32 if dtype == torch.float32 else _core.ctrnn_forward_float64
    launch(
        sizes,
        threads,
        _launch.address_of(inputs, "inputs", (inputs.shape[0], n, t, i), dtype),
        n * t * i if inputs.shape[0] == m else 0,
        _launch.address_of(w_rec, "w_rec", (m, h, h), dtype),
        _launch.address_of(b_rec, "b_rec", (m, h), dtype),
        _launch.address_of(w_in, "w_in", (m, i, h), dtype),
        _launch.address_of(h0, "h0", (m, n, h), dtype),
        _launch.address_of(alpha, "alpha", (m,), dtype),
        _launch.address_of(noise_std, "noise_std", (m,), dtype),
        _launch.address_of(codes, "activations", (m,), torch.int32),
        _launch.address_of(seeds, "noise_seeds", (m,), torch.int64),
        stream,
        first_trial,
        _launch.address_of(rates, "rates", full, dtype),
        _launch.address_of(states, "states", full, dtype),
        workspace,
    )
    del kept


def ctrnn_backward(
    inputs: Tensor,  # [M, N, T, I], or [1, N, T, I] for all models
    w_rec: Tensor,  # [M, H, H]
    w_in: Tensor,  # [M, I, H]
    h0: Tensor,  # [M, N, H]
    alpha: Tensor,  # [M]
    activations: Sequence[Activation],
    rates: Tensor,  # [M, N, T, H]
    grad_rates: Tensor | None,  # [M, N, T, H]
    grad_states: Tensor | None,  # [M, N, T, H]
    grad_inputs: Tensor | None,  # [M, N, T, I]
    grad_weights: Tensor,  # [M, H + I + 1, H]
    grad_h0: Tensor,  # [M, N, H]
) -> None:
    """Launch ``ctrnn`` backward: gradients are written; those of w_rec, w_in and b_rec lie below one another in grad_weights."""
    if _launch.on_device(rates):
        from rnndyn_fast.ops import _launch_cells_cuda

        return _launch_cells_cuda.ctrnn_backward(
            inputs, w_rec, w_in, h0, alpha, _codes(activations), rates, grad_rates, grad_states, grad_inputs, grad_weights, grad_h0
        )
    m, n, t, h = full = tuple(rates.shape)
    i, dtype = inputs.shape[3], rates.dtype
    sizes, threads = [m, n, t, i, h], torch.get_num_threads()
    codes = _codes(activations)
    kept, workspace = _launch.workspace_of(-(-_core.ctrnn_backward_workspace(sizes, threads) // 4))
    launch = _core.ctrnn_backward_float32 if dtype == torch.float32 else _core.ctrnn_backward_float64
    launch(
        sizes,
        threads,
        _launch.address_of(inputs, "inputs", (inputs.shape[0], n, t, i), dtype),
        n * t * i if inputs.shape[0] == m else 0,
        _launch.address_of(w_rec, "w_rec", (m, h, h), dtype),
        _launch.address_of(w_in, "w_in", (m, i, h), dtype),
        _launch.address_of(h0, "h0", (m, n, h), dtype),
        _launch.address_of(alpha, "alpha", (m,), dtype),
        _launch.address_of(codes, "activations", (m,), torch.int32),
        _launch.address_of(rates, "rates", full, dtype),
        _launch.address_of(grad_rates, "grad_rates", full, dtype),
        _launch.address_of(grad_states, "grad_states", full, dtype),
        _launch.address_of(grad_inputs, "grad_inputs", (m, n, t, i), dtype),
        _launch.address_of(grad_weights, "grad_weights", (m, h + i + 1, h), dtype),
        _launch.address_of(grad_h0, "grad_h0", (m, n, h), dtype),
        workspace,
    )
    del kept


def ctrnn_train(run: CtrnnTraining, chosen: Tensor) -> None:  # [K] int64
    """Launch an epoch of the chosen models. Entries of ``order`` and ``chosen`` must be valid: the caller made them."""
    m, n, t, i = run.train_inputs.shape
    h, dtype = run.h0.shape[1], run.parameters.dtype
    val, count = run.val_labels.shape[1], (h + i + 1) * h + h + 1
    batches, o = run.order.shape[1] // run.batch, run.optimiser
    sizes, threads = [m, run.batch, t, i, h], torch.get_num_threads()
    codes = _codes(run.activations)
    kept, workspace = _launch.workspace_of(-(-_core.ctrnn_train_workspace(sizes, run.loss_steps, threads) // 4))
    launch = _core.ctrnn_train_float32 if dtype == torch.float32 else _core.ctrnn_train_float64
    launch(
        sizes,
        threads,
        len(chosen),
        _launch.address_of(chosen, "chosen", (len(chosen),), torch.int64),
        [
            _launch.address_of(run.train_inputs, "train_inputs", (m, n, t, i), torch.float32),
            _launch.address_of(run.train_labels, "train_labels", (m, n), torch.float32),
            _launch.address_of(run.order, "order", (m, batches * run.batch), torch.int64),
            _launch.address_of(run.val_inputs, "val_inputs", (m, val, t, i), torch.float32),
            _launch.address_of(run.val_labels, "val_labels", (m, val), torch.float32),
        ],
        [n, batches, val],
        [
            _launch.address_of(run.h0, "h0", (m, h), dtype),
            _launch.address_of(run.alpha, "alpha", (m,), dtype),
            _launch.address_of(run.noise_std, "noise_std", (m,), dtype),
            _launch.address_of(codes, "activations", (m,), torch.int32),
            _launch.address_of(run.seeds, "seeds", (m,), torch.int64),
            _launch.address_of(run.epoch, "epoch", (m,), torch.int64),
        ],
        _launch.address_of(run.learning_rate, "learning_rate", (m,), dtype),
        [o.beta1, o.beta2, o.eps, o.weight_decay, o.clip_norm, run.activity_weight],
        run.loss_steps,
        run.metrics_after,
        _launch.address_of(run.parameters, "parameters", (m, count), dtype),
        _launch.address_of(run.first_moment, "first_moment", (m, count), dtype),
        _launch.address_of(run.second_moment, "second_moment", (m, count), dtype),
        _launch.address_of(run.metrics, "metrics", (m, 3, 3), torch.float64),
        workspace,
    )
    del kept
