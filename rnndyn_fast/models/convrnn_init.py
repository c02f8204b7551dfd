"""Published initial values of the ConvRNNs' parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

MEDIAN_SCALE = 0.6393378386273998
# Variance scale of the kernel and constant of the bias, by layer of lstm_shallow.
LSTM_SHALLOW = {
    "conv3": (0.7008842622125534, 1.6427688907776656),
    "conv4": (1.8314561102978617, -1.166018906771675),
    "conv5": (0.8937636886958731, -1.3495015766804237),
}


def variance_scaling_(weight: Tensor, scale: float, *, depthwise: bool = False) -> None:
    """Truncated normal (two standard deviations) of variance scale / fan-in; of a depthwise kernel [C, 1, kh, kw] TensorFlow takes all its
    C kh kw entries for the fan-in."""
    fan_in = weight.numel() if depthwise else weight[0].numel()
    deviation = math.sqrt(scale / fan_in) / 0.87962566103423978  # that of a standard normal cut at two
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def initialise(net: Any) -> None:
    """Fill the parameters of a ConvRNN as published: forward convolutions and reciprocal gated cells by variance scaling, other cells and
    bypasses Glorot uniform, biases zero; readout normal(0, 0.01) with bias 1 (shallow: 0); reset and update gates of a GRU bias 1."""
    layers = net.layers
    with torch.no_grad():
        for name, p in net.named_parameters():
            layer, kind = name.split(".")[0], name.rsplit(".", 1)[1]
            cell = "Cell." in name
            if "norm" in name or kind in ("memory_decay", "peepholes", "softmax_beta"):
                continue
            if kind == "bias":
                value = 0.0
                if layer == "imnetds":
                    value = 0.0 if layers.shallow else 1.0
                elif cell and layers.kind == "gru" and ".gates." in name:
                    value = 1.0
                elif cell and layers.kind == "lstm" and layers.shallow:
                    value = LSTM_SHALLOW[layer][1]
                p.fill_(value)
            elif layer == "imnetds":
                nn.init.normal_(p, 0.0, 0.01)
            elif "residual_add" in name:
                nn.init.xavier_uniform_(p)
            elif cell and layers.kind == "rgc_median":
                variance_scaling_(p, MEDIAN_SCALE, depthwise="_depthwise." in name)
            elif cell and layers.kind == "lstm" and layers.shallow:
                variance_scaling_(p, LSTM_SHALLOW[layer][0])
            elif cell:
                nn.init.xavier_uniform_(p)
            else:
                variance_scaling_(p, 1.0)
