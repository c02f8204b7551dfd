"""The arguments of every command. What a command needs is imported when that command is asked for."""

from __future__ import annotations

import argparse
import itertools
import re
import typing
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union

from rnndyn_fast.cli import commands
from rnndyn_fast.optional import require

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Command = Callable[..., None]
COMMANDS: dict[str, tuple[str, Command]] = {
    "data make": ("Write an HDF5 image file from real images.", commands.data_make),
    "plan": ("Print what a network computes: once, per component, per time step.", commands.plan),
    "train": ("Train a network.", commands.train),
    "extract": ("Stream images through a trained network into the analyses.", commands.extract),
    "analyse": ("Write report, tables and figures of an extraction, or of trajectories from other software.", commands.analyse),
    "phase train": ("Train a continuous-time RNN on modulo arithmetic.", commands.phase_train),
    "phase sweep": ("Train a grid of continuous-time RNNs on modulo arithmetic together.", commands.phase_sweep),
    "phase analyse": ("Analyse networks of phase train or sweep: oscillation, automaton, kind of solution.", commands.phase_analyse),
    "phase report": ("Write a page with figures of analysed networks.", commands.phase_report),
    "react": ("Reaction times by an entropy threshold: speed against accuracy, comparison with people.", commands.react),
    "predict": ("Fit recorded responses of neurons from the activations of model areas.", commands.predict),
    "search": ("Search architectures: trials in a study that can be stopped and resumed.", commands.search),
    "compare": ("Train cells at equal numbers of parameters, and say which is best.", commands.compare),
    "doctor": ("Report what runs on this machine, and the reason for what does not.", commands.doctor),
    "study": ("Train or take four kinds of networks, compare their dynamics, and write a report.", commands.study),
    "demo": ("A small study on real images, in minutes.", commands.demo),
}

DESCRIPTION = "Fast convolutional recurrent networks: train them, run images through them, and analyse their representation dynamics."
EPILOG = "rnndyn COMMAND --help lists the options of a command. RNNDYN_DEBUG=1 shows tracebacks."

# Commands of two words, by the first.
GROUPS = {"data": "Image files.", "phase": "Phase codes in continuous-time RNNs on modulo arithmetic."}
# Commands without options, which run without optional packages.
WITHOUT_OPTIONS = ("doctor",)
SWITCHES = ("--overwrite", "--resume", "--untrained", "--keep_samples", "--resize", "--quick", "--correct_fit", "--strict", "--cumulative",
            "--lr_trend", "--bypass", "--challenging")  # fmt: skip
LISTS = ("--widths", "--keep", "--lr_steps", "--alphas", "--noise_stds", "--activations", "--jobs", "--featured")


def normalise(argv: list[str]) -> list[str]:
    """Options may be written with dashes (--batch-size), lists without brackets (--widths 4,6,8,10,12), and
    switches without a value, whatever follows them (--overwrite)."""
    out: list[str] = []
    lists = (*LISTS, "--networks") if argv[:1] == ["compare"] else LISTS  # (study's are one word)
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = "--" + name[2:].replace("-", "_")
            if name in SWITCHES and not equals and after.lower() not in ("true", "false", "yes", "no"):
                equals, value = "=", "true"
            if name == "--config" and equals:
                value = _config_file(argv, value)
            word = name + equals + (_bracketed(value) if name in lists else value)
        elif out and out[-1] in lists:
            word = _bracketed(word)
        elif out and out[-1] == "--config":
            word = _config_file(argv, word)
        out.append(word)
    return out


def _config_file(argv: list[str], value: str) -> str:
    """A configuration file as it is; the name of a published recipe of training as its file."""
    if argv[0] != "train" or Path(value).suffix or Path(value).exists():
        return value
    from rnndyn_fast.train.recipes import recipe

    return str(recipe(value))


def _bracketed(value: str) -> str:
    return f"[{value}]" if re.fullmatch(r"[\w.+-]+(,[\w.+-]+)*", value) else value


def tidy(message: str) -> str:
    """A message of the argument parser in one line, without Python's names for types."""
    message = re.sub(r"(?:Expected a )?<class '(\w+)'>", r"expected \1", " ".join(message.split()))
    # A number that may be left out: the parser tells of every type it tried.
    message = re.sub(
        r"Does not validate against any .* - expected (\w+) - expected NoneType .* Given value: (.*)",
        r"expected \1. Got value: \2",
        message,
    )
    message = message.replace("expected tuple", "expected numbers with commas between them, as 8,16,32,48,64")
    message = re.sub(r'^Parser key "([^"]+)": ?', r"\1: ", message)
    names = "|".join(re.escape(name.replace(" ", ".")) for name in COMMANDS)
    return re.sub(rf"(?<![\w/.-])(?:{names})\.(\w+)", r"\1", message)  # (keys of options, not parts of paths)


def build_overview() -> argparse.ArgumentParser:
    """The parser of what needs no optional package: the list of commands, --version, and commands without options."""
    from rnndyn_fast import __version__

    parser = argparse.ArgumentParser(prog="rnndyn", description=DESCRIPTION, epilog=EPILOG, exit_on_error=False)
    parser.add_argument("--version", action="version", version=f"rnndyn {__version__}")
    subcommands = parser.add_subparsers(dest="subcommand", title="commands", metavar="COMMAND")
    for name, (text, _) in COMMANDS.items():
        # Commands of two words are listed as such: this parser never reads them.
        subcommands.add_parser(name, description=text, help=text, exit_on_error=False)
    return parser


def build_parser(argv: list[str]) -> tuple[ArgumentParser, dict[str, Command]]:
    """The parser, and the function of every command. Only the command that `argv` begins with gets its arguments."""
    require("jsonargparse")
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="rnndyn", description=DESCRIPTION, epilog=EPILOG, exit_on_error=False)
    subcommands = parser.add_subcommands(required=True)
    groups: dict[str, Any] = {}
    for name, (text, _) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        one = ArgumentParser(description=text, exit_on_error=False)
        if argv[: len(name.split())] == name.split():
            _ARGUMENTS[name](one)
        if group:
            if group not in groups:
                own = ArgumentParser(description=GROUPS[group], exit_on_error=False)
                known = ", ".join(command for command in COMMANDS if command.startswith(group + " "))
                subcommands.add_subcommand(group, own, help=f"{GROUPS[group].rstrip('.')}: {known}.")
                groups[group] = own.add_subcommands(required=True)
            groups[group].add_subcommand(last, one, help=text)
        else:
            subcommands.add_subcommand(name, one, help=text)
    return parser, {name: command for name, (_, command) in COMMANDS.items()}


def _add(parser: ArgumentParser, name: str, hint: Any, text: str, *default: Any) -> None:
    """An option --name of the type `hint`, required unless a default is given."""
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
        options["type"] = str | None if type(None) in typing.get_args(hint) else str
        options["metavar"] = "{" + ",".join(choices) + "}"
    parser.add_argument(f"--{name}", **options)


def _literals(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    if typing.get_origin(hint) in (Union, UnionType):
        return [choice for argument in typing.get_args(hint) for choice in _literals(argument)]
    return []


def _data_make(parser: ArgumentParser) -> None:
    _add(parser, "out", str, "file to write")
    _add(parser, "source", Literal["auto", "fashion-mnist", "digits"], "where the images come from", "auto")
    _add(parser, "size", int, "height and width in pixels", 64)
    _add(parser, "seed", int, "of the splits and the conditions of testplus", 0)
    for split in ("train", "val", "test", "testplus"):
        _add(parser, f"num_{split}", int | None, f"images in {split}; default: all that is left", None)
    _add(parser, "challenging", bool, "put train and val under the conditions of testplus too", False)
    _add(parser, "overwrite", bool, "replace the file if it exists", False)


def _plan(parser: ArgumentParser) -> None:
    from rnndyn_fast.train.config import NETWORK_OPTIONS, TrainConfig

    parser.add_argument("model", help="a network by the names of rnndyn train --model, a file (YAML) with a spec, or a checkpoint (.pt)")
    for name in ("model_options", *NETWORK_OPTIONS):
        if name != "backend":
            _add_field(parser, TrainConfig, name)
    _add(parser, "num_classes", int | None, "classes of the readout; default: the model's", None)
    _add(parser, "image_size", int | None, "height and width in pixels; default: the model's", None)
    _add(
        parser, "device", str, "engines of convolutions are chosen for it: cpu, cuda, cuda:1, ...; without a GPU: what it depends on", "cpu"
    )
    _add(parser, "dtype", Literal["float32", "float64", "float16", "bfloat16"], "of the maps", "float32")
    _add(parser, "batch", int, "images in a batch", 16)
    _add(parser, "instructions", Literal["inference", "training"] | None, "print every instruction of that program too", None)


def _train(parser: ArgumentParser) -> None:
    from rnndyn_fast.train.config import TrainConfig
    from rnndyn_fast.train.recipes import RECIPES

    _add_config(parser, TrainConfig, f"YAML file of these options, or a published recipe ({', '.join(RECIPES)})")


def _add_config(parser: ArgumentParser, kind: type, file: str = "YAML file of these options") -> None:
    """An option for each field of a dataclass, and --config."""
    import dataclasses

    require("jsonargparse")
    from jsonargparse import ActionConfigFile

    parser.add_argument("--config", action=ActionConfigFile, help=f"{file}; --print_config prints one")
    for item in dataclasses.fields(kind):
        _add_field(parser, kind, item.name)


def _add_field(parser: ArgumentParser, kind: type, name: str) -> None:
    """An option for a field of a dataclass whose metadata holds its help."""
    import dataclasses

    item = {field.name: field for field in dataclasses.fields(kind)}[name]
    default: tuple[Any, ...] = () if item.default is dataclasses.MISSING else (item.default,)
    if item.default_factory is not dataclasses.MISSING:
        default = (item.default_factory(),)
    _add(parser, name, typing.get_type_hints(kind)[name], item.metadata["help"], *default)


def _extract(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint of rnndyn train: last.pt, best.pt")
    parser.add_argument("data", help="HDF5 image file, or a folder of image files with a subfolder per class")
    _add(parser, "out", str, "result file to write; an interrupted extraction continues when the same command is run again")
    _add(parser, "split", Literal["train", "val", "test", "testplus"], "images of an HDF5 file to run", "testplus")
    _add(parser, "reducers", str, "all, or some of readout_zones,norms,change,moments,rdm,decodability", "all")
    _add(parser, "areas", str, "areas for norms, change and moments, as v4,it,gap; default: the pooled representations", "")
    _add(parser, "pooled", str, "areas for rdm and decodability, averaged over their maps; default: the pooled representations", "")
    _add(parser, "rdm_classes", str | None, "conditions of the RDMs, as 0,3,7; default: the first 100 classes", None)
    _add(parser, "rdm_images", str | None, "single images as conditions in place of classes, by number", None)
    _add(parser, "rdm_distance", Literal["correlation", "euclidean"], "between conditions", "correlation")
    _add(parser, "save", str, "areas whose trajectories are kept, as gap,it; gap is the pooled representations", "")
    _add(parser, "dtype", Literal["float32", "float16"], "of the kept trajectories", "float32")
    _add(parser, "compression", int, "of the kept trajectories, gzip 0 to 9", 1)
    _add(parser, "batch_size", int, "images at a time", 250)
    _add(parser, "timesteps", int | None, "time steps; default: as in training", None)
    _add(parser, "limit", int | None, "that many images, evenly spaced over the data", None)
    _add(parser, "shards", int, "runs of images that sums are taken of; at least the number of processes of torchrun", 8)
    _add(parser, "keep_samples", bool, "keep every sample's group and scalars in the result", False)
    _add(parser, "resize", bool, "scale and crop image files of other sizes", False)
    _add(parser, "device", str | None, "cpu, cuda, cuda:1, ...; default: a GPU where there is one", None)
    _add(parser, "precision", Literal["float32", "float16", "bfloat16"], "of maps, by autocast; float16 on a GPU", "float32")
    _add(parser, "untrained", bool, "the network as it was before training", False)
    _add_engine(parser)
    _add(parser, "overwrite", bool, "replace files that exist", False)


def _add_engine(parser: ArgumentParser) -> None:
    _add(parser, "backend", Literal["native", "reference"] | None, "default: whichever can run", None)
    _add(
        parser,
        "engine",
        Literal["auto", "direct", "winograd", "amx", "fused"],
        "convolutions: ours where they are faster, PyTorch's, or one of ours wherever it can run",
        "auto",
    )


def _analyse(parser: ArgumentParser) -> None:
    from rnndyn_fast.analysis.trajectory_files import NAMES

    parser.add_argument("result", help="file of rnndyn extract, or an NPZ or HDF5 file with trajectories [T, N, D] and their readout")
    _add(parser, "out", str, "folder for report, tables and figures; files of the same names are replaced")
    _add(parser, "compare", str | None, "a second file: that of the untrained network", None)
    for name, known in NAMES.items():
        _add(parser, name, str | None, f"name of this array in a file of trajectories; default: {' or '.join(known)}", None)


def _phase_train(parser: ArgumentParser) -> None:
    from rnndyn_fast.train.phase_config import PhaseTrainConfig

    _add_config(parser, PhaseTrainConfig)


def _phase_sweep(parser: ArgumentParser) -> None:
    from rnndyn_fast.train.phase_config import PhaseSweepConfig

    _add_config(parser, PhaseSweepConfig)


def _phase_analyse(parser: ArgumentParser) -> None:
    parser.add_argument("networks", help="folder of phase train or sweep, its networks.npz, or an .npz file with the published names")
    _add(parser, "out", str, "folder for the results; what is there is not analysed again")
    _add(parser, "prefix", str, "of the names in a published file", "")
    _add(parser, "jobs", list[int] | None, "job ids to analyse, as 0,5,7; default: all", None)
    _add(parser, "handcrafted", bool, "analyse a handcrafted oscillator matched to them too", True)
    _add(parser, "seed", int, "of the trials", 42)
    _add(parser, "overwrite", bool, "analyse again what is there", False)


def _phase_report(parser: ArgumentParser) -> None:
    parser.add_argument("analyses", help="folder of phase analyse")
    _add(parser, "out", str, "HTML file to write")
    _add(parser, "sweep", str | None, "folder of the sweep that was analysed, for the table of training", None)
    _add(parser, "published", str | None, "published table of results (CSV), to be set beside the sweep", None)
    _add(parser, "featured", list[str] | None, "systems shown in full; default: the first of every kind", None)


def _react(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint of rnndyn train: last.pt, best.pt")
    parser.add_argument("data", help="HDF5 image file")
    _add(parser, "out", str, "folder for result, tables, figures and report; files of the same names are replaced")
    _add(parser, "split", Literal["train", "val", "test", "testplus"], "images to run", "test")
    _add(parser, "human", str | None, "reaction times of people: CSV (subject, image, reaction_time) or NPZ [subjects, images]", None)
    _add(parser, "strict", bool, "stop where the entropy is below the threshold, not at most equal to it", False)
    _add(parser, "cumulative", bool, "decide by the softmax of the logits summed over time", False)
    _add(parser, "unreached", Literal["last", "exclude"], "images that never reach a threshold: last step, or left out", "last")
    _add(parser, "batch_size", int, "images at a time", 250)
    _add(parser, "timesteps", int | None, "time steps; default: as in training", None)
    _add(parser, "limit", int | None, "that many images, evenly spaced over the split", None)
    _add_engine(parser)


def _predict(parser: ArgumentParser) -> None:
    parser.add_argument("features", help="trajectories of rnndyn extract --save, or NPZ: an array [time, stimuli, ...] per area")
    parser.add_argument("recordings", help="NPZ (responses, bin_edges_ms, rows, neurons) or NWB")
    _add(parser, "out", str, "folder for results, tables, figure and report; files of the same names are replaced")
    _add(parser, "areas", str, "areas to compare, as v4,it; default: all in the file", "")
    _add(parser, "method", Literal["ridge", "pls"], "regression", "ridge")
    _add(parser, "mapping", Literal["per_bin", "fixed"], "a map for every time bin, or one for all", "per_bin")
    _add(parser, "step_ms", float | None, "duration of a model step; default: time bin b is step b", None)
    _add(parser, "latency_ms", float, "time after onset at which step 0 begins", 0.0)
    _add(parser, "num_folds", int, "folds of stimuli", 5)
    _add(parser, "num_splits", int, "random halvings of the repeats", 100)
    _add(parser, "min_reliability", float, "neurons below it in a time bin do not count there", 0.1)
    _add(parser, "correct_fit", bool, "correct also for what the recording's noise costs the fit", False)
    _add(parser, "max_dimensions", int | None, "principal components that larger features are reduced to", 1000)
    _add(parser, "num_components", int, "of PLS", 25)
    _add(parser, "seed", int, "of folds and halvings", 0)
    _add(parser, "table", str, "NWB: table of presentations", "trials")
    _add(parser, "stimulus_column", str, "NWB: its column that tells stimuli apart", "stimulus_id")
    _add(parser, "start_ms", float, "NWB: start of the first time bin, relative to a presentation", 0.0)
    _add(parser, "stop_ms", float, "NWB: end of the last", 260.0)
    _add(parser, "bin_ms", float, "NWB: width of a time bin", 10.0)


def _search(parser: ArgumentParser) -> None:
    from rnndyn_fast.search.config import SearchConfig

    _add_config(parser, SearchConfig)


def _compare(parser: ArgumentParser) -> None:
    from rnndyn_fast.search.compare import CompareConfig

    _add_config(parser, CompareConfig)


def _doctor(parser: ArgumentParser) -> None:
    """No options."""


def _study(parser: ArgumentParser) -> None:
    _add_study_options(parser, {})


def _demo(parser: ArgumentParser) -> None:
    from rnndyn_fast.study.config import DEMO

    _add_study_options(parser, DEMO)


def _add_study_options(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    import dataclasses

    from rnndyn_fast.study import StudyConfig

    hints = typing.get_type_hints(StudyConfig)
    for item in dataclasses.fields(StudyConfig):
        hint, default = hints[item.name], defaults.get(item.name, item.default)
        if item.name in ("networks", "checkpoints"):  # names with commas between them
            hint, default = str, ",".join(default)
        _add(parser, item.name, hint, item.metadata["help"], default)


_ARGUMENTS: dict[str, Callable[[ArgumentParser], None]] = {
    "data make": _data_make,
    "plan": _plan,
    "train": _train,
    "extract": _extract,
    "analyse": _analyse,
    "phase train": _phase_train,
    "phase sweep": _phase_sweep,
    "phase analyse": _phase_analyse,
    "phase report": _phase_report,
    "react": _react,
    "predict": _predict,
    "search": _search,
    "compare": _compare,
    "doctor": _doctor,
    "study": _study,
    "demo": _demo,
}
