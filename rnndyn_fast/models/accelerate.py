"""The one-line drop-in: ``net = rnndyn_fast.accelerate(net)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rnndyn_fast.models.accelerate_checks import check_equal, check_modules, refuse_wrappers
from rnndyn_fast.models.blt_net import AREAS as NET_AREAS
from rnndyn_fast.models.blt_net import BLTNet, blt_net_64, blt_net_128
from rnndyn_fast.models.blt_vs_net import AREAS, BLTVS, KERNELS, blt_vs
from rnndyn_fast.nn.blt_conv import BLTConv
from rnndyn_fast.nn.derived_network import FLAGS
from rnndyn_fast.nn.layer_checks import check_layer

_NET_ATTRIBUTES = ("retina", "v1", "v2", "v4", "it", "gap", "readout", "timesteps")
_VS_ATTRIBUTES = ("connections", "timesteps", "num_classes", "bio_unroll")
_CONV_ATTRIBUTES = ("bottom_up", "lateral_connect", "topdown_connect", "LT_interaction", "pool_input")


def accelerate(module: nn.Module, *, backend: str | None = None, check: bool = True) -> nn.Module:
    """An instance of a published class as our module of the same function, with the same layers.

    Recognised by their attributes: ``BLT_Conv``, ``BLT_net_64``, ``BLT_net_128`` of the study of representation dynamics
    (arXiv 2308.12435), and the two-stream network of KietzmannLab/BLT-VS, whose modules for hooks are shared too. Layers and their
    parameters are shared, not copied: an optimiser built on either trains both. What was changed in the instance (flags of an area,
    strides, norms, layers that were replaced) is taken over where a rollout can compute it.

    Args:
        module: the published instance.
        backend: "native", "reference" or None.
        check: run one random image through both and compare the results. (A class without a ``forward`` cannot be compared.)

    Raises:
        TypeError, ValueError: ``module`` is none of those (the message says what was looked for), wraps one, or has been changed in a way
            that a rollout cannot compute, naming module and attribute; or the results differ, with the largest difference.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    refuse_wrappers(module)
    makers = {_NET_ATTRIBUTES: _blt_net, _VS_ATTRIBUTES: _blt_vs, _CONV_ATTRIBUTES: _blt_conv}
    make = next((make for names, make in makers.items() if all(hasattr(module, name) for name in names)), None)
    if make is None:
        raise TypeError(
            f"module: {type(module).__name__} is not a published class we know; looked for a BLT_net "
            f"(attributes {', '.join(_NET_ATTRIBUTES)}), a BLT_VS (attributes {', '.join(_VS_ATTRIBUTES)}) "
            f"or a BLT_Conv (attributes {', '.join(_CONV_ATTRIBUTES)})"
        )
    with torch.device("meta"):  # (without memory or random numbers for layers that are replaced at once)
        ours: Any = make(module, backend)
    _share_layers(module, ours)
    check_modules(module, ours)
    for path, part in ours.named_modules():
        part.training = module.get_submodule(path).training
    if check:
        check_equal(module, ours)
    return ours


def _conv(module: nn.Module, path: str) -> Any:
    """A convolution whose sizes say how wide the network is."""
    conv = module.get_submodule(path)
    check_layer(path, conv, (nn.Conv2d,))
    return conv


def _blt_conv(module: Any, backend: str | None) -> BLTConv:
    conv = _conv(module, "bottom_up")
    for leaf, flag in (("lateral", "lateral_connect"), ("top_down", "topdown_connect")):
        if getattr(module, flag) and getattr(module, leaf, None) is None:
            raise TypeError(f"{flag}: expected False without {leaf!r}, got {getattr(module, flag)!r}")
    return BLTConv(
        conv.in_channels, conv.out_channels, conv.kernel_size[0], hasattr(module, "lateral"), hasattr(module, "top_down"),
        module.LT_interaction, bool(module.pool_input), conv.bias is not None, backend,
    )  # fmt: skip


def _blt_net(module: Any, backend: str | None) -> BLTNet:
    convs = [_conv(module, f"{area}.bottom_up") for area in NET_AREAS]
    retina = _conv(module, "retina")
    lateral = hasattr(module.gap, "lateral")
    recurrent_areas = hasattr(module.v2, "lateral") or hasattr(module.v2, "top_down")
    norms = {area: norm for area in NET_AREAS if isinstance(norm := getattr(module, f"{area}_ln", None), nn.LayerNorm)}
    if norms:
        area, layer = next(iter(norms.items()))
        image_size = layer.normalized_shape[-1] * 2 ** NET_AREAS.index(area)
    else:
        image_size = _pool_size(module.gap.pool) * 8
    factory = {3: blt_net_64, 5: blt_net_128}.get(retina.kernel_size[0])
    if factory is None:
        raise TypeError(f"module: expected kernels of 3 or 5, got {retina.kernel_size}")
    if not isinstance(module.readout, nn.Linear):
        raise TypeError(f"readout: expected torch.nn.Linear, whose sizes tell the classes, got {type(module.readout).__name__}")
    return factory(
        lateral_connections=lateral,
        topdown_connections=hasattr(module.v2, "top_down"),
        LT_interaction=module.v1.LT_interaction,
        timesteps=module.timesteps,
        LT_position="all" if recurrent_areas or not lateral else "last",
        classifier_bias=module.readout.bias is not None,
        norm_type="LN" if norms else "None",
        num_classes=module.readout.out_features,
        in_channels=retina.in_channels,
        image_size=image_size,
        widths=[retina.out_channels, *(c.out_channels for c in convs)],
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
    hooks = {name for name, _ in module.named_children() if name.split("_")[0] in AREAS}
    return blt_vs(
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


def _pool_size(pool: Any) -> int:
    size = pool.kernel_size
    return size if isinstance(size, int) else size[0]


def _share_layers(theirs: nn.Module, ours: nn.Module) -> None:
    """Put their layers in place of ours, and the flags of areas."""
    source, target = dict(theirs.named_parameters()), dict(ours.named_parameters())
    missing: list[str] = []
    for path, layer in list(ours.named_modules()):
        try:
            their = theirs.get_submodule(path)
        except AttributeError:
            missing += [f"{path}.{name}" for name, _ in layer.named_parameters()]
            continue
        if path and next(layer.children(), None) is not None:
            for name in FLAGS:
                if name in vars(their):
                    setattr(layer, name, vars(their)[name])
        elif path and type(their).forward is not nn.Module.forward:
            parent, _, leaf = path.rpartition(".")
            ours.get_submodule(parent)._modules[leaf] = their
        else:  # (what cannot be called holds parameters only)
            for name in layer._parameters:
                if f"{path}.{name}".lstrip(".") in source:
                    setattr(layer, name, source[f"{path}.{name}".lstrip(".")])
    shared = dict(ours.named_parameters())
    unexpected = sorted(name for name in source if name not in shared)
    missing += [name for name in shared if name not in source]
    if missing or unexpected:
        raise TypeError(
            f"module: its parameters are not those of the published class: missing {sorted(set(missing))}, unexpected {unexpected}"
        )
    for name, parameter in source.items():
        norm = isinstance(ours.get_submodule(name.rpartition(".")[0]), nn.LayerNorm | nn.GroupNorm)  # (which may be of another kind)
        if name in target and parameter.shape != target[name].shape and not norm:
            raise TypeError(f"module: parameter {name} has shape {list(parameter.shape)}, expected {list(target[name].shape)}")
    if isinstance(ours, BLTNet | BLTVS):
        now = ours.current()
        for name, shape in now.network.parameter_shapes.items():
            if tuple(now.parameters[name].shape) != shape:
                raise TypeError(f"module: parameter {name} has shape {list(now.parameters[name].shape)}, expected {list(shape)}")
