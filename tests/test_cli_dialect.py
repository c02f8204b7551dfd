"""One dialect: options in kebab-case in help and errors, no names of Python in errors; help at once."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

from rnndyn_fast.cli import main
from rnndyn_fast.cli.arguments import command_parser
from rnndyn_fast.cli.messages import for_people
from rnndyn_fast.cli.parser import normalise
from rnndyn_fast.cli.table import COMMANDS, FILES, place
from rnndyn_fast.models import blt_net_64, blt_net_128
from rnndyn_fast.suggestions import flag
from rnndyn_fast.torch_internals import constant_when_compiled
from rnndyn_fast.train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
UNDERSCORED = re.compile(r"(?<![\w-])--\w*_\w*")


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("words", [["--help"], [], ["--version"], ["data", "--help"], ["trian"]])
def test_overview_imports_neither_torch_nor_the_parser(words: list[str]) -> None:
    code = (
        "import sys; from rnndyn_fast.cli import main; code = main(sys.argv[1:]); "
        "heavy = [m for m in ('torch', 'numpy', 'jsonargparse', 'h5py', 'yaml') if m in sys.modules]; print(code, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == f"{2 if words == ['trian'] else 0} []", done


def test_importing_the_package_loads_no_compiler() -> None:
    """torch._dynamo takes longer to import than torch; what torch itself does not load, the networks do not need."""
    code = (
        "import sys; import rnndyn_fast; assert 'torch' not in sys.modules; import torch; before = set(sys.modules)\n"
        "rnndyn_fast.accelerate, rnndyn_fast.rollout, rnndyn_fast.models.blt_net_64\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} & {'sympy', 'scipy', 'h5py', 'yaml', 'matplotlib'}))\n"
        "print([m for m in ('torch._dynamo', 'torch._inductor') if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["[]", "[]"], done


def test_names_of_the_package_are_there_without_their_modules() -> None:
    code = (
        "import rnndyn_fast\nfrom rnndyn_fast import *\n"
        "assert callable(rollout) and callable(rnndyn_fast.models.blt_net_64) and 'rollout' in dir(rnndyn_fast)\n"
        "from rnndyn_fast import _core\n"
        "try:\n    rnndyn_fast.absent\nexcept AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "module 'rnndyn_fast' has no attribute 'absent'", done.stderr


def test_the_mark_for_the_compiler_is_torchs() -> None:
    def one() -> None: ...

    def two() -> None: ...

    assert vars(constant_when_compiled(one)) == vars(torch.compiler.assume_constant_result(two)) != {}


# ---------------------------------------------------------------- options


def test_options_of_all_commands_are_kebab_case(capfd: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert main([*command.split(), "--help"]) == 0
        text = capfd.readouterr().out
        assert not UNDERSCORED.search(text), (command, UNDERSCORED.findall(text))
        assert "type: " not in text, command
        assert "null" not in text, command
        parser = command_parser(command)
        for action in parser.parser._actions:
            for word in action.option_strings:
                assert re.fullmatch(r"-h|--[a-z0-9]+(-[a-z0-9]+)*\+?", word), (command, word)


def test_pages_and_sources_write_options_in_kebab_case() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "rnndyn_fast").rglob("*.py")]
    found = [f"{page.name}: {word}" for page in pages for word in UNDERSCORED.findall(page.read_text(encoding="utf-8"))]
    allowed = {"parser.py: --batch_size", "parser.py: --LT_interaction"}  # (where it is said that they parse)
    assert set(found) <= allowed


@pytest.mark.parametrize("command", list(COMMANDS))
def test_underscores_and_capitals_still_parse(command: str) -> None:
    parser = command_parser(command)
    for name in parser.hints.keys() - {"config"}:
        assert normalise([f"--{name}=1"], parser)[0].startswith(flag(name) + "=")


def test_none_is_a_number_left_out() -> None:
    parser = command_parser("phase sweep")
    for words in (["--stop-loss", "none"], ["--stop-loss=None"]):
        assert parser.parse(normalise([*words, "--out", "x"], parser))["stop_loss"] is None


def bad_values(command: str) -> list[tuple[str, str]]:
    """A value of the wrong type for every option that has one."""
    found = []
    for name, hint in command_parser(command).hints.items():
        kinds = [hint, *typing.get_args(hint)]
        if int in kinds or float in kinds or hint is bool:
            found.append((name, "many"))
        if float in kinds and typing.get_origin(hint) is not dict:
            found.append((name, "nan"))
    return found


PYTHON = re.compile(r"<class|NoneType|\bNone\b|TypeError|ValueError|\b(dict|tuple|str|int|float|bool)\b|=True|\[[^\]]*'|rnndyn_fast\.")


@pytest.mark.parametrize("command", list(COMMANDS))
def test_wrong_types_are_told_in_words(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    parser = command_parser(command)
    there = [name.lower() for name in parser.positionals]
    for name, value in bad_values(command):
        assert main([*command.split(), *there, f"{flag(name)}={value}"]) == 2
        told = capfd.readouterr().err
        assert told.startswith(f"rnndyn: error: {flag(name)}: expected "), told
        assert told.count("\n") == 1
        assert not PYTHON.search(told), told
        assert not UNDERSCORED.search(told), told
        assert ("finite" in told) == (value == "nan"), told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--data", "d", "--out", "o", "--norm-type", "BN"], "--norm-type: expected one of LN, None, got 'BN'"),
        (["train", "--data", "d", "--out", "o", "--model-options", "3"], "--model-options: expected a mapping"),
        (["train", "--data", "d", "--out", "o", "--resume", "--overwrite"], "--resume, --overwrite: expected at most one"),
        (["train", "--data", "d", "--out", "o", "--lr-patience", "1", "--lr-trend"], "--lr-patience, --lr-trend: expected at most one"),
        (["train", "--data", "d", "--out", "o", "--widths", "4,8"], "--widths: expected 5 positive numbers"),
        (["study", "--data", "d", "--lr-patience", "0"], "--lr-patience: expected at least 1, got 0"),
        (["extract", "c.pt", "d.h5", "--out", "o.h5", "--rdm-classes", "a"], "--rdm-classes: expected numbers with commas between them"),
        (["extract", "c.pt", "d.h5", "--out", "o.h5", "--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["extract", "c.pt", "d.h5", "--out", "o.h5", "--model-options", "{a: 1}"], "--model-options: expected --model too"),
        (["data", "make", "--out", "i.h5", "--num-train", "0"], "--num-train: expected at least 1, got 0"),
        (["data", "make", "--out", "o", "--source", "digits", "--num-train", "9999"], "--num-train, --num-val: digits has 1078 images"),
    ],
)
def test_errors_of_the_library_name_options_as_they_are_typed(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    told = capfd.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("out: batch_size.h5 exists; pass overwrite=True (--overwrite)", "--out: batch_size.h5 exists; pass --overwrite"),
        ("resume: other options: batch_size was 3, is 4", "--resume: other options: --batch-size was 3, is 4"),
        ("path: no such file: x.h5", "no such file: x.h5"),
        ("split: expected one of ('train', 'val'), got 'x'", "--split: expected one of train, val, got 'x'"),
        ("a (b, c) [d] stays", "a (b, c) [d] stays"),
    ],
)  # fmt: skip
def test_words(message: str, told: str) -> None:
    assert for_people(message, ["out", "batch_size", "resume", "overwrite", "split"]) == told


# ---------------------------------------------------------------- output


@pytest.mark.parametrize("command", [name for name in COMMANDS if "out" in command_parser(name).hints])
def test_out_is_a_folder_everywhere(command: str, tmp_path: Path) -> None:
    folder = tmp_path / "new.folder"
    folder.mkdir()
    for out in (str(tmp_path / "absent"), str(folder), str(tmp_path / "x") + "/"):
        placed = place(command, out)
        assert placed == (str(Path(out) / FILES[command]) if command in FILES else out)
    (tmp_path / "f.h5").write_text("x")
    for out in (str(tmp_path / "f.h5"), str(tmp_path / "r.html")):
        if command in FILES:
            assert place(command, out) == out
        else:
            with pytest.raises(ValueError, match="out: expected a folder"):
                place(command, out)


# ---------------------------------------------------------------- defaults


def test_where_defaults_of_training_and_of_the_constructor_differ_both_say_so(capfd: pytest.CaptureFixture[str]) -> None:
    own = {name: p.default for name, p in inspect.signature(blt_net_64).parameters.items()}
    config = TrainConfig(data="d", out="o")
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in config.build_options().items()}
    differ = [n for n in own if n in plain and plain[n] != (list(own[n]) if isinstance(own[n], tuple) else own[n])]
    assert differ == ["topdown_connections", "timesteps", "classifier_bias"]
    fields = {item.name: item for item in __import__("dataclasses").fields(TrainConfig)}
    assert main(["plan", "blt_net_64"]) == 0
    told = capfd.readouterr().out.splitlines()[0]
    for name in differ:
        assert "blt_net_64() in Python" in fields[name].metadata["help"]
        assert f"{name}={plain[name]}" in " ".join((inspect.getdoc(blt_net_64) or "").split())
        assert name.replace("_", " ") in told
    assert "topdown connections off (on)" in told
    assert "timesteps 10 (2)" in told
    assert main(["plan", "blt_net_64", "--topdown-connections", "true", "--timesteps", "2", "--classifier-bias", "true"]) == 0
    assert capfd.readouterr().out.startswith("blt_net_64: as blt_net_64() in Python\n")
    assert "blt_net_64" in (inspect.getdoc(blt_net_128) or "")
