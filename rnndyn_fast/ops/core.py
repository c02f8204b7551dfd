"""The native core: whether it is there, what it was built from, sizes that it tells, and its scratch. Its kernels are launched by
:mod:`rnndyn_fast.ops.launch`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops.addresses import first_element
from rnndyn_fast.ops.buffers import empty

unavailable: str | None = None  # why there is no native core, if there is none
_core: Any = None
try:
    from rnndyn_fast import _core as _module

    _module.build_info()  # raises for an RNNDYN_ISA that cannot run
    _core = _module
except (ImportError, ValueError) as error:
    _folder = Path(__file__).resolve().parents[1]
    _source = isinstance(error, ImportError) and not any(_folder.glob("_core*")) and (_folder.parent / "csrc").is_dir()
    _why = f"{_folder} is the source, where nothing is built: run Python elsewhere, or install with pip install -e" if _source else error
    unavailable = f"the native core cannot be used ({_why})"

MAX_TERMS = 6  # kMaxTerms of area_step.h; the core checks it


def module() -> Any:
    """The native module ``_core``."""
    return _core


def build_info() -> dict[str, Any]:
    """What the native core was built from and runs with; raises ``ImportError`` with the reason where there is none."""
    if unavailable:
        raise ImportError(unavailable)
    return _core.build_info()


def isa() -> str:
    """The instruction set in use: "isa" of :func:`build_info`, at no cost."""
    return _core.isa()


def on_device(tensor: Tensor) -> bool:
    """Whether the CUDA kernels are the ones for this tensor."""
    return tensor.is_cuda


# ---------------------------------------------------------------- sizes


def num_chunks(height: int, width: int, channels: int) -> int:
    """Chunks of rows in which a map is reduced (area_step.h)."""
    return _core.num_chunks(height, width, channels)


def gate_workspace_size(pixels: int, channels: int) -> int:
    """Floats of scratch with which sums over pixels are taken."""
    return 2 * _core.gate_step_workspace(pixels, channels)


def norm_workspace_size(n: int, pixels: int, channels: int, groups: int) -> int:
    """Floats of scratch of ``norm_step``."""
    return 2 * _core.norm_step_workspace(n, pixels, channels, groups)


def packed_size(op: str, fields: Mapping[str, object]) -> int:
    """Elements of a packed weight; ``fields``: those of the op that say its shape."""
    return getattr(_core, f"{op}_packed_size")({**fields, "num_threads": 1})


def packed_room(size: int) -> Tensor:
    """An uninitialised int16 vector that starts at a multiple of 64."""
    room = empty((size + 32,), torch.int16)
    return room[(-first_element(room) % 64) // 2 :][:size]


# ---------------------------------------------------------------- scratch

_workspaces = threading.local()
_KEPT_FLOATS = 1 << 20


def workspace_of(floats: int) -> tuple[Tensor, int]:
    """Scratch of at least that many floats, kept from call to call if it is small, and its first address that is a multiple of 64."""
    kept: Tensor | None = getattr(_workspaces, "scratch", None)
    if floats > _KEPT_FLOATS:
        kept = empty((floats + 16,), torch.float32)
    elif kept is None or kept.numel() < floats + 16:
        _workspaces.scratch = kept = None  # free the old one before taking the new one
        _workspaces.scratch = kept = torch.empty(floats + 16)  # (not among the buffers: it stays, and would cut their memory in two)
    first = first_element(kept)
    return kept, first + -first % 64


def drop_workspace() -> None:
    """Give up the scratch that this thread keeps from call to call; the next call that wants some takes it anew."""
    _workspaces.scratch = None


@contextmanager
def scratch(launch: Any) -> Iterator[tuple[int, int]]:
    """Addresses of the scratch that a launch, or a list of them, asks for: of the first kind, and of room that packed weights may take too,
    in a buffer of its own; 0 where none is asked for."""
    held, first = workspace_of(-(-launch.scratch_bytes // 4)) if launch.scratch_bytes else (None, 0)
    room = empty((launch.room_bytes // 4,), torch.float32) if launch.room_bytes else None
    yield first, 0 if room is None else first_element(room)
    del held, room


# ---------------------------------------------------------------- lists of launches


def needs_much_scratch(launch: Any) -> bool:
    """Whether a launch asks for scratch that is not kept from call to call, and so should be held no longer than it runs."""
    return launch.room_bytes > 0 or launch.scratch_bytes > 4 * _KEPT_FLOATS


class LaunchList:
    """Launches that one call runs, one after another, without Python's lock."""

    def __init__(self, launches: Sequence[Any]) -> None:
        self._list = _core.LaunchList(list(launches))

    def __call__(self, bases: Sequence[int]) -> None:
        """``bases``: addresses of this run, to which launches refer by number."""
        with scratch(self._list) as memory:
            self._list(bases, *memory)


# ---------------------------------------------------------------- fingerprints


def fingerprint(tensor: Tensor) -> tuple[int, int]:
    """128 bits that any change of a tensor's bytes changes, but for one in 2^64 (csrc/fingerprint.h); the tensor is on the CPU."""
    contiguous = tensor.contiguous()
    if not contiguous.is_cpu:
        raise ValueError(f"tensor: expected a CPU tensor, got one on {tensor.device}")
    return fingerprint_at(first_element(contiguous), contiguous.nbytes)


def fingerprint_at(first: int, nbytes: int) -> tuple[int, int]:
    """:func:`fingerprint` of memory."""
    one, other = _core.fingerprint(first, nbytes, torch.get_num_threads())
    return one, other
