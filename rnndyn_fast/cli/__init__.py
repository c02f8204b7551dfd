"""The command `rnndyn`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED = 0, 2, 130
EXTRA = 'pip install "rnndyn-fast[cli]"'


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rnndyn` with these arguments (None: those of the process) and return its exit code.

    0: done; 2: an error that the user can mend, told in one line on standard error (with RNNDYN_DEBUG=1 as a
    traceback); 130: interrupted; 143: ended by SIGTERM.
    """
    try:
        with _terminable():
            return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt as stop:
        print("\nrnndyn: interrupted; files that were complete are kept", file=sys.stderr)
        return getattr(stop, "exit_code", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left (`rnndyn plan ... | head`). Python flushes on exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except ImportError as error:
        return _fail(error, f"{error}" if "pip install" in str(error) else f"{error}; the command line needs: {EXTRA}")
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        return _fail(error, str(error))
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        return _fail(error, str(error))  # of another process


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


def _run(argv: list[str]) -> int:
    from jsonargparse import ArgumentError

    from rnndyn_fast.cli.parser import build_parser, normalise, tidy

    argv = normalise(argv)
    parser, commands = build_parser(argv)
    if not argv:
        parser.print_help()
        return EXIT_OK
    try:
        options = parser.parse_args(argv)
    except ArgumentError as error:
        raise ValueError(f"{tidy(str(error))} (see rnndyn {' '.join([*_command_words(argv), '--help'])})") from error
    except SystemExit as stop:  # --help, --version and --print_config print and stop
        return stop.code if isinstance(stop.code, int) else EXIT_OK
    words = [options.subcommand]
    values = options[options.subcommand]
    while "subcommand" in values:
        words.append(values.subcommand)
        values = values[values.subcommand]
    given = {name: value for name, value in vars(values).items() if name != "config"}
    commands[" ".join(words)](**given)
    return EXIT_OK


def _command_words(argv: list[str]) -> list[str]:
    """The words of `argv` before its options that name a command."""
    from rnndyn_fast.cli.parser import COMMANDS

    words: list[str] = []
    for word in argv:
        if not any(name == " ".join([*words, word]) or name.startswith(" ".join([*words, word]) + " ") for name in COMMANDS):
            break
        words.append(word)
    return words


def _fail(error: BaseException, message: str) -> int:
    if os.environ.get("RNNDYN_DEBUG", "") not in ("", "0"):
        raise error
    print(f"rnndyn: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_ERROR
