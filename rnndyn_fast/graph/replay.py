"""Rollouts that were recorded, run again.

The first run of a rollout with certain shapes, layouts and parameters goes as ever. The second one is recorded
(:mod:`rnndyn_fast.ops.recording`); from the third on the recorded calls run, one after another. Where parameters lie elsewhere in every run
(weights that parametrizations compute), all runs are first ones. Programs share one region of memory, the stage, so one rollout at a time
runs there, from its forward pass to its backward pass; what comes meanwhile goes as ever.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch
from rnndyn_fast.ops.buffers import Region, release_buffers
from rnndyn_fast.ops.convolution import release_packed
from rnndyn_fast.ops.places import Strided, first_element, layout
from rnndyn_fast.ops.program import Program
from rnndyn_fast.ops.recording import Mark, Recorder

_MOST = 32  # recordings that are kept, and kinds of rollouts that ran once
_LARGE_RESULT = 1 << 20  # bytes
_lock = threading.Lock()


class Turn:
    """The right to use the stage; over when it is given up, or nobody holds it any more."""


class _Stage:
    """The memory of recorded rollouts."""

    def __init__(self) -> None:
        self.region: Region | None = None
        self.turn: weakref.ref[Turn] | None = None
        self.flight: weakref.ref[Flight] | None = None  # the last one
        self.recorded: Flight | None = None  # one that is being recorded

    def take(self) -> Turn | None:
        """The stage, if it is free."""
        with _lock:
            if self.recorded is not None and not self.in_use():
                self.recorded = None  # (there was no backward pass)
            if self.turn is not None and self.turn() is not None:
                return None
            if self.region is None:
                try:
                    self.region = Region(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
                except (OSError, ValueError, AttributeError):
                    return None
            if self.region.in_use():
                return None
            turn = Turn()
            self.turn = weakref.ref(turn)
            return turn

    def in_use(self) -> bool:
        """Whether anything of the last rollout is still there."""
        return self.region is not None and self.region.in_use()

    def clear(self) -> int:
        """Give back the memory that nothing is in. (Results of a recorded run lay where none will lie again.) Returns its bytes."""
        if self.region is None:
            return 0
        self.region.written_unseen()
        return self.region.give_back()

    def recorder(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Recorder:
        """Of a rollout that has the stage. (Its memory is that which others leave.)"""
        _launch.drop_workspace()
        release_buffers()
        assert self.region is not None
        return Recorder(self.region, inputs, parameters)

    def kept(self, where: Strided, holder: object) -> Tensor:
        """What a replayed forward pass kept; ``holder`` lives as long as it does."""
        assert self.region is not None
        count = math.prod(where.size)
        return self.region.held(where.place.offset, count * where.dtype.itemsize, holder).view(where.dtype).view(where.size)

    def give_up(self, turn: Turn | None) -> None:
        """End a turn."""
        with _lock:
            if turn is not None and self.turn is not None and self.turn() is turn:
                self.turn = None


_stage = _Stage()


class Recording:
    """What is known of a rollout with certain shapes."""

    def __init__(self) -> None:
        self.forward: Program | None = None
        self.backward: Program | None = None
        self.kept: list[Strided] = []  # what the forward pass keeps for the backward pass, at fixed addresses
        self.names: tuple[str, ...] = ()  # of statistics, which come after the other results
        self.pattern: Hashable = None  # of the gradients that backward takes
        self.attempts = 0
        self.marks: list[Mark] = []  # of the weights that are packed ahead
        self.replayed = False

    def replay(self, given: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        """Run the forward pass again: its results, and the buffers that they lie in."""
        assert self.forward is not None
        if not self.replayed:  # (what is touched from here on is touched in every run; what recording left is not)
            _stage.clear()
            release_buffers()
            self.replayed = True
        elif self.forward.gives_back:
            release_buffers()  # (in which the last results lay)
        return self.forward(given)


# By kind (what is run, layouts of inputs, ...) and where parameters lie.
_known: OrderedDict[tuple[Hashable, Hashable], Recording] = OrderedDict()  # of rollouts that ran more than once
_once: OrderedDict[Hashable, deque[int]] = OrderedDict()  # the others: hashes of where the parameters of the latest ones of a kind lie


def can_replay(x: Tensor) -> bool:
    """Whether rollouts of such inputs are recorded and replayed. (On devices nn.cuda_graphs does it.)"""
    return not _launch.on_device(x) and os.environ.get("RNNDYN_REPLAY") != "0"


def recording_of(key: Hashable, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Recording | None, bool]:
    """What is known of a rollout: None where it is run for the first time, or nothing can be noted of it.

    And whether this run had better keep little memory for the next one, which will be replayed in memory of its own: so does a first
    run, unless parameters seem to lie elsewhere in every run, of which none is replayed.
    """
    if not can_replay(inputs[0]):
        return None, False
    kind = (key, layout(inputs), _launch.isa(), torch.get_num_threads(), torch.is_inference_mode_enabled())
    places = tuple((first_element(p), p.shape, p.stride()) for p in parameters)
    mark = hash(places)
    with _lock:
        found = _known.get((kind, places))
        if found is not None:
            _known.move_to_end((kind, places))
            return found, False
        others = _once.setdefault(kind, deque(maxlen=_MOST))
        _once.move_to_end(kind)
        if mark not in others:
            moves = bool(others) or any(k == kind and not r.replayed for (k, _), r in _known.items())
            others.append(mark)
            if len(_once) > _MOST:
                _once.popitem(last=False)
            return None, not moves
        others.remove(mark)
        if not others:
            del _once[kind]
        found = _known[kind, places] = Recording()
        if len(_known) > _MOST:
            _known.popitem(last=False)
        return found, False


def release_memory() -> int:
    """Give back to the system what rollouts keep for the next one: recorded calls and their memory, packed weights, and buffers that no
    tensor uses.

    Returns: the bytes given back. The next rollout takes and makes them anew.
    """
    with _lock:
        _known.clear()
        _once.clear()
        free = _stage.turn is None or _stage.turn() is None
        return (_stage.clear() if free else 0) + release_packed()


_ATTEMPTS = 3  # failed ones, after which a rollout is not recorded any more


def run_inference(
    recording: Recording | None,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    run: Callable[[], list[Tensor]],
) -> list[Tensor]:
    """A rollout without gradients: recorded, replayed, or as ever."""
    if recording is None or recording.attempts > _ATTEMPTS or (turn := _stage.take()) is None:
        return run()
    try:
        if recording.forward is None:
            return _record_inference(recording, inputs, parameters, run)
        if all(_launch.fingerprint_at(first, nbytes) == mark for first, nbytes, mark in recording.marks):
            results, _ = recording.replay([*inputs, *parameters])
            return [t for t in results if t is not None]
        recording.forward = None  # (weights were changed)
    finally:
        _stage.give_up(turn)
    return run()


def _record_inference(
    recording: Recording, inputs: Sequence[Tensor], parameters: Sequence[Tensor], run: Callable[[], list[Tensor]]
) -> list[Tensor]:
    recorder = _stage.recorder(inputs, parameters)
    with recorder.noting():
        results = run()
    program = recorder.program(results)
    copies = [recorder.returned(t) for t in results]
    del results
    if program is None or _stage.in_use():
        recording.attempts += 1
    else:
        recording.forward, recording.marks, recording.replayed = program, recorder.marks, False
    _stage.clear()
    return copies


class Flight:
    """A training step between its forward and its backward pass: recorded, or replayed."""

    def __init__(self, recording: Recording, turn: Turn, recorder: Recorder | None) -> None:
        self.recording, self.recorder, self._turn = recording, recorder, turn
        self.replays = recorder is None
        self._made: list[Tensor] = []  # what the results of the forward pass lie in
        self._kept: list[Strided] = []

    @staticmethod
    def begin(recording: Recording | None, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Flight | None:
        """None: it goes as ever."""
        if recording is None or recording.attempts > _ATTEMPTS or (turn := _stage.take()) is None:
            return None
        ready = recording.forward is not None and recording.backward is not None
        if not ready:
            recording.attempts += 1
        flight = Flight(recording, turn, None if ready else _stage.recorder(inputs, parameters))
        _stage.flight = weakref.ref(flight)
        return flight

    def forward(
        self,
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        run: Callable[[], tuple[list[Tensor], list[Tensor]]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The forward pass: its results, and what it keeps for the backward pass; where it is recorded, ``run`` gives them."""
        if self.recorder is None:
            results, self._made = self.recording.replay([*inputs, *parameters])
            return [t for t in results if t is not None], [_stage.kept(where, self) for where in self.recording.kept]
        _stage.recorded = self
        with self.recorder.noting():
            found, kept = run()
        self._kept = [self.recorder.kept(t) for t in kept]
        self.recording.forward = self.recorder.program(found, last=False)
        self.recording.kept = self._settled(self.recorder)
        return [self.recorder.returned(t) for t in found], kept

    def backward(
        self,
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needs: Hashable,
        run: Callable[[], list[Tensor | None]],
    ) -> list[Tensor | None]:
        """The backward pass; where it is recorded, ``run`` is its. ``needs``: what it depends on besides."""
        given = [g for g in grads if g is not None]
        if self.replays:
            assert self.recording.backward is not None
            return self.recording.backward([*inputs, *parameters, *self._made, *given])[0]
        recorder, self.recorder = self.recorder, None
        assert recorder is not None
        recorder.give(given)
        with recorder.noting():
            found = run()
        self.recording.backward = recorder.program(found)
        self.recording.kept = self._settled(recorder)
        self.recording.pattern = needs, layout(grads)
        if self.recording.forward is not None and self.recording.backward is not None:
            self.recording.attempts = 0
        _stage.recorded = None
        returned: list[Tensor | None] = []
        while found:  # (one after another leaves the stage, so that none is there twice)
            t = found.pop(0)
            returned.append(None if t is None else recorder.returned(t))
            if t is not None and t.nbytes >= _LARGE_RESULT:
                del t
                _stage.clear()
        _stage.clear()
        return returned

    def _settled(self, recorder: Recorder) -> list[Strided]:
        """Where what is kept lies: at first as the forward pass was noted, in the end as it is replayed."""
        return [replace(where, place=recorder.settled(where.place)) for where in self._kept]

    def fits(self, grads: Sequence[Tensor | None], needs: Hashable) -> bool:
        """Whether the backward pass can be replayed, or recorded, with gradients of this layout."""
        return self.recording.pattern == (needs, layout(grads)) if self.replays else self.recorder is not None


def flight_of(saved: Sequence[Tensor]) -> Flight | None:
    """The one whose forward pass kept these tensors, if any."""
    flight = _stage.flight() if _stage.flight is not None else None
    if flight is None or [where.place.offset for where in flight.recording.kept] != [first_element(t) for t in saved]:
        return None
    return flight
