"""The command `rnndyn`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rnndyn_fast.optional import require

EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED = 0, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rnndyn` with these arguments (None: those of the process) and return its exit code.

    0: done; 2: an error that the user can fix, reported in one line on standard error (with RNNDYN_DEBUG=1 as a
    traceback); 130: interrupted.
    """
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("\nrnndyn: interrupted; files that were complete are kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`rnndyn plan ... | head`). Python flushes on exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except ImportError as error:
        return _fail(error, str(error))
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        return _fail(error, str(error))


def _run(argv: list[str]) -> int:
    from rnndyn_fast.cli.parser import WITHOUT_OPTIONS, build_overview, build_parser, normalise, tidy

    if not argv or argv[0] in ("-h", "--help", "--version", *WITHOUT_OPTIONS):
        return _run_overview(build_overview(), argv)
    require("jsonargparse")
    from jsonargparse import ArgumentError

    argv = normalise(argv)
    parser, commands = build_parser(argv)
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


def _run_overview(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """What needs no optional package."""
    from rnndyn_fast.cli.parser import COMMANDS

    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error} (see rnndyn --help)") from error
    except SystemExit as stop:  # --help and --version print and stop
        return stop.code if isinstance(stop.code, int) else EXIT_OK
    if rest:
        raise ValueError(f"unrecognized arguments: {' '.join(rest)} (see rnndyn {' '.join([*argv[:1], '--help'])})")
    if options.subcommand is None:
        parser.print_help()
    else:
        COMMANDS[options.subcommand][1]()
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
