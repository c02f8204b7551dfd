"""The launch table: one declaration of each op (:class:`Op`), from which checks of its operands, their addresses, scratch, and the way to
the CPU's or the GPU's kernel follow. The declarations are in :mod:`rnndyn_fast.ops.launches`, and beside the convolutions.

A kernel knows its fields by the same names (``csrc/launch_fields.h``, ``csrc/cpu/launch_fields.h``, ``csrc/cuda/launch_fields.h``), and
refuses a name that it lacks. Nothing here synchronises, and nothing is allocated but scratch. Callers hold every tensor in their own frame
for the length of a call, so that no address outlives its storage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import addresses, core, cuda_module
from rnndyn_fast.ops.addresses import Use, first_element

MAP, PARAMETER = "of maps", "of parameters"  # dtypes: the maps' own; and theirs on the CPU, float32 on devices
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Buffer:
    """A tensor of a launch, or each of a list of them. ``shape``: sizes by name, or as numbers, "name//2" for half of one, "name#" for
    one of each of a list. A size that no buffer before it had is taken from the tensor."""

    shape: str | Callable[[Numbers], str]  # (of the launch's numbers)
    use: Use | Callable[[Numbers], Use]
    dtype: torch.dtype | str = MAP
    rows_apart: bool | str = False  # only rows need be contiguous; "cpu": there
    wide: bool = True  # on devices read or written by vectors, where channels allow it
    cpu_only: bool = False
    scratch: bool = False  # on devices it comes from elsewhere

    @property
    def may_be_read(self) -> bool:
        """Whether a launch may read what is there before it."""
        return self.use is not Use.WRITE

    @property
    def may_be_written(self) -> bool:
        """Whether a launch may write it."""
        return self.use is not Use.READ


def read(shape: str | Callable[[Numbers], str], dtype: torch.dtype | str = MAP, **options: Any) -> Buffer:
    """A buffer that is read."""
    return Buffer(shape, Use.READ, dtype, **options)


def write(shape: str | Callable[[Numbers], str], dtype: torch.dtype | str = MAP, **options: Any) -> Buffer:
    """A buffer that is written whole."""
    return Buffer(shape, Use.WRITE, dtype, **options)


def update(shape: str, dtype: torch.dtype | str = MAP) -> Buffer:
    """A buffer that is added to."""
    return Buffer(shape, Use.UPDATE, dtype)


Operand = Any  # a tensor, None, or a list of operands


# ---------------------------------------------------------------- launches that are kept


class Recorder:
    """Launches of this thread are kept here instead of being run. ``locate`` may give (base, offset) for an address that differs from run
    to run."""

    def __init__(self, locate: Callable[[int], int | tuple[int, int]]) -> None:
        self.locate = locate
        self.launches: list[Any] = []


_recording = threading.local()


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Keep launches of this thread in ``recorder``."""
    before = getattr(_recording, "recorder", None)
    _recording.recorder = recorder
    try:
        yield
    finally:
        _recording.recorder = before


class CpuCall:
    """Addresses of a launch on the CPU, and the launch itself."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = getattr(_recording, "recorder", None)

    def address(
        self, tensor: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype, *, rows_apart: bool = False, offset: int = 0
    ) -> Any:
        """The address of so many bytes after a tensor's beginning; the tensor is checked."""
        contiguous = tensor.is_contiguous() or (rows_apart and (tensor.shape[-1] == 1 or tensor.stride(-1) == 1))
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or not tensor.is_cpu or not contiguous:
            expected = "CPU tensor with contiguous rows" if rows_apart else "contiguous CPU tensor"
            layout = "" if contiguous else f" with strides {list(tensor.stride())}, not contiguous"
            came = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}{layout}"
            raise ValueError(f"{name}: expected a {expected} {list(shape)} of {dtype}, got {came}")
        first = first_element(tensor) + offset
        return first if self.recorder is None else self.recorder.locate(first)

    def whole(self, tensor: Tensor, name: str, offset: int = 0) -> Any:
        """:meth:`address` of a tensor of any shape; float32, or packed weights."""
        dtype = tensor.dtype if tensor.dtype == torch.int16 else torch.float32
        return self.address(tensor, name, tensor.shape, dtype, offset=offset)

    def run(self, op: str, dtype: torch.dtype, values: dict[str, Any]) -> None:
        """Launch, or keep the launch."""
        values["num_threads"] = torch.get_num_threads()
        launch = core.module().launch(op, str(dtype).removeprefix("torch."), values)
        if self.recorder is not None:
            self.recorder.launches.append(launch)
        else:
            with core.scratch(launch) as memory:
                launch(*memory)


class DeviceCall:
    """Addresses of a launch on a CUDA device, and the launch itself. A misaligned operand of a kernel that reads vectors is copied."""

    def __init__(self, like: Tensor, vectors_of: int) -> None:
        self.device, self.dtype = like.device, like.dtype
        if self.dtype not in cuda_module.DTYPES:
            raise ValueError(f"expected float32, float16 or bfloat16, got {self.dtype}")
        self.queue = addresses.device_queue(self.device)
        vector = 16 // self.dtype.itemsize
        self._vector = vector if vectors_of and vectors_of % vector == 0 else 0
        self._copies: list[Tensor] = []  # held until the launch, after which the allocator gives their memory to later work of the stream
        self._results: list[tuple[Tensor, Tensor]] = []  # where the kernel writes, and where the caller wants it

    def _aligned(self, tensor: Tensor, use: Use) -> Tensor:
        """The tensor, or a copy where the kernel's loads or stores are wider than its address allows."""
        if not self._vector or not tensor.is_contiguous():
            return tensor
        if first_element(tensor) % (self._vector if tensor.dtype == torch.uint8 else 16) == 0:
            return tensor
        copy = torch.empty_like(tensor) if use is Use.WRITE else tensor.clone()
        if use is Use.READ:
            self._copies.append(copy)
        else:
            self._results.append((copy, tensor))
        return copy

    def address(self, tensor: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype, use: Use, buffer: Buffer) -> int:
        """An address, checked."""
        apart = buffer.rows_apart is True
        if buffer.wide and not apart:
            tensor = self._aligned(tensor, use)
        return addresses.device_address(tensor, name, shape, dtype, self.device, use, rows_apart=apart)

    def run(self, op: str, values: dict[str, Any]) -> None:
        """Launch, and bring results to where the caller wants them."""
        launch = cuda_module.module().launch(op, cuda_module.DTYPES[self.dtype], values, self.queue[0])
        memory = torch.empty(launch.scratch_bytes, dtype=torch.uint8, device=self.device) if launch.scratch_bytes else None
        launch(*self.queue, 0 if memory is None else first_element(memory))
        for written, wanted in self._results:
            wanted.copy_(written)


# ---------------------------------------------------------------- the declaration of an op


def _tensors(operand: Operand) -> Iterator[Tensor]:
    if isinstance(operand, Tensor):
        yield operand
    elif operand is not None:
        for one in operand:
            yield from _tensors(one)


class Op:
    """An op: a kernel on the CPU, on devices, or on both.

    Args:
        name: of the kernels.
        sizes: names of sizes that the kernels take; others only serve to check shapes.
        numbers: names of numbers that they take, as they are.
        buffers: by the names of operands, in the order in which sizes are learnt.
        derive: what else the kernels take, from operands, sizes, the values so far, and whether on a device.
        cpu_numbers: names of numbers that only the CPU's kernel takes.
        vectors: on devices maps are read by vectors, where the first one's channels fill them.
    """

    def __init__(
        self,
        name: str,
        sizes: str,
        numbers: str,
        buffers: Mapping[str, Buffer],
        derive: Callable[[Numbers, dict[str, int], dict[str, Any], bool], dict[str, Any]] | None = None,
        *,
        cpu_numbers: str = "",
        vectors: bool = False,
    ) -> None:
        self.name, self.buffers, self._derive, self._vectors = name, dict(buffers), derive, vectors
        self._sizes, self._numbers, self._cpu_numbers = sizes.split(), numbers.split(), cpu_numbers.split()
        self._shapes = {key: b.shape.split() for key, b in self.buffers.items() if isinstance(b.shape, str)}

    def __call__(self, **given: Operand) -> None:
        """Launch; operands, numbers, and sizes that no buffer tells, by their names. What is absent is None, or not named."""
        like = self._like(given)
        if core.on_device(like):
            self.on_device(**given)
            return
        call, dtype = CpuCall(), like.dtype

        def address(tensor: Tensor, name: str, shape: Sequence[int], kind: torch.dtype | str, buffer: Buffer) -> Any:
            return call.address(tensor, name, shape, dtype if isinstance(kind, str) else kind, rows_apart=bool(buffer.rows_apart))

        call.run(self.name, dtype, self._values(given, address, device=False))

    def on_device(self, **given: Operand) -> None:
        """Launch on a CUDA device."""
        like = self._like(given)
        call = DeviceCall(like, like.shape[-1] if self._vectors else 0)

        def address(tensor: Tensor, name: str, shape: Sequence[int], kind: torch.dtype | str, buffer: Buffer) -> int:
            dtype = kind if not isinstance(kind, str) else call.dtype if kind == MAP else torch.float32
            use = buffer.use if isinstance(buffer.use, Use) else buffer.use(given)
            return call.address(tensor, name, shape, dtype, use, buffer)

        call.run(self.name, self._values(given, address, device=True))

    def _like(self, given: Mapping[str, Operand]) -> Tensor:
        for name, buffer in self.buffers.items():
            if buffer.dtype == MAP:
                for tensor in _tensors(given.get(name)):
                    return tensor
        raise ValueError(f"{self.name}: expected a map among the operands")

    def _values(self, given: Mapping[str, Operand], address: Callable[..., Any], *, device: bool) -> dict[str, Any]:
        known = {*self._numbers, *self._cpu_numbers, *self.buffers}
        sizes: dict[str, int] = {name: n for name, n in given.items() if type(n) is int and name not in known}
        values: dict[str, Any] = {name: given[name] for name in self._numbers if name in given}
        if not device:
            values |= {name: given[name] for name in self._cpu_numbers if name in given}
        for name, buffer in self.buffers.items():
            operand = given.get(name)
            if operand is None or (device and buffer.scratch):
                continue
            if device and buffer.cpu_only:
                if any(True for _ in _tensors(operand)):
                    raise ValueError(f"{name}: not on devices")
                continue
            words = self._shapes.get(name) or buffer.shape(given).split()  # type: ignore[operator]
            values[name] = self._addresses(operand, name, words, sizes, buffer, address)
        if self._derive is not None:
            values |= self._derive(given, sizes, values, device)
        return values | {name: sizes[name] for name in self._sizes if name in sizes}

    def _addresses(
        self, operand: Operand, name: str, words: list[str], sizes: dict[str, int], buffer: Buffer, address: Callable[..., Any]
    ) -> Any:
        if operand is None:
            return None
        if not isinstance(operand, Tensor):
            each = (
                [[word.replace("#", str(i)) for word in words] for i in range(len(operand))]
                if "#" in "".join(words)
                else [words] * len(operand)
            )
            return [
                self._addresses(one, f"{name}[{i}]", own, sizes, buffer, address)
                for i, (one, own) in enumerate(zip(operand, each, strict=True))
            ]
        return address(operand, name, _shape(operand, words, sizes), buffer.dtype, buffer)


def _shape(tensor: Tensor, words: Sequence[str], sizes: dict[str, int]) -> list[int]:
    """The shape that is expected; sizes that are new are those of the tensor."""
    shape = []
    for i, word in enumerate(words):
        known = sizes.get(word)
        if known is None:
            name, _, divisor = word.partition("//")
            if word.isdecimal():
                known = int(word)
            elif divisor and name in sizes:
                known = sizes[name] // int(divisor)
            else:
                known = sizes[word] = tensor.shape[i] if i < tensor.dim() else 0
        shape.append(known)
    return shape


def expect_size(name: str, sizes: dict[str, int], size: str, expected: int) -> None:
    """Check a size that others tell, of a buffer that may be absent."""
    if sizes.get(size, expected) != expected:
        raise ValueError(f"{name}: expected {expected} {size}, got {sizes[size]}")
