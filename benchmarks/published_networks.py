"""BLT-VS (standard unrolling) and RCNN-SAT BL written the published way: plain eager PyTorch, one operation after another.

The peers of bench_networks.py, from the descriptions of the networks. They use the modules of ours, so that both have the
same parameters, and evaluate exactly what the published loops do: BLT-VS computes nearly every bottom-up and top-down term
twice, once for each sweep (20.5 G multiply-adds at 128 px and T = 6 where 10.8 G suffice); RCNN-SAT computes the drive of its
first layer once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

AREAS = ("Retina", "LGN", "V1", "V2", "V3", "V4", "LOC")
SKIP_FROM, SKIP_TO = 2, 5  # V1, V4


def blt_vs(
    net: nn.Module,
    image: Tensor,  # [N, 3, S, S]
    steps: int,
) -> Tensor:
    """Means of the readout's map at every step, [T, N, C, 1, 1]."""
    areas = [net.get_submodule(f"connections.{name}") for name in AREAS]
    readout = net.get_submodule("connections.Readout")

    def separable(area: nn.Module, name: str, x: Tensor) -> Tensor:
        return area.get_submodule(f"{name}_pointwise")(area.get_submodule(f"{name}_depthwise")(x))

    def bottom_up(i: int, u: list[Tensor | None]) -> Tensor:
        return areas[i].get_submodule("bu_conv")(image if i == 0 else u[i - 1])

    def top_down(i: int, size: torch.Size, above: Tensor) -> Tensor:
        return areas[i].get_submodule("td_conv")(above, output_size=size[2:])

    def gated(norm: nn.Module, drive: Tensor, modulator: Tensor | None) -> Tensor:
        value = functional.relu(drive)
        return norm(value if modulator is None else value * 2.0 * torch.sigmoid(modulator))

    u: list[Tensor | None] = [None] * len(AREAS)
    v: list[Tensor | None] = [None] * (len(AREAS) + 1)
    u[0] = gated(areas[0].get_submodule("layer_norm_bu"), bottom_up(0, u), None)
    outputs = []
    for _ in range(steps):
        for i in range(1, len(AREAS)):
            drive = bottom_up(i, u)
            before, above = u[i], v[i + 1]
            if before is not None and hasattr(areas[i], "bu_l_conv_depthwise"):
                drive = drive + separable(areas[i], "bu_l_conv", before)
            if i == SKIP_TO:
                source = u[SKIP_FROM]
                assert source is not None
                drive = drive + separable(areas[i], "skip_bu", source)
            modulator = None if above is None else top_down(i, drive.shape, above)
            u[i] = gated(areas[i].get_submodule("layer_norm_bu"), drive, modulator)
        x = readout.get_submodule("readout_conv")(u[-1])
        outputs.append(x.mean((2, 3), keepdim=True))
        v[-1] = readout.get_submodule("layer_norm_td")(functional.relu(x))
        for i in range(len(AREAS) - 1, -1, -1):
            modulator = bottom_up(i, u)
            before, above = v[i], v[i + 1]
            assert above is not None
            norm = areas[i].get_submodule("layer_norm_td")
            if i == 0:
                v[i] = norm(torch.zeros_like(modulator))  # (the retina has no top-down drive, but is run)
                continue
            drive = top_down(i, modulator.shape, above)
            if before is not None and hasattr(areas[i], "td_l_conv_depthwise"):
                drive = drive + separable(areas[i], "td_l_conv", before)
            v[i] = gated(norm, drive, modulator)
    return torch.stack(outputs)


def rcnn_sat_bl(
    net: nn.Module,
    image: Tensor,  # [N, 3, H, W]
    steps: int,
) -> Tensor:
    """Means of the last layer's map at every step, [T, N, C, 1, 1]. The net's mode decides over the batch norms' statistics."""
    first = net.get_submodule("RCL_0_BConv")(image)
    layers = sum(hasattr(net, f"RCL_{n}_BConv") for n in range(16))
    states: list[Tensor | None] = [None] * layers
    outputs = []
    for t in range(steps):
        x = image
        for n in range(layers):
            value = first if n == 0 else net.get_submodule(f"RCL_{n}_BConv")(functional.max_pool2d(x, 2, 2))
            before = states[n]
            if before is not None:
                value = value + net.get_submodule(f"RCL_{n}_LConv")(before)
            states[n] = x = functional.relu(net.get_submodule(f"BatchNorm_Layer_{n}_Time.{t}")(value))
        outputs.append(x.mean((2, 3), keepdim=True))
    return torch.stack(outputs)
