"""BLT_net_64 and BLT_net_128 written the published way: plain eager PyTorch, one op after another, a list over time
steps.

Written for this project from the description of the networks (arXiv 2308.12435); it serves as the peer of the
benchmarks and as the published
instance in tests of :func:`rnndyn_fast.accelerate`. Attribute and parameter names are those of the published classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PublishedConv(nn.Module):
    """One recurrent convolution, one step."""

    def __init__(
        self,
        in_chan: int,
        out_chan: int,
        kernel_size: int,
        lateral_connection: bool = True,
        topdown_connection: bool = True,
        LT_interaction: str | None = "additive",
        pool_input: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.lateral_connect, self.topdown_connect = lateral_connection, topdown_connection
        self.LT_interaction, self.pool_input = LT_interaction, pool_input
        self.bottom_up = nn.Conv2d(in_chan, out_chan, kernel_size, padding="same", bias=bias)
        if lateral_connection:
            self.lateral = nn.Conv2d(out_chan, out_chan, kernel_size, padding="same", bias=bias)
        if topdown_connection:
            self.top_down = nn.ConvTranspose2d(
                2 * out_chan,
                out_chan,
                kernel_size,
                stride=2,
                padding=(kernel_size - 1) // 2,
                output_padding=1,
                bias=bias,
            )
        if pool_input:
            self.pool = nn.MaxPool2d(2, 2)

    def forward(self, b_input: Tensor, l_input: Tensor | None = None, t_input: Tensor | None = None) -> Tensor:
        """Terms whose input is None are left out."""
        if self.pool_input:
            b_input = self.pool(b_input)
        b = self.bottom_up(b_input)
        terms = []
        if self.lateral_connect and l_input is not None:
            terms.append(self.lateral(l_input))
        if self.topdown_connect and t_input is not None:
            terms.append(self.top_down(t_input))
        if not terms:
            return b
        total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        if self.LT_interaction == "multiplicative":
            return b * (1.0 + total)
        return b + total


class PublishedGap(nn.Module):
    """Mean over the map, with a dense lateral term."""

    def __init__(self, channels: int, size: int, lateral: bool, LT_interaction: str | None, bias: bool) -> None:
        super().__init__()
        self.lateral_connect, self.LT_interaction = lateral, LT_interaction
        self.pool = nn.AvgPool2d(size)
        if lateral:
            self.lateral = nn.Linear(channels, channels, bias=bias)

    def forward(self, b_input: Tensor, l_input: Tensor | None = None) -> Tensor:
        """[N, C, S, S] to [N, C]."""
        b = self.pool(b_input).flatten(1)
        if not self.lateral_connect or l_input is None:
            return b
        lateral = self.lateral(l_input)
        return b * (1.0 + lateral) if self.LT_interaction == "multiplicative" else b + lateral


class PublishedNet(nn.Module):
    """The network; ``forward`` returns the list of clamped log-probabilities [N, classes] over time steps."""

    def __init__(
        self,
        lateral_connections: bool = True,
        topdown_connections: bool = True,
        LT_interaction: str | None = "additive",
        timesteps: int = 2,
        LT_position: str | None = "all",
        classifier_bias: bool = True,
        norm_type: str | None = "LN",
        *,
        kernel_size: int = 3,
        image_size: int = 64,
        widths: tuple[int, ...] = (32, 64, 128, 256, 512),
        num_classes: int = 100,
    ) -> None:
        super().__init__()
        everywhere = LT_position != "last"
        lateral, topdown = lateral_connections and everywhere, topdown_connections and everywhere
        bias = norm_type != "LN"
        self.timesteps = timesteps
        sizes = [image_size, image_size // 2, image_size // 4, image_size // 8]
        self.retina = nn.Conv2d(3, widths[0], kernel_size, padding="same")
        self.v1 = PublishedConv(widths[0], widths[1], kernel_size, lateral, topdown, LT_interaction, False, bias)
        self.v1_ln = self._norm(norm_type, widths[1], sizes[0])
        self.v2 = PublishedConv(widths[1], widths[2], kernel_size, lateral, topdown, LT_interaction, True, bias)
        self.v2_ln = self._norm(norm_type, widths[2], sizes[1])
        self.v4 = PublishedConv(widths[2], widths[3], kernel_size, lateral, topdown, LT_interaction, True, bias)
        self.v4_ln = self._norm(norm_type, widths[3], sizes[2])
        self.it = PublishedConv(widths[3], widths[4], kernel_size, lateral, False, LT_interaction, True, bias)
        self.it_ln = self._norm(norm_type, widths[4], sizes[3])
        self.gap = PublishedGap(widths[4], sizes[3], lateral_connections, LT_interaction, bias)
        self.gap_ln = nn.LayerNorm([widths[4]]) if norm_type == "LN" else nn.Identity()
        self.readout = nn.Linear(widths[4], num_classes, bias=classifier_bias)

    @staticmethod
    def _norm(norm_type: str | None, channels: int, size: int) -> nn.Module:
        return nn.LayerNorm([channels, size, size]) if norm_type == "LN" else nn.Identity()

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Everything is computed again at every time step, the first area included."""
        outputs: list[Tensor] = []
        v2 = v4 = it = gap = None
        for _ in range(self.timesteps):
            retina = torch.relu(self.retina(inputs))
            v1 = torch.relu(self.v1_ln(self.v1(retina)))
            v2 = torch.relu(self.v2_ln(self.v2(v1, v2, v4)))
            v4 = torch.relu(self.v4_ln(self.v4(v2, v4, it)))
            it = torch.relu(self.it_ln(self.it(v4, it)))
            gap = torch.relu(self.gap_ln(self.gap(it, gap)))
            outputs.append(torch.log(torch.clamp(functional.softmax(self.readout(gap), dim=1), 1e-10, 1.0)))
        return outputs
