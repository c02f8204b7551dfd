"""The command `rnndyn`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from rnndyn_fast.optional import require

EXIT_OK, EXIT_ERROR, EXIT_FAULT, EXIT_INTERRUPTED = 0, 2, 70, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rnndyn` with these arguments (None: those of the process) and return its exit code.

    0: done; 2: an error that the user can mend, 70: a fault of ours, each told in one line on standard error (with RNNDYN_DEBUG=1 as a
    traceback); 130: interrupted; 143: ended by SIGTERM.
    """
    told = _Told()
    try:
        with _terminable():
            return _run(list(sys.argv[1:] if argv is None else argv), told)
    except KeyboardInterrupt as stop:
        print("\nrnndyn: interrupted; files that were complete are kept", file=sys.stderr)
        return getattr(stop, "exit_code", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left (`rnndyn plan ... | head`). Python flushes on exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:
        return told.fail(error)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, with messages and cleaning up."""

    def end(number: int, frame: FrameType | None) -> None:
        from rnndyn_fast.train.signals import Stopped

        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _UsageError(ValueError):
    """What the parser says, and where to read on."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class _Told:
    """How errors of a command are told: its arguments' names are needed to say them as they are typed."""

    options: Collection[str] = ()
    positionals: Collection[str] = ()

    def fail(self, error: Exception) -> int:
        """Print an error and return the exit code."""
        if os.environ.get("RNNDYN_DEBUG", "") not in ("", "0"):
            raise error
        from rnndyn_fast.cli.messages import for_people
        from rnndyn_fast.file_io import space_error

        full = space_error(error)
        told = isinstance(error, ValueError | TypeError | OSError | FloatingPointError | MemoryError | RuntimeError | ImportError)
        text = str(full if full is not None else str(error) or type(error).__name__)
        if told or full is not None:
            print(f"rnndyn: error: {for_people(text, self.options, self.positionals)}{getattr(error, 'hint', '')}", file=sys.stderr)
            return EXIT_ERROR
        print(
            f"rnndyn: fault: {type(error).__name__}: {' '.join(text.split())} (nothing that you did; please report it with what "
            "RNNDYN_DEBUG=1 prints)",
            file=sys.stderr,
        )
        return EXIT_FAULT


def _run(argv: list[str], told: _Told) -> int:
    from rnndyn_fast.cli.table import GROUPS, WITHOUT_OPTIONS, about, find_command, overview, place

    command, words = find_command(argv)
    if not command:
        if argv[:1] == ["--version"]:
            from rnndyn_fast import __version__

            print(f"rnndyn {__version__}")
        else:
            print(overview(argv[0] if argv and argv[0] in GROUPS else ""))
        return EXIT_OK
    from rnndyn_fast.cli import commands

    function = getattr(commands, command.replace(" ", "_").replace("import", "import_weights"))
    if command in WITHOUT_OPTIONS:  # and without optional packages
        if words and words != ["--help"] and words != ["-h"]:
            raise _UsageError(f"unrecognized arguments: {' '.join(words)}", f" (see rnndyn {command} --help)")
        print(about(command)) if words else function()
        return EXIT_OK
    require("jsonargparse")
    from jsonargparse import ArgumentError

    from rnndyn_fast.cli.arguments import command_parser
    from rnndyn_fast.cli.parser import normalise, repeated
    from rnndyn_fast.suggestions import flag, nearest

    parser = command_parser(command)
    told.options, told.positionals = list(parser.hints), parser.positionals
    try:
        words = normalise(words, parser)
        given = parser.parse(words)
    except ArgumentError as error:
        message = str(error)
        unknown = next((word for word in message.partition("unrecognized arguments: ")[2].split() if word.startswith("--")), None)
        near = "" if unknown is None else nearest(unknown, map(flag, parser.hints))
        raise _UsageError(f"{message}{near}", f" (see rnndyn {command} --help)") from error
    except SystemExit as stop:  # --help and --print-config print and stop
        return stop.code if isinstance(stop.code, int) else EXIT_OK
    for name, values in repeated(words).items():
        print(f"rnndyn: {name} is there {len(values)} times ({', '.join(values)}); the last one counts", file=sys.stderr)
    if given.get("out") is not None:
        given["out"] = place(command, given["out"])
    function(**given)
    return EXIT_OK
