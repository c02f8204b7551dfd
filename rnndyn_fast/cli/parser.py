"""The arguments of a command. What it needs is imported when it is asked for."""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union

from jsonargparse import ActionConfigFile, ArgumentParser

from rnndyn_fast.cli.table import COMMANDS
from rnndyn_fast.names import flag

_YES_NO = ("true", "false", "yes", "no")


class CommandParser(ArgumentParser):
    """The parser of one command; `hints`: types of its options, and `positionals` its other arguments, by their names in Python."""

    def __init__(self, command: str) -> None:
        super().__init__(
            prog=f"rnndyn {command}", description=COMMANDS[command], exit_on_error=False, allow_abbrev=False, print_config="--print-%s"
        )
        self.hints: dict[str, Any] = {"config": str}
        self.positionals: list[str] = []
        _ARGUMENTS[command](self)


def normalise(argv: list[str], parser: CommandParser) -> list[str]:
    """The words of a command as its parser takes them.

    Options may be written with underscores and in any case (--batch_size, --LT_interaction), lists without brackets (--widths 4,6,8), and
    switches without a value, whatever follows them (--overwrite).
    """
    lists = [flag(name) for name, hint in parser.hints.items() if _is_list(hint)]
    switches = [flag(name) for name, hint in parser.hints.items() if hint is bool]
    out: list[str] = []
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.lower().replace("_", "-")
            if name in switches and not equals and after.lower() not in _YES_NO:
                equals, value = "=", "true"
            if name == "--config" and equals:
                value = _config_file(parser, value)
            word = name + equals + (_bracketed(value) if name in lists else value)
        elif out and out[-1] in lists:
            word = _bracketed(word)
        elif out and out[-1] == "--config":
            word = _config_file(parser, word)
        out.append(word)
    return out


def _is_list(hint: Any) -> bool:
    if typing.get_origin(hint) in (Union, UnionType):
        return any(_is_list(argument) for argument in typing.get_args(hint))
    return typing.get_origin(hint) in (tuple, list)


def _config_file(parser: CommandParser, value: str) -> str:
    """A configuration file as it is; the name of a published recipe of training as its file."""
    if parser.prog != "rnndyn train" or Path(value).suffix or Path(value).exists():
        return value
    from rnndyn_fast.train.recipes import recipe

    return str(recipe(value))


def _bracketed(value: str) -> str:
    return f"[{value}]" if re.fullmatch(r"[\w.+-]+(,[\w.+-]+)*", value) else value


def _add(parser: CommandParser, name: str, hint: Any, text: str, *default: Any) -> None:
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
        options["type"] = str | None if type(None) in typing.get_args(hint) else str
        options["metavar"] = "{" + ",".join(choices) + "}"
    elif hint is not bool:
        options["metavar"] = _metavar(name, hint)
    parser.add_argument(flag(name), dest=name, **options)


def _positional(parser: CommandParser, name: str, text: str) -> None:
    parser.positionals.append(name)
    parser.add_argument(name, metavar=name.upper(), help=text)


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


def _data_make(parser: CommandParser) -> None:
    _add(parser, "out", str, "file to write (HDF5), or a folder for images.h5")
    _add(
        parser,
        "source",
        str,
        "fashion-mnist, digits, or auto (the first that is installed); or images of your own: a folder with a subfolder per class (perhaps "
        "within train, val, test), or a CSV with the columns path, label and perhaps split",
        "auto",
    )
    _add(parser, "size", int, "height and width in pixels", 64)
    _add(parser, "fit", Literal["crop", "pad", "stretch"], "of your own images: crop the longer side, pad the shorter, or neither", "crop")
    _add(
        parser,
        "background",
        Literal["white", "grey", "black"],
        "of your own images: under transparent pixels, beside padded ones",
        "white",
    )
    _add(parser, "seed", int, "of the splits and the conditions of testplus", 0)
    for split in ("train", "val", "test", "testplus"):
        _add(parser, f"num_{split}", int | None, f"images in {split}; default: all that is left", None)
    _add(parser, "challenging", bool, "put train and val under the conditions of testplus too", False)
    _add(parser, "overwrite", bool, "replace the file if it exists", False)


def _plan(parser: CommandParser) -> None:
    from rnndyn_fast.train.config import NETWORK_OPTIONS, TrainConfig

    _positional(parser, "model", "a network by the names of rnndyn train --model, a file (YAML) with a spec, or a checkpoint (.pt)")
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


def _train(parser: CommandParser) -> None:
    from rnndyn_fast.train.config import TrainConfig
    from rnndyn_fast.train.recipes import RECIPES

    _add_config(parser, TrainConfig, f"YAML file of these options, or a published recipe ({', '.join(RECIPES)})")


def _add_config(parser: CommandParser, kind: type, file: str = "YAML file of these options") -> None:
    """An option for each field of a dataclass, and --config."""
    import dataclasses

    parser.add_argument("--config", action=ActionConfigFile, help=f"{file}; --print-config prints one")
    for item in dataclasses.fields(kind):
        _add_field(parser, kind, item.name)


def _add_field(parser: CommandParser, kind: type, name: str) -> None:
    """An option for a field of a dataclass whose metadata holds its help."""
    import dataclasses

    item = {field.name: field for field in dataclasses.fields(kind)}[name]
    default: tuple[Any, ...] = () if item.default is dataclasses.MISSING else (item.default,)
    if item.default_factory is not dataclasses.MISSING:
        default = (item.default_factory(),)
    _add(parser, name, typing.get_type_hints(kind)[name], item.metadata["help"], *default)


def _extract(parser: CommandParser) -> None:
    _positional(parser, "checkpoint", "checkpoint of rnndyn train (last.pt, best.pt), or with --model weights from elsewhere")
    _positional(parser, "data", "HDF5 image file, or a folder of image files with a subfolder per class")
    _add(
        parser,
        "out",
        str,
        "file to write (HDF5), or a folder for extraction.h5; an interrupted extraction goes on when the same command is given again",
    )
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
    _add_files(parser)
    _add_foreign(parser)
    _add(parser, "device", str | None, "cpu, cuda, cuda:1, ...; default: a GPU where there is one", None)
    _add(parser, "precision", Literal["float32", "float16", "bfloat16"], "of maps, by autocast; float16 on a GPU", "float32")
    _add(parser, "untrained", bool, "the network as it was before training", False)
    _add_engine(parser)
    _add(parser, "overwrite", bool, "replace files that exist", False)


def _import(parser: CommandParser) -> None:
    _positional(parser, "weights", "file of torch.save with a state_dict: bare, or as DataParallel, torch.compile or Lightning save it")
    _add(parser, "out", str, "file to write (.pt), or a folder for imported.pt")
    _add(parser, "model", str, "the network that they are of, by the names of rnndyn train --model, or a file (YAML) with a spec")
    _add(parser, "data", str, "HDF5 image file or folder of image files with the categories (and, for an HDF5 file, mean and deviation)")
    _add_of_model(parser)
    _add(parser, "overwrite", bool, "replace the file if it exists", False)


def _add_extraction(parser: CommandParser) -> None:
    _add(parser, "data", str | None, "where a checkpoint is given: HDF5 image file, or folder of image files, to run through it", None)
    _add(parser, "split", Literal["train", "val", "test", "testplus"], "images of an HDF5 file to run", "testplus")
    _add_foreign(parser)


def _add_foreign(parser: CommandParser) -> None:
    _add(parser, "model", str | None, "the network, where the checkpoint holds weights from elsewhere (see rnndyn import --help)", None)
    _add_of_model(parser)


def _add_of_model(parser: CommandParser) -> None:
    _add(
        parser,
        "model_options",
        dict[str, Any] | None,
        "of --model, as YAML: '{lt-interaction: multiplicative, timesteps: 8}'; what shapes of weights tell may be left out",
        None,
    )
    _add(
        parser,
        "normalise",
        Literal["data", "signed", "imagenet"] | None,
        "input of --model: by the HDF5 file's mean and deviation, to -1..1, or by those of ImageNet; default: as published",
        None,
    )


def _add_files(parser: CommandParser) -> None:
    _add(parser, "resize", bool, "scale and crop image files of other sizes", False)
    _add(parser, "background", Literal["white", "grey", "black"], "of transparent pixels in image files", "white")


def _add_engine(parser: CommandParser) -> None:
    _add(parser, "backend", Literal["native", "scheduled", "reference"] | None, "default: whichever can run", None)
    _add(
        parser,
        "engine",
        Literal["auto", "direct", "winograd", "amx", "fused"],
        "convolutions: ours where they are faster, PyTorch's, or one of ours wherever it can run",
        "auto",
    )


def _analyse(parser: CommandParser) -> None:
    from rnndyn_fast.analysis.trajectory_files import NAMES

    _positional(
        parser,
        "result",
        "file of rnndyn extract; NPZ or HDF5 file of trajectories [T, N, D] and their readout; or with --data a checkpoint",
    )
    _add(parser, "out", str, "folder for report, tables and figures; files of the same names are replaced")
    _add(parser, "compare", str | None, "a second file: that of the untrained network", None)
    for name, known in NAMES.items():
        _add(parser, name, str | None, f"name of this array in a file of trajectories; default: {' or '.join(known)}", None)
    _add_extraction(parser)


def _phase_train(parser: CommandParser) -> None:
    from rnndyn_fast.train.phase_config import PhaseTrainConfig

    _add_config(parser, PhaseTrainConfig)


def _phase_sweep(parser: CommandParser) -> None:
    from rnndyn_fast.train.phase_config import PhaseSweepConfig

    _add_config(parser, PhaseSweepConfig)


def _phase_analyse(parser: CommandParser) -> None:
    _positional(parser, "networks", "folder of phase train or sweep, its networks.npz, or an .npz file with the published names")
    _add(parser, "out", str, "folder for the results; what is there is not analysed again")
    _add(parser, "prefix", str, "of the names in a published file", "")
    _add(parser, "jobs", list[int] | None, "job ids to analyse, as 0,5,7; default: all", None)
    _add(parser, "handcrafted", bool, "analyse a handcrafted oscillator matched to them too", True)
    _add(parser, "seed", int, "of the trials", 42)
    _add(parser, "overwrite", bool, "analyse again what is there", False)


def _phase_report(parser: CommandParser) -> None:
    _positional(parser, "analyses", "folder of phase analyse")
    _add(parser, "out", str, "file to write (HTML), or a folder for report.html")
    _add(parser, "sweep", str | None, "folder of the sweep that was analysed, for the table of training", None)
    _add(parser, "published", str | None, "published table of results (CSV), to be set beside the sweep", None)
    _add(parser, "featured", list[str] | None, "systems shown in full; default: the first of every kind", None)


def _react(parser: CommandParser) -> None:
    _positional(parser, "checkpoint", "checkpoint of rnndyn train (last.pt, best.pt), or with --model weights from elsewhere")
    _positional(parser, "data", "HDF5 image file, or a folder of image files with a subfolder per class")
    _add(parser, "out", str, "folder for result, tables, figures and report; files of the same names are replaced")
    _add(parser, "split", Literal["train", "val", "test", "testplus"], "images to run", "test")
    _add(parser, "human", str | None, "reaction times of people: CSV (subject, image, reaction_time) or NPZ [subjects, images]", None)
    _add(parser, "strict", bool, "stop where the entropy is below the threshold, not at most equal to it", False)
    _add(parser, "cumulative", bool, "decide by the softmax of the logits summed over time", False)
    _add(parser, "unreached", Literal["last", "exclude"], "images that never reach a threshold: last step, or left out", "last")
    _add(parser, "batch_size", int, "images at a time", 250)
    _add(parser, "timesteps", int | None, "time steps; default: as in training", None)
    _add(parser, "limit", int | None, "that many images, evenly spaced over the split", None)
    _add_files(parser)
    _add_foreign(parser)
    _add_engine(parser)


def _predict(parser: CommandParser) -> None:
    _positional(
        parser,
        "features",
        "trajectories of rnndyn extract --save; NPZ: array [time, stimuli, ...] per area; or with --data a checkpoint",
    )
    _positional(parser, "recordings", "NPZ (responses, bin_edges_ms, rows, neurons) or NWB")
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
    _add_extraction(parser)


def _search(parser: CommandParser) -> None:
    from rnndyn_fast.search.config import SearchConfig

    _add_config(parser, SearchConfig)


def _compare(parser: CommandParser) -> None:
    from rnndyn_fast.search.compare import CompareConfig

    _add_config(parser, CompareConfig)


def _doctor(parser: CommandParser) -> None:
    """No options."""


def _study(parser: CommandParser) -> None:
    _add_study_options(parser, {})


def _demo(parser: CommandParser) -> None:
    from rnndyn_fast.study.config import DEMO

    _add_study_options(parser, DEMO)


def _add_study_options(parser: CommandParser, defaults: dict[str, Any]) -> None:
    import dataclasses

    from rnndyn_fast.study import StudyConfig

    hints = typing.get_type_hints(StudyConfig)
    for item in dataclasses.fields(StudyConfig):
        hint, default = hints[item.name], defaults.get(item.name, item.default)
        if item.name in ("networks", "checkpoints"):  # names with commas between them
            hint, default = str, ",".join(default)
        _add(parser, item.name, hint, item.metadata["help"], default)


_ARGUMENTS: dict[str, Callable[[CommandParser], None]] = {
    "data make": _data_make,
    "plan": _plan,
    "train": _train,
    "import": _import,
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
