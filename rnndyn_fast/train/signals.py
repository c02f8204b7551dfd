"""SIGTERM and Ctrl-C: a run finishes the step that it is at, saves, and ends."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

PATIENCE_S = 3.0  # a launcher passes on what the terminal has sent already: a second signal within that time is the first one again


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and has saved; ``signum`` says by which signal."""

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal has ended."""
        return 128 + self.signum


class StopRequest:
    """While it is entered, SIGTERM and SIGINT are noted; a second one some seconds later ends at once. In other threads than the main one
    nothing is changed."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is not None and now - self._time > PATIENCE_S:
            raise Stopped(number)
        if self.signum is None:
            self.signum, self._time = number, now

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    def stopped(self) -> Stopped:
        """The exception to end with (another process may have got the signal)."""
        return Stopped(signal.SIGTERM if self.signum is None else self.signum)
