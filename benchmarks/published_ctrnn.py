"""The continuous-time RNN and its training step written the plain way, a PyTorch operation per term and time step: the peer of the
benchmarks. Settings as published (arXiv 2310.07908): noise inside the leak's bracket, loss over the last three steps plus mean squared
rate, AdamW with decay 1e-4 on all parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

STEPS_OF_LOSS, ACTIVITY, LR, DECAY = 3, 1e-4, 1e-4, 1e-4


class PlainCTRNN(nn.Module):
    """One network; with ``models``, that many at once by batched matrix products."""

    def __init__(
        self,
        w_rec: Tensor,  # [H, H] or [M, H, H]
        b_rec: Tensor,  # [H] or [M, 1, H]
        w_in: Tensor,  # [I, H] or [M, I, H]
        w_out: Tensor,  # [H, 1] or [M, H, 1]
        b_out: Tensor,  # [1] or [M, 1, 1]
        alpha: float,
        noise_std: float,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ) -> None:
        super().__init__()
        self.w_rec, self.b_rec, self.w_in = nn.Parameter(w_rec), nn.Parameter(b_rec), nn.Parameter(w_in)
        self.w_out, self.b_out = nn.Parameter(w_out), nn.Parameter(b_out)
        self.alpha, self.noise_std, self.activation = alpha, noise_std, activation

    def forward(self, inputs: Tensor, noise: bool = True) -> tuple[Tensor, Tensor]:  # [(M,) N, T, I]
        """Outputs [(M,) N, T] and rates [(M,) N, T, H]."""
        state = torch.ones((*inputs.shape[:-2], self.w_rec.shape[-1]), dtype=inputs.dtype)
        outputs, rates = [], []
        for t in range(inputs.shape[-2]):
            drive = self.activation(state) @ self.w_rec + self.b_rec + inputs[..., t, :] @ self.w_in
            if noise:
                drive = drive + self.noise_std * torch.randn_like(state)
            state = (1 - self.alpha) * state + self.alpha * drive
            rate = self.activation(state)
            outputs.append((rate @ self.w_out + self.b_out)[..., 0])
            rates.append(rate)
        return torch.stack(outputs, -1), torch.stack(rates, -2)

    def loss(self, inputs: Tensor, labels: Tensor, noise: bool = True) -> Tensor:  # [(M,) N, T, I], [(M,) N]
        """Of the network, or summed over the networks (whose gradients do not mix)."""
        outputs, rates = self(inputs, noise)
        error = (outputs[..., -STEPS_OF_LOSS:] - labels[..., None]).square().mean((-2, -1))
        return (error + ACTIVITY * rates.square().mean((-3, -2, -1))).sum()


def optimiser(net: nn.Module, **options: bool) -> torch.optim.Optimizer:
    """As published."""
    return torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=DECAY, **options)


def training_step(
    net: nn.Module,
    loss_of: Callable[..., Tensor],
    adamw: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
) -> float:
    """Forward, backward and step; the loss before it."""
    adamw.zero_grad(set_to_none=True)
    loss = loss_of(inputs, labels)
    loss.backward()
    adamw.step()
    return float(loss.detach())


@torch.no_grad()
def metrics(net: PlainCTRNN, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss and accuracy of a batch, as computed again after each step and for validation."""
    outputs, rates = net(inputs)
    error = (outputs[..., -STEPS_OF_LOSS:] - labels[..., None]).square().mean()
    last = outputs[..., -1]
    said = (last > 0.5).float() - (last < -0.5).float()
    return float(error + ACTIVITY * rates.square().mean()), float((said == labels).float().mean())
