"""One recurrent convolution with bottom-up, lateral and top-down terms: a single step as a layer."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

import torch
from torch import Tensor, nn

from rnndyn_fast.graph.spec.network import Activation, Area, Connection, Input, Interaction, Network, Norm, Operator, Pool, Role
from rnndyn_fast.nn.derived_network import parse_interaction
from rnndyn_fast.nn.layer_checks import check_layer
from rnndyn_fast.nn.parameters import ModuleReader
from rnndyn_fast.nn.tracing import NotScriptable, refuse_tracers
from rnndyn_fast.program.rollout import rollout


class BLTConv(NotScriptable, nn.Module):
    r"""Recurrent convolution, one step.

    .. math:: z = b + l + d \quad\text{or}\quad z = b\,(1 + l + d)

    with b = conv(pool(b_input), W_b) + beta_b, l = conv(l_input, W_l) + beta_l, d = convT(t_input, W_t) + beta_t; the transposed
    convolution has stride 2, padding (K-1)/2, output_padding 1. Terms whose input is None, or whose connection is off, are left out.

    Args:
        in_chan, out_chan: channels of the bottom-up input and of the result; the top-down input has ``2 * out_chan``.
        kernel_size: K, odd.
        lateral_connection, topdown_connection: whether those parameters exist.
        LT_interaction: "additive" or "multiplicative".
        pool_input: 2 x 2 maximum of the bottom-up input first.
        bias: whether the convolutions have biases.
        backend: "native", "reference" or None.

    Parameters are ``bottom_up``, ``lateral`` and ``top_down``, as published (arXiv 2308.12435).

    >>> import torch
    >>> layer = BLTConv(3, 4, 3)
    >>> layer(torch.zeros(2, 3, 16, 16), torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 4, 8, 8])
    """

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
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected a positive odd number, got {kernel_size}")
        for name, channels in (("in_chan", in_chan), ("out_chan", out_chan)):
            if channels < 1:
                raise ValueError(f"{name}: expected at least 1, got {channels}")
        parse_interaction(LT_interaction)
        self.lateral_connect = bool(lateral_connection)
        self.topdown_connect = bool(topdown_connection)
        self.LT_interaction = LT_interaction
        self.pool_input = bool(pool_input)
        self.backend = backend
        self._reader = ModuleReader()
        padding = (kernel_size - 1) // 2
        self.bottom_up = nn.Conv2d(in_chan, out_chan, kernel_size, padding=padding, bias=bias)
        if self.lateral_connect:
            self.lateral = nn.Conv2d(out_chan, out_chan, kernel_size, padding=padding, bias=bias)
        if self.topdown_connect:
            self.top_down = nn.ConvTranspose2d(2 * out_chan, out_chan, kernel_size, 2, padding, output_padding=1, bias=bias)

    def forward(
        self,
        b_input: Tensor,  # [N, C_in, H, W]
        l_input: Tensor | None = None,  # [N, C_out, H', W']
        t_input: Tensor | None = None,  # [N, 2 * C_out, H' / 2, W' / 2]
    ) -> Tensor:
        """One step: [N, C_out, H', W'], where H', W' are H, W or, with ``pool_input``, half of them.

        Raises ``ValueError`` or ``TypeError`` that names the argument, what was expected and what came.
        """
        refuse_tracers(type(self).__name__, (b_input, l_input, t_input))
        inputs = {"b_input": b_input}
        if self.lateral_connect and l_input is not None:
            inputs["l_input"] = l_input
        if self.topdown_connect and t_input is not None:
            inputs["t_input"] = t_input
        for name, x in inputs.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
            if x.dim() != 4:
                raise ValueError(f"{name}: expected [N, C, H, W], got {list(x.shape)}")
        pool = 2 if self.pool_input else 1
        height, width = b_input.shape[2] // pool, b_input.shape[3] // pool
        if not torch.compiler.is_compiling():
            check_layer("bottom_up", self.bottom_up, (nn.Conv2d,))
        out_chan, in_chan, kernel_size, _ = self.bottom_up.weight.shape
        expected = {
            "b_input": (in_chan, b_input.shape[2], b_input.shape[3]),
            "l_input": (out_chan, height, width),
            "t_input": (2 * out_chan, height // 2, width // 2),
        }
        if min(height, width) < 1:
            raise ValueError(f"b_input: the map {list(b_input.shape[2:])} is too small")
        if "t_input" in inputs and (height % 2 or width % 2):
            raise ValueError(f"t_input: the doubled top-down map cannot meet a bottom-up map of odd size {height} x {width}")
        for name, x in inputs.items():
            if tuple(x.shape[1:]) != expected[name]:
                raise ValueError(f"{name}: expected [N, {', '.join(map(str, expected[name]))}] ([N, C, H, W]), got {list(x.shape)}")
        network = _step(
            in_chan, out_chan, kernel_size, b_input.shape[2], b_input.shape[3], tuple(inputs)[1:],
            parse_interaction(self.LT_interaction), self.pool_input, self.bottom_up.bias is not None,
        )  # fmt: skip
        now = self._reader.read(self, network)
        return rollout(now.network, 1, list(inputs.values()), now.parameters, ("z",), backend=self.backend)[0][0]

    def version(self) -> Hashable:
        """What its steps depend on besides parameters."""
        return self.lateral_connect, self.topdown_connect, self.LT_interaction, self.pool_input, self._reader.version(self)


@lru_cache(maxsize=256)
def _step(
    in_chan: int,
    out_chan: int,
    kernel_size: int,
    height: int,
    width: int,
    recurrent_inputs: tuple[str, ...],
    interaction: Interaction,
    pool_input: bool,
    bias: bool,
) -> Network:
    """One step as a network of one area, whose recurrent terms come from inputs."""
    pool = Pool.MAX if pool_input else Pool.NONE
    size = (height // 2, width // 2) if pool_input else (height, width)
    inputs = [Input("b_input", in_chan, height, width)]
    connections = [Connection("b_input", "z", Role.BOTTOM_UP, Operator.CONV, kernel_size, pool=pool, bias=bias, parameter="bottom_up")]
    if "l_input" in recurrent_inputs:
        inputs.append(Input("l_input", out_chan, *size))
        connections.append(Connection("l_input", "z", Role.LATERAL, Operator.CONV, kernel_size, bias=bias, parameter="lateral"))
    if "t_input" in recurrent_inputs:
        inputs.append(Input("t_input", 2 * out_chan, size[0] // 2, size[1] // 2))
        connections.append(
            Connection("t_input", "z", Role.TOP_DOWN, Operator.CONV_TRANSPOSE, kernel_size, 2, bias=bias, parameter="top_down")
        )
    area = Area("z", out_chan, interaction, norm=Norm.NONE, activation=Activation.IDENTITY)
    return Network("blt_conv", tuple(inputs), (area,), tuple(connections))
