"""Rollouts that were recorded, run again.

The first run of a rollout with certain shapes, layouts and parameters goes as ever. The second one is recorded
(:mod:`rnndyn_fast.ops.recording`); from the third on the recorded calls run, one after another. Programs share one region of memory, the
stage, so one rollout at a time runs there, from its forward pass to its backward pass; what comes meanwhile goes as ever.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch
from rnndyn_fast.ops.buffers import Region, release_buffers
from rnndyn_fast.ops.recording import Mark, Program, Recorder

_MOST = 32  # programs that are kept
_lock = threading.Lock()


class Turn:
    """The right to use the stage; over when it is given up, or nobody holds it any more."""


class _Stage:
    """The memory of recorded rollouts."""

    def __init__(self) -> None:
        self.region: Region | None = None
        self.turn: weakref.ref[Turn] | None = None

    def take(self) -> Turn | None:
        """The stage, if it is free."""
        with _lock:
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

    def recorder(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Recorder:
        """Of a rollout that has the stage. (Its memory is that which others leave.)"""
        release_buffers()
        assert self.region is not None
        return Recorder(self.region, inputs, parameters)

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
        self.pattern: Hashable = None  # of the gradients that backward takes
        self.attempts = 0
        self.marks: list[Mark] = []  # of the weights that are packed ahead


_known: OrderedDict[Hashable, Recording] = OrderedDict()


def layout(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """What a program depends on of tensors whose values change."""
    return tuple((t.shape, t.stride(), t.dtype) for t in tensors)


def recording_of(key: Hashable, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Recording | None:
    """What is known of a rollout; None where it is run for the first time, or nothing can be noted of it."""
    if any(t.device.type != "cpu" for t in inputs):
        return None
    whole = (
        key,
        layout(inputs),
        tuple((p.data_ptr(), p.shape, p.stride()) for p in parameters),
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
    )
    with _lock:
        found = _known.get(whole)
        if found is None:
            _known[whole] = Recording()
            while len(_known) > _MOST:
                _known.popitem(last=False)
            return None
        _known.move_to_end(whole)
        return found


def forget() -> int:
    """Drop all programs, and give their memory back. Returns its bytes."""
    with _lock:
        _known.clear()
        return 0 if _stage.region is None else _stage.region.give_back()


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
            results, _ = recording.forward([*inputs, *parameters])
            return [t for t in results if t is not None]
        recording.forward = None
    finally:
        _stage.give_up(turn)
    return run()


def _record_inference(
    recording: Recording, inputs: Sequence[Tensor], parameters: Sequence[Tensor], run: Callable[[], list[Tensor]]
) -> list[Tensor]:
    recorder = _stage.recorder(inputs, parameters)
    with recorder.noting():
        results = run()
    copies = [t.clone() for t in results]
    program = recorder.program(results)
    del results
    if program is None or _stage.in_use():
        recording.attempts += 1
    else:
        recording.forward, recording.marks = program, recorder.marks
    return copies


class Flight:
    """A training step between its forward and its backward pass: recorded, or replayed."""

    def __init__(self, recording: Recording, turn: Turn, recorder: Recorder | None) -> None:
        self.recording, self.turn, self.recorder = recording, turn, recorder
        self.made: list[Tensor] = []  # what the results of the forward pass lie in

    @staticmethod
    def begin(recording: Recording | None, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Flight | None:
        """None: it goes as ever."""
        if recording is None or recording.attempts > _ATTEMPTS or (turn := _stage.take()) is None:
            return None
        ready = recording.forward is not None and recording.backward is not None
        if not ready:
            recording.attempts += 1
        return Flight(recording, turn, None if ready else _stage.recorder(inputs, parameters))

    def forward(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor], run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The forward pass; where it is recorded, ``run`` is its."""
        if self.recorder is None:
            assert self.recording.forward is not None
            results, self.made = self.recording.forward([*inputs, *parameters])
            return [t for t in results if t is not None]
        with self.recorder.noting():
            found = run()
        self.recording.forward = self.recorder.program(found)
        return [t.clone() for t in found]

    def backward(
        self,
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        run: Callable[[], list[Tensor | None]],
    ) -> list[Tensor | None]:
        """The backward pass; where it is recorded, ``run`` is its. Ends the turn."""
        given = [g for g in grads if g is not None]
        try:
            if self.recorder is None:
                assert self.recording.backward is not None
                return self.recording.backward([*inputs, *parameters, *self.made, *given])[0]
            self.recorder.give(given)
            with self.recorder.noting():
                found = run()
            self.recording.backward = self.recorder.program(found)
            self.recording.pattern = _pattern(grads)
            if self.recording.backward is not None:
                self.recording.attempts = 0
            return [None if t is None else t.clone() for t in found]
        finally:
            self.end()

    def fits(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether the backward pass can run, or be recorded, with gradients of this layout."""
        return self.recorder is not None or self.recording.pattern == _pattern(grads)

    def end(self) -> None:
        """Leave the stage to others."""
        _stage.give_up(self.turn)


def _pattern(grads: Sequence[Tensor | None]) -> Hashable:
    return tuple(None if g is None else layout([g]) for g in grads)
