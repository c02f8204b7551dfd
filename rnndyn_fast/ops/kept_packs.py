"""Packed weights that are kept from one rollout to the next."""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor

from rnndyn_fast.ops import core
from rnndyn_fast.ops.amx_conv import AmxMap, PackedAmxWeight, pack_amx_weight
from rnndyn_fast.ops.buffers import release_buffers
from rnndyn_fast.ops.winograd_conv import PackedWeight, WinogradMap, pack_weight

Packed = PackedWeight | PackedAmxWeight

_KEPT_BYTES = 512 * 1024 * 1024
_kept: OrderedDict[tuple[int, tuple[int, ...], WinogradMap | AmxMap], tuple[tuple[int, int], Packed]] = OrderedDict()
_kept_lock = threading.Lock()


def kept_pack(m: WinogradMap | AmxMap, weight: Tensor) -> Packed:
    """Packed weights of earlier rollouts. A weight is known by the fingerprint of its bytes: in-place changes can hide from version
    counters (``.data``)."""
    key = (weight.data.untyped_storage()._cdata, tuple(weight.shape), m)
    mark = core.fingerprint(weight.detach())
    with _kept_lock:
        entry = _kept.get(key)
        if entry is not None and entry[0] == mark:
            _kept.move_to_end(key)
            return entry[1]
        packed = pack_amx_weight(m, weight) if isinstance(m, AmxMap) else pack_weight(m, weight)
        _kept[key] = mark, packed
        _kept.move_to_end(key)
        while len(_kept) > 1 and sum(p.nbytes for _, p in _kept.values()) > _KEPT_BYTES:
            _kept.popitem(last=False)
        return packed


def release_packed() -> int:
    """Give back to the system packed weights that are kept, and buffers that no tensor uses. Returns the bytes given back."""
    with _kept_lock:
        _kept.clear()  # (the packed forms lie in the buffers)
    return release_buffers()
