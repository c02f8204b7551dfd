"""One layer whose parameters a rollout reads without calling it: what it computes, or an error that names the attribute.

A rollout gives what the layers give when they are called one by one. So whatever changes that result is read from the layer, or refused:
its class, a ``forward`` of its own, hooks, and every attribute that its ``forward`` reads.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rnndyn_fast.torch_internals import GLOBAL_HOOKS

HOOKS = {
    "_forward_pre_hooks": "forward pre-hooks",
    "_forward_hooks": "forward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_backward_hooks": "backward hooks",
}
# What decides the result of a call, if a class or an instance replaces it.
_METHODS = ("__call__", "_call_impl", "_wrapped_call_impl", "forward", "_conv_forward", "_output_padding", "_check_input_dim")
_REMEDY = (
    "take torch.nn.utils.parametrizations for weights that are computed (torch.nn.utils.spectral_norm, weight_norm and prune use hooks; "
    "prune.remove makes a pruning permanent), record= for states, net.intervene(...) to change them"
)


def name_of(cls: type) -> str:
    """A class in messages."""
    known = getattr(nn, cls.__name__, None)
    return cls.__name__ if known is None else f"torch.nn.{cls.__name__}" if known is cls else f"{cls.__module__}.{cls.__qualname__}"


def refuse_hooks(path: str, module: nn.Module) -> None:
    """Raise ``TypeError`` where a module has hooks, or a method of its own in place of its class's: nothing calls them."""
    for attribute, kind in HOOKS.items():
        hooks = getattr(module, attribute)
        if hooks:
            raise TypeError(
                f"{path}.{attribute}: expected no {kind}, got {len(hooks)}: a rollout reads the parameters of {path!r} and does not call "
                f"it; {_REMEDY}"
            )
    for name in _METHODS:
        if name in vars(module):
            raise TypeError(
                f"{path}.{name}: expected that of {name_of(type(module))}, got {vars(module)[name]!r} on the instance, which a rollout "
                "would not call"
            )


def refuse_global_hooks() -> None:
    """Raise ``TypeError`` where all modules have hooks that would be called with what a layer takes or gives. (PyTorch's own, as those of
    its counter of operations, only look on.)"""
    for registered_by, hooks in GLOBAL_HOOKS.items():
        for hook in list(hooks.values()):
            if not str(getattr(hook, "__module__", "")).startswith("torch."):
                raise TypeError(
                    f"torch.nn.modules.module.{registered_by}: expected no hooks of all modules, got {hook!r}: a rollout reads the "
                    f"parameters of layers and does not call them; {_REMEDY}"
                )


def computes_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module is of a class, or of a subclass that leaves its methods as they are (as parametrizations do)."""
    own = type(module)
    return isinstance(module, cls) and all(getattr(own, name, None) is getattr(cls, name, None) for name in _METHODS)


def check_layer(path: str, module: Any, classes: tuple[type[nn.Module], ...], remedy: str = "") -> None:
    """Raise ``TypeError`` unless a module computes what one of these classes does, and nobody expects it to be called."""
    if not any(isinstance(module, nn.Module) and computes_as(module, cls) for cls in classes):
        names = " or ".join(name_of(cls) for cls in classes)
        own = name_of(type(module)) if isinstance(module, nn.Module) else repr(module)
        changed = " with methods of its own" if isinstance(module, classes) else ""
        raise TypeError(f"{path}: expected {names}, got {own}{changed}{remedy and f' ({remedy})'}")
    refuse_hooks(path, module)


def pair(value: Any) -> tuple[int, int]:
    """One number or two, for height and width."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _one(path: str, attribute: str, value: Any, why: str = "") -> int:
    height, width = pair(value)
    if height != width:
        raise TypeError(f"{path}.{attribute}: expected the same for height and width, got {value}{why}")
    return height


def padding_of(path: str, conv: Any) -> tuple[int, int]:
    """A convolution's padding as two numbers."""
    padding = conv.padding
    if padding == "valid":
        return 0, 0
    if padding == "same":
        kernel = conv.weight.shape[2:]
        if any(k % 2 == 0 for k in kernel):
            raise TypeError(f'{path}.padding: expected a number for a kernel of {list(kernel)}, got "same", which pads one side more')
        return (kernel[0] - 1) // 2, (kernel[1] - 1) // 2
    return pair(padding)


def check_conv(path: str, conv: Any) -> None:
    """Raise ``TypeError`` for attributes of a convolution that no spec says."""
    if pair(conv.dilation) != (1, 1):
        raise TypeError(f"{path}.dilation: expected 1, got {conv.dilation}: a rollout has no dilated convolution")
    if conv.padding_mode != "zeros":
        raise TypeError(f"{path}.padding_mode: expected 'zeros', got {conv.padding_mode!r}")
    if conv.weight is None:
        raise TypeError(f"{path}.weight: expected a tensor, got None")


def conv_fields(path: str, conv: Any) -> dict[str, Any]:
    """The fields of a connection that a convolution decides, but for its bias."""
    check_conv(path, conv)
    kernel = tuple(conv.weight.shape[2:])
    if len(kernel) != 2:
        raise TypeError(f"{path}.weight: expected [O, I, K, K], got {list(conv.weight.shape)}")
    fields = {
        "kernel_size": _one(path, "weight", kernel, ", the size of the kernel"),
        "stride": _one(path, "stride", conv.stride),
        "padding": _one(path, "padding", padding_of(path, conv)),
        "groups": conv.groups,
    }
    if isinstance(conv, nn.ConvTranspose2d):
        fields["output_padding"] = _one(path, "output_padding", conv.output_padding)
    return fields


def check_same_conv(path: str, conv: Any, built: Any, *, fits: bool, padding_known: bool) -> None:
    """Raise ``TypeError`` where a convolution differs from the one that its connection was built with, whose spec says more than it does
    (a padding of one side, a kernel that is cut, an output padding that ``fits``)."""
    check_conv(path, conv)
    wanted = {"stride": pair(built.stride), "groups": built.groups}
    got = {"stride": pair(conv.stride), "groups": conv.groups}
    if padding_known:
        wanted["padding"], got["padding"] = padding_of(path, built), padding_of(path, conv)
    elif isinstance(conv.padding, str) or pair(conv.padding) != pair(built.padding):
        raise TypeError(f"{path}.padding: expected {built.padding}, as it was built (the connection pads by itself), got {conv.padding}")
    if isinstance(built, nn.ConvTranspose2d) and not fits:
        wanted["output_padding"], got["output_padding"] = pair(built.output_padding), pair(conv.output_padding)
    for attribute, value in wanted.items():
        if got[attribute] != value:
            raise TypeError(f"{path}.{attribute}: expected {value}, as the connection was built, got {got[attribute]}")
