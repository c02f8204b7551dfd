"""Launches of the CUDA kernels of cells and of continuous-time networks; see :mod:`rnndyn_fast.ops._launch_cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch_cuda
from rnndyn_fast.ops._launch_cuda import DTYPES, Launch


def gate_step(
    scalars: tuple[int, float, list[float], list[float], int],  # rule, forget bias, gains (constant, factor, slope), activation
    ports: Sequence[Sequence[Tensor]],  # terms of each port, [N, H, W, m * D]
    biases: Sequence[Tensor | None],  # [m * D] float32 of each port, or none at all
    sums: Sequence[Tensor | None],  # [N, H, W, m * D], where the sum of a port's terms and bias is wanted; or none at all
    states: Sequence[Tensor],  # [N, H, W, D] each: outputs, or in the backward pass their gradients
    grad_ports: Sequence[Tensor],  # [N, H, W, m * D] each: outputs of the backward pass
    *,
    backward: bool,
) -> None:
    """Launch ``gate_step``; the order of ports and states is that of the cell."""
    n, h, w, channels = shape = tuple(states[0].shape)
    launch = Launch(states[0])
    rule, forget_bias, tau, gate, activation = scalars
    sizes = [(n, h, w, terms[0].shape[3]) for terms in ports]
    rows = biases or [None] * len(ports)
    totals = list(sums)
    if not backward:
        totals = [launch.room_of_sum(*one) for one in zip(sums or [None] * len(ports), ports, rows, strict=True)]
    _launch_cuda.module().gate_step(
        DTYPES[launch.dtype], launch.queue, rule, n * h * w, channels, forget_bias, tau, gate, activation,
        [launch.terms(terms, f"ports[{k}]", size) for k, (terms, size) in enumerate(zip(ports, sizes, strict=True))],
        [launch.read(bias, f"biases[{k}]", sizes[k][3:], torch.float32) for k, bias in enumerate(rows)],
        [launch.write(total, f"sums[{k}]", sizes[k]) for k, total in enumerate(totals)],
        [(launch.read if backward else launch.write)(s, f"states[{k}]", shape) for k, s in enumerate(states)],
        [launch.write(grad, f"grad_ports[{k}]", sizes[k]) for k, grad in enumerate(grad_ports)],
        backward,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _on(device: torch.device, codes: tuple[int, ...]) -> Tensor:
    return torch.tensor(codes, dtype=torch.int32, device=device)


def _codes(codes: Tensor, device: torch.device) -> Tensor:
    """Copied to a device once (a copy waits for it)."""
    return _on(device, tuple(codes.tolist()))


def ctrnn_forward(
    inputs: Tensor,  # [M, N, T, I], or [1, N, T, I] for all models
    w_rec: Tensor,  # [M, H, H]
    b_rec: Tensor,  # [M, H]
    w_in: Tensor,  # [M, I, H]
    h0: Tensor,  # [M, N, H]
    alpha: Tensor,  # [M]
    noise_std: Tensor,  # [M]
    codes: Tensor,  # [M] int32, on the CPU: activations
    seeds: Tensor | None,  # [M] int64
    stream: int,
    first_trial: int,
    rates: Tensor,  # [M, N, T, H]
    states: Tensor | None,  # [M, N, T, H]
) -> None:
    """Launch ``ctrnn`` forward: rates and states are written."""
    m, n, t, h = full = tuple(rates.shape)
    i, launch = inputs.shape[3], Launch(rates)
    activations = _codes(codes, launch.device)
    _launch_cuda.module().ctrnn_forward(
        launch.queue,
        [m, n, t, i, h],
        launch.read(inputs, "inputs", (inputs.shape[0], n, t, i)),
        n * t * i if inputs.shape[0] == m else 0,
        launch.read(w_rec, "w_rec", (m, h, h)),
        launch.read(b_rec, "b_rec", (m, h)),
        launch.read(w_in, "w_in", (m, i, h)),
        launch.read(h0, "h0", (m, n, h)),
        launch.read(alpha, "alpha", (m,)),
        launch.read(noise_std, "noise_std", (m,)),
        launch.read(activations, "activations", (m,), torch.int32),
        launch.read(seeds, "noise_seeds", (m,), torch.int64),
        stream,
        first_trial,
        launch.write(rates, "rates", full),
        launch.write(states, "states", full),
    )


def ctrnn_backward(
    inputs: Tensor,  # [M, N, T, I], or [1, N, T, I] for all models
    w_rec: Tensor,  # [M, H, H]
    w_in: Tensor,  # [M, I, H]
    h0: Tensor,  # [M, N, H]
    alpha: Tensor,  # [M]
    codes: Tensor,  # [M] int32, on the CPU: activations
    rates: Tensor,  # [M, N, T, H]
    grad_rates: Tensor | None,  # [M, N, T, H]
    grad_states: Tensor | None,  # [M, N, T, H]
    grad_inputs: Tensor | None,  # [M, N, T, I]
    grad_weights: Tensor,  # [M, H + I + 1, H]
    grad_h0: Tensor,  # [M, N, H]
) -> None:
    """Launch ``ctrnn`` backward; the gradients of weights and inputs are matrix products over all trials and steps, by torch."""
    m, n, t, h = full = tuple(rates.shape)
    i, launch = inputs.shape[3], Launch(rates)
    activations, w_rec_t = _codes(codes, launch.device), w_rec.transpose(1, 2).contiguous()
    d, rates0 = torch.empty_like(rates), torch.empty_like(h0)
    _launch_cuda.module().ctrnn_backward(
        launch.queue,
        [m, n, t, i, h],
        launch.read(w_rec_t, "w_rec", (m, h, h)),
        launch.read(h0, "h0", (m, n, h)),
        launch.read(alpha, "alpha", (m,)),
        launch.read(activations, "activations", (m,), torch.int32),
        launch.read(rates, "rates", full),
        launch.read(grad_rates, "grad_rates", full),
        launch.read(grad_states, "grad_states", full),
        launch.write(d, "d", full),
        launch.write(grad_h0, "grad_h0", (m, n, h)),
        launch.write(rates0, "rates0", (m, n, h)),
    )
    before = torch.cat([rates0[:, :, None], rates[:, :, :-1]], 2).flatten(1, 2)
    shown, rows = inputs.expand(m, n, t, i).flatten(1, 2), d.flatten(1, 2)
    torch.bmm(before.transpose(1, 2), rows, out=grad_weights[:, :h])
    torch.bmm(shown.transpose(1, 2), rows, out=grad_weights[:, h : h + i])
    torch.sum(rows, 1, out=grad_weights[:, h + i])
    if grad_inputs is not None:
        grad_inputs.copy_(torch.bmm(rows, w_in.transpose(1, 2)).view_as(grad_inputs))
