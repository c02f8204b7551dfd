"""From logits over time to one answer.

``p_t = softmax(beta z_t)`` with a learned scalar beta (``softmax_beta``). All take logits [T, N, classes] and give [N, classes].

Source: Nayebi et al., Neural Computation 34 (2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Decoder(nn.Module):
    """Base: ``steps`` are the chosen time steps of the last call, where the decoder chooses some. ``windowed``: it looks at the
    image-driven steps only."""

    windowed = True
    steps: Tensor | None = None  # [N], or [N, classes]

    def confidence(
        self,
        logits: Tensor,  # [T, N, classes]
    ) -> Tensor:
        """Largest probability of each step: [T, N]."""
        return torch.softmax(logits * getattr(self, "softmax_beta", 1.0), -1).amax(-1)

    def take(
        self,
        logits: Tensor,  # [T, N, classes]
        steps: Tensor,  # [N]
    ) -> Tensor:
        """The logits of one step per sample: [N, classes]."""
        self.steps = steps
        return logits.gather(0, steps[None, :, None].expand(1, -1, logits.shape[2]))[0]


def _first_argmax(values: Tensor) -> Tensor:  # [T, ...] -> [...]
    """The first of the largest entries over time (``torch.argmax`` does not promise which)."""
    order = torch.arange(len(values), 0, -1, device=values.device).view(-1, *[1] * (values.dim() - 1))
    return ((values == values.amax(0, keepdim=True)) * order).argmax(0)


class Last(Decoder):
    """The last step."""

    windowed = False

    def forward(self, logits: Tensor) -> Tensor:
        return logits[-1]


class MaxConfidence(Decoder):
    """The step of the largest probability, the first one on ties; beta is learned, uniform in [0, 1) at first."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax_beta = nn.Parameter(torch.rand(1))

    def forward(self, logits: Tensor) -> Tensor:
        return self.take(logits, _first_argmax(self.confidence(logits)))


class Threshold(Decoder):
    """The first step with a probability of at least ``decoder_threshold`` (0.9), else the most confident one."""

    decoder_threshold: Tensor

    def __init__(self, threshold: float = 0.9, learned: bool = False) -> None:
        super().__init__()
        self.register_buffer("decoder_threshold", torch.tensor([threshold]))
        if learned:
            self.softmax_beta = nn.Parameter(torch.rand(1))

    def forward(self, logits: Tensor) -> Tensor:
        confidence = self.confidence(logits)
        reached = confidence >= self.decoder_threshold
        return self.take(logits, torch.where(reached.any(0), _first_argmax(reached.to(confidence.dtype)), _first_argmax(confidence)))


class TimeMax(Decoder):
    """Of each class the largest probability over time (``steps``: when)."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax_beta = nn.Parameter(torch.rand(1))

    def forward(self, logits: Tensor) -> Tensor:
        self.steps = _first_argmax(torch.softmax(logits * self.softmax_beta, -1))
        return logits.gather(0, self.steps[None])[0]


class WeightedAverage(Decoder):
    """The average over time with weights ``softmax over t of (beta z)``, per class."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax_beta = nn.Parameter(torch.rand(1))

    def forward(self, logits: Tensor) -> Tensor:
        return (torch.softmax(logits * self.softmax_beta, 0) * logits).sum(0)


class ConfidenceAverage(Decoder):
    """The average over time with weights ``softmax over t of (beta_2 max_n p_t)``."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax_beta = nn.Parameter(torch.rand(1))
        self.alpha_beta = nn.Parameter(torch.rand(1))

    def forward(self, logits: Tensor) -> Tensor:
        weights = torch.softmax(self.confidence(logits) * self.alpha_beta, 0)
        return (weights.unsqueeze(-1) * logits).sum(0)


class LearnedAverage(Decoder):
    """The average over time with learned weights per step and class: ``sigmoid(decoder_alpha)``, divided by their sum over time."""

    def __init__(self, timesteps: int, classes: int) -> None:
        super().__init__()
        self.decoder_alpha = nn.Parameter(torch.rand(timesteps, classes))

    def forward(self, logits: Tensor) -> Tensor:
        weights = torch.sigmoid(self.decoder_alpha)  # [T, classes]
        return ((weights / weights.sum(0)).unsqueeze(1) * logits).sum(0)


DECODERS: dict[str, type[Decoder]] = {
    "last": Last,
    "max_confidence": MaxConfidence,
    "threshold": Threshold,
    "time_max": TimeMax,
    "weighted_average": WeightedAverage,
    "confidence_average": ConfidenceAverage,
}
