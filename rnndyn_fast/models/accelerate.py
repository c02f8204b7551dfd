"""The one-line drop-in: ``net = rnndyn_fast.accelerate(net)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rnndyn_fast.models.blt_net import BLTNet, blt_net_64, blt_net_128
from rnndyn_fast.models.blt_vs_net import AREAS, BLTVS, KERNELS, blt_vs
from rnndyn_fast.nn.blt_conv import BLTConv

_NET_ATTRIBUTES = ("retina", "v1", "v2", "v4", "it", "gap", "readout", "timesteps")
_VS_ATTRIBUTES = ("connections", "timesteps", "num_classes", "bio_unroll")
_CONV_ATTRIBUTES = ("bottom_up", "lateral_connect", "topdown_connect", "LT_interaction", "pool_input")


def accelerate(module: nn.Module, *, backend: str | None = None) -> nn.Module:
    """An instance of a published class as our module of the same function, on the same parameters.

    Recognised by their attributes: ``BLT_Conv``, ``BLT_net_64``, ``BLT_net_128`` of the study of representation dynamics
    (arXiv 2308.12435), and the two-stream network of KietzmannLab/BLT-VS, whose modules for hooks are shared too. The parameters are
    shared, not copied: an optimiser built on either trains both.

    Args:
        module: the published instance.
        backend: "native", "reference" or None.

    Raises:
        TypeError: ``module`` is none of those; the message says what was looked for.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    makers = {_NET_ATTRIBUTES: _blt_net, _VS_ATTRIBUTES: _blt_vs, _CONV_ATTRIBUTES: _blt_conv}
    make = next((make for names, make in makers.items() if all(hasattr(module, name) for name in names)), None)
    if make is None:
        raise TypeError(
            f"module: {type(module).__name__} is not a published class we know; looked for a BLT_net "
            f"(attributes {', '.join(_NET_ATTRIBUTES)}), a BLT_VS (attributes {', '.join(_VS_ATTRIBUTES)}) "
            f"or a BLT_Conv (attributes {', '.join(_CONV_ATTRIBUTES)})"
        )
    with torch.device("meta"):  # (without memory or random numbers for parameters that are replaced at once)
        ours: nn.Module = make(module, backend)
    _share_parameters(module, ours)
    return ours.train(module.training)


def _blt_conv(module: Any, backend: str | None) -> BLTConv:
    conv = module.bottom_up
    return BLTConv(
        conv.in_channels, conv.out_channels, conv.kernel_size[0], bool(module.lateral_connect), bool(module.topdown_connect),
        module.LT_interaction, bool(module.pool_input), conv.bias is not None, backend,
    )  # fmt: skip


def _blt_net(module: Any, backend: str | None) -> BLTNet:
    convs = [module.v1.bottom_up, module.v2.bottom_up, module.v4.bottom_up, module.it.bottom_up]
    lateral = hasattr(module.gap, "lateral")
    recurrent_areas = hasattr(module.v2, "lateral") or hasattr(module.v2, "top_down")
    norm = isinstance(getattr(module, "v1_ln", None), nn.LayerNorm)
    image_size = module.v1_ln.normalized_shape[-1] if norm else _pool_size(module.gap.pool) * 8
    factory = {3: blt_net_64, 5: blt_net_128}.get(module.retina.kernel_size[0])
    if factory is None:
        raise TypeError(f"module: expected kernels of 3 or 5, got {module.retina.kernel_size}")
    return factory(
        lateral_connections=lateral,
        topdown_connections=hasattr(module.v2, "top_down"),
        LT_interaction=module.v1.LT_interaction,
        timesteps=module.timesteps,
        LT_position="all" if recurrent_areas or not lateral else "last",
        classifier_bias=module.readout.bias is not None,
        norm_type="LN" if norm else "None",
        num_classes=module.readout.out_features,
        in_channels=module.retina.in_channels,
        image_size=image_size,
        widths=[module.retina.out_channels, *(c.out_channels for c in convs)],
        backend=backend,
    )


def _blt_vs(module: Any, backend: str | None) -> BLTVS:
    """What parameters tell is read from them; attributes are asked for the rest."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    needed = ["connections.Retina.bu_conv.weight", "connections.Readout.readout_conv.weight"]
    if missing := [name for name in needed if name not in shapes]:
        raise TypeError(f"module: its parameters are not those of the published class: missing {missing}")
    size = next((size for size, kernels in KERNELS.items() if kernels[0] == shapes[needed[0]][-1]), None)
    if size is None:
        raise TypeError(
            f"module: expected kernels of {' or '.join(str(k[0]) for k in KERNELS.values())} in Retina, got {shapes[needed[0]]}"
        )
    children = dict(module.named_children())
    hooks = {name: child for name, child in children.items() if name.split("_")[0] in AREAS}
    ours = blt_vs(
        module.timesteps,
        module.num_classes,
        shapes[needed[1]][0] - module.num_classes,
        lateral_connections="connections.V1.bu_l_conv_depthwise.weight" in shapes,
        topdown_connections="connections.V1.td_conv.weight" in shapes,
        skip_connections="connections.V4.skip_bu_depthwise.weight" in shapes,
        bio_unroll=bool(module.bio_unroll),
        image_size=size,
        hook_type="separate" if "Retina_0_BU" in hooks else "concat" if hooks else "None",
        readout_type="single" if "readout_weights" in shapes else "multi",
        backend=backend,
    )
    for name, hook in hooks.items():
        setattr(ours, name, hook)
    return ours


def _pool_size(pool: nn.AvgPool2d) -> int:
    size = pool.kernel_size
    return size if isinstance(size, int) else size[0]


def _share_parameters(theirs: nn.Module, ours: nn.Module) -> None:
    source, target = dict(theirs.named_parameters()), dict(ours.named_parameters())
    if source.keys() != target.keys():
        raise TypeError(
            f"module: its parameters are not those of the published class: missing {sorted(target.keys() - source.keys())}, "
            f"unexpected {sorted(source.keys() - target.keys())}"
        )
    for name, parameter in source.items():
        if parameter.shape != target[name].shape:
            raise TypeError(f"module: parameter {name} has shape {list(parameter.shape)}, expected {list(target[name].shape)}")
        owner, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(owner), leaf, parameter)
