"""The parser of a command's words: options in kebab-case, lists with commas, switches."""

from __future__ import annotations

import argparse
import itertools
import re
import typing
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union

from rnndyn_fast.cli.table import COMMANDS
from rnndyn_fast.optional import require
from rnndyn_fast.suggestions import flag

_PATHS = ("out", "data", "checkpoint", "run", "weights", "result", "source")
_YES_NO = ("true", "false", "yes", "no")


def _help_formatter() -> type[argparse.HelpFormatter]:
    """Help without types of Python: what an option means, whether it is required, and its default."""
    require("jsonargparse")
    from jsonargparse import DefaultHelpFormatter

    class Help(DefaultHelpFormatter):
        def _get_help_string(self, action: Any) -> str:
            text, value = action.help or "", action.default
            if action.option_strings and action.required:
                return f"{text} (required)"
            if value in (None, "", [], (), {}, argparse.SUPPRESS) or action.dest in ("help", "config", "print_config"):
                return text
            if isinstance(value, bool):
                value = str(value).lower()
            shown = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            return f"{text} (default: {shown})".replace("%", "%%")

    return Help


class CommandParser:
    """The parser of one command; `hints`: types of its options, and `positionals` its other arguments, by their names in Python."""

    def __init__(self, command: str) -> None:
        require("jsonargparse")
        from jsonargparse import ArgumentParser

        self.command = command
        self.parser = ArgumentParser(
            prog=f"rnndyn {command}",
            description=COMMANDS[command],
            exit_on_error=False,
            allow_abbrev=False,
            print_config="--print-%s",
            formatter_class=_help_formatter(),
        )
        self.hints: dict[str, Any] = {"config": str}
        self.positionals: list[str] = []

    def parse(self, words: list[str]) -> dict[str, Any]:
        """Values of the arguments by name. Raises ``ArgumentError``, and ``SystemExit`` after --help and --print-config."""
        given = vars(self.parser.parse_args(words))
        for name, value in given.items():
            if value == "" and self.parser.get_default(name) != "":  # (as a variable of a shell that is not set; a path "" would be here)
                what = name if name in self.positionals else flag(name)
                raise argparse.ArgumentError(None, f"{what}: expected {'a path' if name in _PATHS else 'a value'}, got an empty text")
        return {name: value for name, value in given.items() if name != "config"}


def normalise(argv: list[str], parser: CommandParser) -> list[str]:
    """The words of a command as its parser takes them.

    Options may be written with underscores and in any case (--batch_size, --LT_interaction), lists without brackets (--widths 4,6,8),
    switches without a value, whatever follows them (--overwrite), and optional numbers as none (--stop-loss none).

    Raises ``ArgumentError`` for a switch that is neither true nor false.
    """
    lists = [flag(name) for name, hint in parser.hints.items() if _is_list(hint)]
    switches = [flag(name) for name, hint in parser.hints.items() if hint is bool]
    numbers = [flag(name) for name, hint in parser.hints.items() if {int, float} & {*typing.get_args(hint)} and _may_be_none(hint)]
    out: list[str] = []
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.lower().replace("_", "-")
            if name in switches and not equals and after.lower() not in _YES_NO:
                if after and not after.startswith("-") and not parser.positionals:
                    raise argparse.ArgumentError(None, f"{name}: expected true or false, or nothing after it, got {after}")
                equals, value = "=", "true"
            if name == "--config" and equals:
                value = _config_file(parser, value)
            if name in numbers:
                value = _null(value)
            word = name + equals + (_bracketed(value) if name in lists else value)
        elif out and out[-1] in lists:
            word = _bracketed(word)
        elif out and out[-1] == "--config":
            word = _config_file(parser, word)
        elif out and out[-1] in numbers:
            word = _null(word)
        out.append(word)
    return out


def repeated(words: list[str]) -> dict[str, list[str]]:
    """Options that are there more than once with different values, of which the last counts, and these values. ``words``: normalised."""
    given: dict[str, list[str]] = {}
    for word, after in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name != "--config":  # (of several files, later ones say what earlier ones do not)
            given.setdefault(name, []).append((value if equals else after).strip("[]"))
    return {name: values for name, values in given.items() if len(set(values)) > 1}


def _may_be_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _null(value: str) -> str:
    return "null" if value.lower() == "none" else value


def _is_list(hint: Any) -> bool:
    if typing.get_origin(hint) in (Union, UnionType):
        return any(_is_list(argument) for argument in typing.get_args(hint))
    return typing.get_origin(hint) in (tuple, list)


def _config_file(parser: CommandParser, value: str) -> str:
    """A configuration file as it is, if it can be read in one way; the name of a published recipe of training as its file."""
    if Path(value).is_file():
        _refuse_repeated_keys(Path(value))
    if parser.command != "train" or Path(value).suffix or Path(value).exists():
        return value
    from rnndyn_fast.train.recipes import recipe

    return str(recipe(value))


def _refuse_repeated_keys(path: Path) -> None:
    require("yaml")
    import yaml

    from rnndyn_fast.plain_values import RepeatedKeyError, plain_values

    try:
        plain_values(path.read_text(encoding="utf-8"))
    except RepeatedKeyError as error:
        raise argparse.ArgumentError(None, f"--config: {path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        pass  # (which the parser tells)


def _bracketed(value: str) -> str:
    return f"[{value}]" if re.fullmatch(r"[\w.+-]+(,[\w.+-]+)*", value) else value


def add(parser: CommandParser, name: str, hint: Any, text: str, *default: Any) -> None:
    """An option --name of the type `hint`, required unless a default is given."""
    parser.hints[name] = hint
    options: dict[str, Any] = {"type": hint, "help": text}
    if default:
        options["default"] = default[0]
    else:
        options["required"] = True
    if hint is bool:
        options |= {"nargs": "?", "const": True}  # --overwrite and --overwrite true are the same
    choices = _literals(hint)
    if choices:
        # As a plain string here; the function that takes it says what it expected.
        options["type"] = str | None if _may_be_none(hint) else str
        options["metavar"] = "{" + ",".join(choices) + "}"
    elif hint is not bool:
        options["metavar"] = _metavar(name, hint)
    parser.parser.add_argument(flag(name), dest=name, **options)


def positional(parser: CommandParser, name: str, text: str) -> None:
    """An argument without a name before it."""
    parser.positionals.append(name)
    parser.parser.add_argument(name, metavar=name.upper(), help=text)


def _metavar(name: str, hint: Any) -> str:
    """What stands for a value in the help."""
    if name in ("out", "data", "human", "compare", "sweep", "published"):
        return {"out": "PATH", "data": "PATH"}.get(name, "FILE")
    kinds = [hint, *typing.get_args(hint)]
    if _is_list(hint):
        return "A,B,..."
    return "N" if int in kinds else "X" if float in kinds else "YAML" if any(typing.get_origin(k) is dict for k in kinds) else "TEXT"


def _literals(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    if typing.get_origin(hint) in (Union, UnionType):
        return [choice for argument in typing.get_args(hint) for choice in _literals(argument)]
    return []


def add_config(parser: CommandParser, kind: type, file: str = "YAML file of these options") -> None:
    """An option for each field of a dataclass, and --config."""
    import dataclasses

    require("jsonargparse")
    from jsonargparse import ActionConfigFile

    parser.parser.add_argument("--config", action=ActionConfigFile, help=f"{file}; --print-config prints one")
    for item in dataclasses.fields(kind):
        add_field(parser, kind, item.name)


def add_field(parser: CommandParser, kind: type, name: str) -> None:
    """An option for a field of a dataclass whose metadata holds its help."""
    import dataclasses

    item = {field.name: field for field in dataclasses.fields(kind)}[name]
    default: tuple[Any, ...] = () if item.default is dataclasses.MISSING else (item.default,)
    if item.default_factory is not dataclasses.MISSING:
        default = (item.default_factory(),)
    add(parser, name, typing.get_type_hints(kind)[name], item.metadata["help"], *default)
