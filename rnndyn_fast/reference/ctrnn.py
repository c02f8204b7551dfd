"""``ctrnn`` in plain PyTorch: the specification of ``ops.ctrnn``, for any float dtype, differentiable any number of times."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor


class Activation(enum.Enum):
    """Rate of a unit as a function of its state."""

    TANH = "tanh"
    RELU = "relu"
    SIGMOID = "sigmoid"
    SOFTPLUS = "softplus"
    IDENTITY = "identity"


_FUNCTIONS = {
    Activation.TANH: torch.tanh,
    Activation.RELU: torch.relu,
    Activation.SIGMOID: torch.sigmoid,
    Activation.SOFTPLUS: lambda x: torch.logaddexp(x, torch.zeros_like(x)),  # (torch.nn.functional.softplus is x itself from 20 on)
    Activation.IDENTITY: lambda x: x,
}


def rates(states: Tensor, activations: Sequence[Activation]) -> Tensor:  # [M, ...] -> [M, ...]
    """Rates of states, with one activation per model."""
    if len(set(activations)) == 1:
        return _FUNCTIONS[activations[0]](states)
    return torch.stack([_FUNCTIONS[a](h) for a, h in zip(activations, states.unbind(0), strict=True)])


def ctrnn_step(
    state: Tensor,  # [M, N, H]
    inputs: Tensor,  # [M, N, I]
    w_rec: Tensor,  # [M, H, H]
    b_rec: Tensor,  # [M, H]
    w_in: Tensor,  # [M, I, H]
    alpha: Tensor,  # [M]
    activations: Sequence[Activation],
    scaled_noise: Tensor | None = None,  # [M, N, H]
) -> Tensor:
    """The map ``h -> (1 - a) h + a (f(h) W + b + u V + noise)`` of one time step: [M, N, H]."""
    drive = rates(state, activations) @ w_rec + b_rec[:, None] + inputs @ w_in
    if scaled_noise is not None:
        drive = drive + scaled_noise
    leak = alpha[:, None, None]
    return (1 - leak) * state + leak * drive


def ctrnn(
    inputs: Tensor,  # [M, N, T, I]
    w_rec: Tensor,  # [M, H, H]
    b_rec: Tensor,  # [M, H]
    w_in: Tensor,  # [M, I, H]
    h0: Tensor,  # [M, H] or [M, N, H]
    alpha: Tensor,  # [M]
    noise_std: Tensor,  # [M]
    activations: Sequence[Activation],
    noise: Tensor | None = None,  # [M, N, T, H]
) -> tuple[Tensor, Tensor]:
    r"""Many continuous-time recurrent networks through a sequence.

    .. math:: h_t = (1 - \alpha) h_{t-1} + \alpha\,(f(h_{t-1}) W + b + u_t V + \sigma \xi_t), \quad r_t = f(h_t)

    Args:
        inputs: u, one sequence per model and trial.
        w_rec: W; ``w_rec[m, j, i]`` goes from unit j to unit i (row vectors).
        b_rec, w_in: b and V.
        h0: the state before the first step, per model, or per model and trial.
        alpha: time step over time constant, in (0, 1].
        noise_std: sigma, inside the leak's bracket: it enters the state times alpha.
        activations: f, one per model.
        noise: xi, unit normals, or None for none.

    Returns: rates and states after each step, both [M, N, T, H].

    Source: Murray, arXiv 2310.07908.
    """
    state = h0 if h0.dim() == 3 else h0[:, None].expand(-1, inputs.shape[1], -1)
    states = []
    for t in range(inputs.shape[2]):
        scaled = None if noise is None else noise_std[:, None, None] * noise[:, :, t]
        state = ctrnn_step(state, inputs[:, :, t], w_rec, b_rec, w_in, alpha, activations, scaled)
        states.append(state)
    stacked = torch.stack(states, 2)
    return rates(stacked, activations), stacked
