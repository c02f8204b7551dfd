"""What has been changed in the layers of a network since it was built, as plain values: a part of ``net.config``, so that what is saved
with it is the network that was trained.

Layers are described by their class, the sizes of their parameters and the attributes that their ``forward`` reads. Other modules are
described too; what differs in them cannot be built again, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from rnndyn_fast.nn.derived_network import FLAGS
from rnndyn_fast.nn.layer_checks import HOOKS, computes_as, name_of, pair

_PAIRS = ("stride", "padding", "dilation", "output_padding")
_CONV = ("stride", "padding", "dilation", "groups", "padding_mode")
# Attributes of each class of layers; and how it is made again, from a description.
_LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...], Callable[[Any], nn.Module]]] = {
    "Conv2d": (nn.Conv2d, _CONV, lambda d: nn.Conv2d(d["weight"][1] * d["groups"], d["weight"][0], d["weight"][2:], **_given(d, _CONV))),
    "ConvTranspose2d": (
        nn.ConvTranspose2d,
        (*_CONV, "output_padding"),
        lambda d: nn.ConvTranspose2d(
            d["weight"][0], d["weight"][1] * d["groups"], d["weight"][2:], **_given(d, (*_CONV, "output_padding"))
        ),
    ),
    "Linear": (nn.Linear, (), lambda d: nn.Linear(d["weight"][1], d["weight"][0])),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps"), lambda d: nn.LayerNorm(d["normalized_shape"], d["eps"])),
    "GroupNorm": (
        nn.GroupNorm,
        ("num_groups", "num_channels", "eps"),
        lambda d: nn.GroupNorm(d["num_groups"], d["num_channels"], d["eps"]),
    ),
    "BatchNorm2d": (
        nn.BatchNorm2d,
        ("num_features", "eps", "momentum", "track_running_stats"),
        lambda d: nn.BatchNorm2d(d["num_features"], d["eps"], d["momentum"]),
    ),
    "Identity": (nn.Identity, (), lambda d: nn.Identity()),
}
_NONE = "None"  # the class of a layer that was taken away
_HELD = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _given(description: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: description[name] for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value


def _attribute(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    return _plain(pair(value) if name in _PAIRS and not isinstance(value, str) else value)


def _described(module: nn.Module) -> dict[str, Any]:
    for name, (cls, attributes, _) in _LAYERS.items():
        if computes_as(module, cls):
            held = {kind: getattr(module, kind, None) for kind in _HELD}
            sizes = {kind: None if tensor is None else list(tensor.shape) for kind, tensor in held.items()}
            return {"class": name, **{a: _attribute(module, a) for a in attributes}, **sizes}
    own = {name: _plain(value) for name, value in vars(module).items() if isinstance(value, int | float | str | tuple | None)}
    return {"class": name_of(type(module)), **{n: v for n, v in own.items() if not n.startswith("_") and n not in ("training", "backend")}}


def described(root: nn.Module) -> dict[str, dict[str, Any]]:
    """All modules in a module, by their paths."""
    return {path: _described(module) for path, module in root.named_modules(remove_duplicate=False) if path}


def changed_layers(root: nn.Module, built: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Descriptions of what differs from ``built`` (:func:`described` then), for :func:`change_layers`.

    Raises:
        TypeError: a module differs that cannot be described, or has hooks; names module and attribute.
    """
    return dict(_changes(root, built))


def _changes(root: nn.Module, built: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    now = described(root)
    for path, module in root.named_modules(remove_duplicate=False):
        if hasattr(module, "parametrizations"):
            names = ", ".join(module.parametrizations)
            raise TypeError(
                f"{path}.{names}: expected a parameter, got one with a parametrization, which is not saved; make it permanent with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        for attribute, kind in HOOKS.items():
            # (Modules that are there for hooks have nothing to save.)
            if path and built.get(path, {}).get("class") != "Identity" and getattr(module, attribute):
                raise TypeError(f"{path}.{attribute}: expected no {kind}, which are not saved, got {len(getattr(module, attribute))}")
    for path, description in now.items():
        wanted = built.get(path)
        if description == wanted:
            continue
        if wanted is None:
            raise TypeError(f"{path}: expected no module, as the network was built, got {name_of(type(root.get_submodule(path)))}")
        if description["class"] in _LAYERS and wanted["class"] in _LAYERS:
            yield path, description
            continue
        differing = [name for name in {**description, **wanted} if description.get(name) != wanted.get(name)]
        for name in differing:
            if name not in FLAGS:
                raise TypeError(
                    f"{path}{'' if name == 'class' else f'.{name}'}: expected {wanted.get(name)}, as the network was built, got "
                    f"{description.get(name)}, which is not saved"
                )
        yield path, {name: description[name] for name in differing if name in description}
    for path, wanted in built.items():
        parent = path.rpartition(".")[0]
        if path not in now and (not parent or parent in now):
            if wanted["class"] not in _LAYERS:
                raise TypeError(f"{path}: expected {wanted['class']}, as the network was built, got none")
            yield path, {"class": _NONE}


def change_layers(root: nn.Module, changes: Any) -> None:
    """Make in a network that was just built what :func:`changed_layers` described; parameters have their initial values.

    Raises:
        ValueError: naming the layer and what cannot be.
    """
    if not isinstance(changes, Mapping):
        raise ValueError(f"layers: expected a dict of changed layers, got {changes!r}")
    for path, description in changes.items():
        try:
            parent, _, leaf = str(path).rpartition(".")
            owner = root.get_submodule(parent)
            if "class" not in description:
                module = root.get_submodule(path)
                for name, value in description.items():
                    if name not in FLAGS:
                        raise ValueError(f"unknown attribute {name!r}")
                    setattr(module, name, value)
                continue
            if leaf not in owner._modules:
                raise ValueError("the network has no such layer")
            setattr(owner, leaf, None if description["class"] == _NONE else _made(description))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"layers: {path}: {error or type(error).__name__}") from error


def _made(description: Mapping[str, Any]) -> nn.Module:
    name = description["class"]
    if name not in _LAYERS:
        raise ValueError(f"expected one of {', '.join(_LAYERS)}, got {name!r}")
    layer = _LAYERS[name][2](description)
    if isinstance(layer, nn.BatchNorm2d):
        layer.track_running_stats = bool(description["track_running_stats"])
    for kind in _HELD:
        if hasattr(layer, kind) and description[kind] is None:
            setattr(layer, kind, None)
    found = _described(layer)
    for key in {**found, **description}:
        value = description.get(key)
        if found.get(key) != value or (key == "eps" and not isinstance(value, float)):
            raise ValueError(f"{key}: cannot make {name} with {value!r}")
    return layer
