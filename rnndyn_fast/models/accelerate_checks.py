"""Whether a published instance computes what its accelerated form will: what is called in one and not in the other, and one image through
both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rnndyn_fast.models.blt_net import BLTNet
from rnndyn_fast.models.blt_vs_net import BLTVS
from rnndyn_fast.nn.layer_checks import computes_as, name_of, pair, refuse_hooks

# Largest difference of results, of the largest of their magnitudes (or of 1).
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
HALF_TOLERANCE = 0.1
_ACTIVATIONS = (nn.ReLU, nn.Softmax, nn.LogSoftmax, nn.Identity)  # what the published classes may hold
_POOLING = "torch.nn.modules.pooling"


def refuse_wrappers(module: nn.Module) -> None:
    """Raise ``TypeError`` for a module around the published one: it is told what to pass."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"module: expected the published module, got the {name} that torch.jit made of it; pass the module itself")
    for attribute, again in (("_orig_mod", "torch.compile"), ("module", name)):
        inner = module._modules.get(attribute)
        if len(module._modules) == 1 and inner is not None:
            raise TypeError(
                f"module: expected the published module, got {name} around {type(inner).__name__}; pass module.{attribute}, and give the "
                f"result to {again} again"
            )


def check_modules(theirs: nn.Module, ours: nn.Module) -> None:
    """Raise ``TypeError`` for what the published instance would call and ours does not: hooks, methods on instances, poolings and
    activations of another kind."""
    shared = {id(m) for m in ours.modules()}
    called = [m for name, m in ours.named_children() if name == "readout" or (isinstance(ours, BLTVS) and name != "connections")]
    free = {id(part) for m in called for part in m.modules()}
    for path, module in theirs.named_modules():
        if ".parametrizations" in f".{path}" or id(module) in free:
            continue
        refuse_hooks(path or "module", module)
        if id(module) not in shared and next(module.children(), None) is None:
            _check_unshared(path, module, theirs)


def _check_unshared(path: str, module: Any, theirs: nn.Module) -> None:
    """A layer that has no place in ours."""
    if type(module).__module__ == _POOLING:
        if path.startswith("gap."):
            whole = isinstance(module, nn.AdaptiveAvgPool2d) and pair(module.output_size) == (1, 1)
            if not whole and not computes_as(module, nn.AvgPool2d):
                raise TypeError(f"{path}: expected torch.nn.AvgPool2d over the whole map, got {module}")
            return
        if not computes_as(module, nn.MaxPool2d):
            raise TypeError(f"{path}: expected torch.nn.MaxPool2d(2, 2), got {module}")
        for name, wanted in (("kernel_size", 2), ("stride", 2), ("padding", 0), ("dilation", 1)):
            if pair(getattr(module, name)) != (wanted, wanted):
                raise TypeError(f"{path}.{name}: expected {wanted}, got {getattr(module, name)}")
        if module.ceil_mode or module.return_indices:
            raise TypeError(f"{path}: expected torch.nn.MaxPool2d(2, 2), got {module}")
    elif type(module).__module__ == "torch.nn.modules.activation" and not any(computes_as(module, cls) for cls in _ACTIVATIONS):
        raise TypeError(f"{path}: expected torch.nn.ReLU, got {name_of(type(module))}")
    elif isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        raise TypeError(f"{path}: expected no dropout, got {module}")


def _tensors(result: Any) -> Iterator[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        yield from result if result.dim() == 3 else (result,)
    elif isinstance(result, dict):
        for part in result.values():
            yield from _tensors(part)
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _tensors(part)


def _example(theirs: Any, ours: Any) -> list[Tensor]:
    """One sample of random inputs."""
    like = next(theirs.parameters())
    if isinstance(ours, BLTNet | BLTVS):
        shapes = [(n.channels, n.height, n.width) for n in ours.network.inputs]
    else:
        out, channels = ours.bottom_up.out_channels, ours.bottom_up.in_channels
        size = 16 if ours.pool_input else 8
        shapes = [(channels, size, size), (out, 8, 8), (2 * out, 4, 4)]
        shapes = shapes[:3] if ours.topdown_connect else shapes[:2] if ours.lateral_connect else shapes[:1]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((1, *shape), generator=generator).to(like.device, like.dtype) for shape in shapes]


def check_equal(theirs: nn.Module, ours: nn.Module) -> None:
    """Run one random sample through both.

    Raises:
        TypeError: the results differ, with the largest difference; or the published instance cannot be called.
    """
    if type(theirs).forward is nn.Module.forward:
        return
    inputs = _example(theirs, ours)
    like = inputs[0]
    modes = {m: m.training for m in (*theirs.modules(), *ours.modules())}
    try:
        for m in modes:
            m.training = False
        # (Of Apple's GPU PyTorch cannot take and give back the random state so.)
        kept = {"devices": [like.device], "device_type": like.device.type} if like.device.type in ("cuda", "xpu") else {"devices": []}
        with torch.no_grad(), torch.random.fork_rng(**kept), torch.autocast(like.device.type, enabled=False):
            try:
                expected = list(_tensors(theirs(*inputs)))
            except Exception as error:
                shapes = ", ".join(str(list(x.shape)) for x in inputs)
                raise TypeError(
                    f"module: {type(theirs).__name__} fails on random inputs {shapes} ({error}); check=False skips this"
                ) from error
            found = list(_tensors(ours(*inputs)))
    finally:
        for m, mode in modes.items():
            m.training = mode
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise TypeError(
            f"module: {type(theirs).__name__} gives {len(expected)} tensors {_shapes(expected)} for one image, its accelerated form "
            f"{len(found)} {_shapes(found)}; check=False skips this comparison"
        )
    limit = TOLERANCE.get(like.dtype, HALF_TOLERANCE)
    for step, (theirs_, ours_) in enumerate(zip(expected, found, strict=True)):
        difference = float((theirs_.double() - ours_.double()).abs().max())
        scale = max(1.0, float(theirs_.double().abs().max()))
        if not difference <= limit * scale:
            raise TypeError(
                f"module: {type(theirs).__name__} computes something else than the published class: for one random image the results "
                f"differ by up to {difference:.3g} (result {step} of {len(found)}, values up to {scale:.3g}); has its forward been "
                "changed? check=False skips this comparison"
            )


def _shapes(tensors: list[Tensor]) -> str:
    return str([list(t.shape) for t in tensors[:4]]) if tensors else "[]"
