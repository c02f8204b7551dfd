"""Errors of the library in the words of the command line: options as they are typed, no names and types of Python."""

from __future__ import annotations

import re
from collections.abc import Collection

from rnndyn_fast.suggestions import flag

TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping (YAML)",
    "tuple": "numbers",
}
_NOT_FINITE = {"nan", "inf", "-inf", "+inf", "infinity", "-infinity", "+infinity"}
# Arguments of functions that are no options: what they name is said by the rest of the sentence.
_SILENT = ("path", "name", "names", "values", "file", "model")
_LIST = re.compile(r"""(?<![\w'"])[\[(]((?:'[^']*'|"[^"]*"|None|[\d.]+)(?:, (?:'[^']*'|"[^"]*"|None|[\d.]+))*),?[\])](?![\w'"])""")


def for_people(message: str, options: Collection[str] = (), positionals: Collection[str] = ()) -> str:
    """A message in one line, in the dialect of the command line.

    Args:
        message: of an error of the library, which names arguments of functions.
        options: names of the command's options in Python.
        positionals: names of its other arguments.

    >>> for_people("batch_size: expected at least 1, got 0", ["batch_size"])
    '--batch-size: expected at least 1, got 0'
    """
    text = _of_the_parser(" ".join(message.split()))
    required = re.match(r"the following arguments are required: (.*)", text)
    if required:
        return f"missing: {', '.join(flag(name) if name in options else name for name in required[1].split(', '))}"
    text = re.sub(r"\b(?:(\w+)=True \()(--[\w-]+)\)", r"\2", text)
    names = sorted(options, key=len, reverse=True)
    if names:
        either = "|".join(map(re.escape, names))
        head = re.match(rf"((?:{either})(?:, (?:{either}))*)(?=: |\[)", text)
        if head:
            text = ", ".join(flag(name) for name in head[1].split(", ")) + text[head.end() :]
        text = re.sub(rf"(?<![\w'\"/.-])({either})=\"?([\w.-]+)\"?", lambda m: f"{flag(m[1])} {m[2]}", text)
        text = re.sub(rf"(?<=[:;(] )({either})(?= was )", lambda m: flag(m[1]), text)
        long = "|".join(re.escape(name) for name in names if "_" in name)
        if long:
            text = re.sub(rf"(?<![\w'\"/.<-])({long})(?![\w'\"/.=-])", lambda m: flag(m[1]), text)
    silent = [name for name in _SILENT if name not in (*options, *positionals)]
    text = re.sub(rf"^(?:{'|'.join(silent)}): ", "", text)
    text = re.sub(r" \((?:str|int|float|bool|list|dict|tuple|NoneType)\)$", "", text)
    text = re.sub(r"\bexpected (?:an? )?(int|float|bool|str|dict)\b(?! or)", lambda m: f"expected {TYPES[m[1]]}", text)
    text = _LIST.sub(lambda m: ", ".join(part.strip("'\"") for part in m[1].split(", ") if part != "None"), text)
    return re.sub(r"\b(got|was|is) (None|True|False)\b", lambda m: f"{m[1]} {'nothing' if m[2] == 'None' else m[2].lower()}", text)


def _of_the_parser(text: str) -> str:
    """What the parser of arguments says, as the library would say it."""
    text = re.sub(r"(?:Expected an? )?<class '(\w+)'>", r"expected \1", text)
    # An argument that may be left out: the parser tells of every type it tried.
    text = re.sub(
        r"Does not validate against any .* - expected (\w+).* - expected NoneType .* Given value: (.*)", r"expected \1. Got value: \2", text
    )
    text = re.sub(r'^Parser key "([^"]+)": ?', r"\1: ", text)
    text = text.replace("expected tuple", "expected numbers with commas between them, as 8,16,32,48,64")
    text = re.sub(r"\. Got value: ?", ", got ", text)
    text = re.sub(r", got $", ", got nothing", text)
    found = re.search(r"expected float, got (\S+)$", text)
    if found and found[1].lower().strip("'") in _NOT_FINITE:
        text = text.replace("expected float", "expected a finite number")
    return text
