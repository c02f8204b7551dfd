"""The arguments of every command. What a command needs is imported when it is asked for."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, Literal

from rnndyn_fast.cli.parser import CommandParser, add, add_config, add_field, positional


def _data_make(parser: CommandParser) -> None:
    add(parser, "out", str, "file to write (HDF5), or a folder for images.h5")
    add(
        parser,
        "source",
        str,
        "fashion-mnist, digits, or auto (the first that is installed); or images of your own: a folder with a subfolder per class (perhaps "
        "within train, val, test), or a CSV with the columns path, label and perhaps split",
        "auto",
    )
    add(parser, "size", int, "height and width in pixels", 64)
    add(parser, "fit", Literal["crop", "pad", "stretch"], "of your own images: crop the longer side, pad the shorter, or neither", "crop")
    add(
        parser,
        "background",
        Literal["white", "grey", "black"],
        "of your own images: under transparent pixels, beside padded ones",
        "white",
    )
    add(parser, "seed", int, "of the splits and the conditions of testplus", 0)
    for split in ("train", "val", "test", "testplus"):
        add(parser, f"num_{split}", int | None, f"images in {split}; default: all that is left", None)
    add(parser, "challenging", bool, "put train and val under the conditions of testplus too", False)
    add(parser, "overwrite", bool, "replace the file if it exists", False)


_LESION = "connections and areas that are off at some steps, as v4:lateral@3-,it>v4@2-5,it@4"


def _data_shards(parser: CommandParser) -> None:
    positional(parser, "data", "HDF5 image file; all its splits are written")
    add(parser, "out", str, "folder for train-000000.tar, ..., and index.npz, which says what is where")
    add(parser, "images_per_shard", int, "images in a tar file", 1000)
    add(parser, "overwrite", bool, "replace tar files that are in the folder", False)


def _plan(parser: CommandParser) -> None:
    from rnndyn_fast.train.config import NETWORK_OPTIONS, TrainConfig

    positional(parser, "model", "a network by the names of rnndyn train --model, a file (YAML) with a spec, or a checkpoint (.pt)")
    for name in ("model_options", *NETWORK_OPTIONS):
        if name != "backend":
            add_field(parser, TrainConfig, name)
    add(parser, "num_classes", int | None, "classes of the readout; default: the model's", None)
    add(parser, "image_size", int | None, "height and width in pixels; default: the model's", None)
    add(
        parser, "device", str, "engines of convolutions are chosen for it: cpu, cuda, cuda:1, ...; without a GPU: what it depends on", "cpu"
    )
    add(parser, "dtype", Literal["float32", "float64", "float16", "bfloat16"], "of the maps", "float32")
    add(parser, "batch", int, "images in a batch", 16)
    add(parser, "lesion", str, _LESION, "")
    add(parser, "instructions", Literal["inference", "training"] | None, "print every instruction of that program too", None)


def _train(parser: CommandParser) -> None:
    from rnndyn_fast.train.config import TrainConfig
    from rnndyn_fast.train.recipes import RECIPES

    add_config(parser, TrainConfig, f"YAML file of these options, or a published recipe ({', '.join(RECIPES)})")


def _report(parser: CommandParser) -> None:
    positional(parser, "run", "folder of rnndyn train")
    add(parser, "out", str | None, "HTML file to write; default: training.html in the folder", None)


def _extract(parser: CommandParser) -> None:
    positional(parser, "checkpoint", "checkpoint of rnndyn train (last.pt, best.pt), or with --model weights from elsewhere")
    positional(parser, "data", "HDF5 image file, or a folder of image files with a subfolder per class")
    add(
        parser,
        "out",
        str,
        "file to write (HDF5), or a folder for extraction.h5; an interrupted extraction goes on when the same command is given again",
    )
    add(parser, "split", Literal["train", "val", "test", "testplus"], "images of an HDF5 file to run", "testplus")
    add(parser, "reducers", str, "all, or some of readout_zones,norms,change,moments,rdm,decodability", "all")
    add(parser, "areas", str, "areas for norms, change and moments, as v4,it,gap; default: the pooled representations", "")
    add(parser, "pooled", str, "areas for rdm and decodability, averaged over their maps; default: the pooled representations", "")
    add(parser, "rdm_classes", str | None, "conditions of the RDMs, as 0,3,7; default: the first 100 classes", None)
    add(parser, "rdm_images", str | None, "single images as conditions in place of classes, by number", None)
    add(parser, "rdm_distance", Literal["correlation", "euclidean"], "between conditions", "correlation")
    add(parser, "save", str, "areas whose trajectories are kept, as gap,it; gap is the pooled representations", "")
    add(parser, "dtype", Literal["float32", "float16"], "of the kept trajectories", "float32")
    add(parser, "compression", int, "of the kept trajectories, gzip 0 to 9", 1)
    add(parser, "batch_size", int, "images at a time", 250)
    add(parser, "timesteps", int | None, "time steps; default: as in training", None)
    add(parser, "limit", int | None, "that many images, evenly spaced over the data", None)
    add(parser, "shards", int, "runs of images that sums are taken of; at least the number of processes of torchrun", 8)
    add(parser, "keep_samples", bool, "keep every sample's group and scalars in the result", False)
    _add_files(parser)
    _add_foreign(parser)
    add(parser, "device", str | None, "cpu, cuda, cuda:1, ...; default: a GPU where there is one", None)
    add(parser, "precision", Literal["float32", "float16", "bfloat16"], "of maps, by autocast; float16 on a GPU", "float32")
    add(parser, "untrained", bool, "the network as it was before training", False)
    add(parser, "lesion", str, _LESION, "")
    _add_engine(parser)
    add(parser, "overwrite", bool, "replace files that exist", False)


def _import(parser: CommandParser) -> None:
    positional(parser, "weights", "file of torch.save with a state_dict: bare, or as DataParallel, torch.compile or Lightning save it")
    add(parser, "out", str, "file to write (.pt), or a folder for imported.pt")
    add(parser, "model", str, "the network that they are of, by the names of rnndyn train --model, or a file (YAML) with a spec")
    add(parser, "data", str, "HDF5 image file or folder of image files with the categories (and, for an HDF5 file, mean and deviation)")
    _add_of_model(parser)
    add(parser, "overwrite", bool, "replace the file if it exists", False)


def _add_extraction(parser: CommandParser) -> None:
    add(parser, "data", str | None, "where a checkpoint is given: HDF5 image file, or folder of image files, to run through it", None)
    add(parser, "split", Literal["train", "val", "test", "testplus"], "images of an HDF5 file to run", "testplus")
    _add_foreign(parser)


def _add_foreign(parser: CommandParser) -> None:
    add(parser, "model", str | None, "the network, where the checkpoint holds weights from elsewhere (see rnndyn import --help)", None)
    _add_of_model(parser)


def _add_of_model(parser: CommandParser) -> None:
    add(
        parser,
        "model_options",
        dict[str, Any] | None,
        "of --model, as YAML: '{lt-interaction: multiplicative, timesteps: 8}'; what shapes of weights tell may be left out",
        None,
    )
    add(
        parser,
        "normalise",
        Literal["data", "signed", "imagenet"] | None,
        "input of --model: by the HDF5 file's mean and deviation, to -1..1, or by those of ImageNet; default: as published",
        None,
    )


def _add_files(parser: CommandParser) -> None:
    add(parser, "resize", bool, "scale and crop image files of other sizes", False)
    add(parser, "background", Literal["white", "grey", "black"], "of transparent pixels in image files", "white")


def _add_engine(parser: CommandParser) -> None:
    add(parser, "backend", Literal["native", "reference"] | None, "default: whichever can run", None)
    add(
        parser,
        "engine",
        Literal["auto", "direct", "winograd", "amx", "fused", "triton"],
        "convolutions: ours where they are faster, PyTorch's, or one of ours wherever it can run",
        "auto",
    )


def _analyse(parser: CommandParser) -> None:
    from rnndyn_fast.analysis.trajectory_files import NAMES

    positional(
        parser,
        "result",
        "file of rnndyn extract; NPZ or HDF5 file of trajectories [T, N, D] and their readout; or with --data a checkpoint",
    )
    add(parser, "out", str, "folder for report, tables and figures; files of the same names are replaced")
    add(parser, "compare", str | None, "a second file: that of the untrained network on the same images", None)
    add(parser, "pdf", bool, "print the report to report.pdf too; needs Chromium or Chrome", False)
    for name, known in NAMES.items():
        add(parser, name, str | None, f"name of this array in a file of trajectories; default: {' or '.join(known)}", None)
    _add_extraction(parser)


def _phase_train(parser: CommandParser) -> None:
    from rnndyn_fast.train.phase_config import PhaseTrainConfig

    add_config(parser, PhaseTrainConfig)


def _phase_sweep(parser: CommandParser) -> None:
    from rnndyn_fast.train.phase_config import PhaseSweepConfig

    add_config(parser, PhaseSweepConfig)


def _phase_analyse(parser: CommandParser) -> None:
    positional(parser, "networks", "folder of phase train or sweep, its networks.npz, or an .npz file with the published names")
    add(parser, "out", str, "folder for the results; what is there is not analysed again")
    add(parser, "prefix", str, "of the names in a published file", "")
    add(parser, "jobs", list[int] | None, "job ids to analyse, as 0,5,7; default: all", None)
    add(parser, "handcrafted", bool, "analyse a handcrafted oscillator matched to them too", True)
    add(parser, "seed", int, "of the trials", 42)
    add(parser, "overwrite", bool, "analyse again what is there", False)


def _phase_report(parser: CommandParser) -> None:
    positional(parser, "analyses", "folder of phase analyse")
    add(parser, "out", str, "file to write (HTML), or a folder for report.html")
    add(parser, "sweep", str | None, "folder of the sweep that was analysed, for the table of training", None)
    add(parser, "published", str | None, "published table of results (CSV), to be set beside the sweep", None)
    add(parser, "featured", list[str] | None, "systems shown in full; default: the first of every kind", None)


def _react(parser: CommandParser) -> None:
    positional(parser, "checkpoint", "checkpoint of rnndyn train (last.pt, best.pt), or with --model weights from elsewhere")
    positional(parser, "data", "HDF5 image file, or a folder of image files with a subfolder per class")
    add(parser, "out", str, "folder for result, tables, figures and report; files of the same names are replaced")
    add(parser, "split", Literal["train", "val", "test", "testplus"], "images to run", "test")
    add(parser, "human", str | None, "reaction times of people: CSV (subject, image, reaction_time) or NPZ [subjects, images]", None)
    add(parser, "strict", bool, "stop where the entropy is below the threshold, not at most equal to it", False)
    add(parser, "cumulative", bool, "decide by the softmax of the logits summed over time", False)
    add(parser, "unreached", Literal["last", "exclude"], "images that never reach a threshold: last step, or left out", "last")
    add(parser, "batch_size", int, "images at a time", 250)
    add(parser, "timesteps", int | None, "time steps; default: as in training", None)
    add(parser, "limit", int | None, "that many images, evenly spaced over the split", None)
    _add_files(parser)
    _add_foreign(parser)
    _add_engine(parser)


def _predict(parser: CommandParser) -> None:
    positional(
        parser,
        "features",
        "trajectories of rnndyn extract --save; NPZ: array [time, stimuli, ...] per area; or with --data a checkpoint",
    )
    positional(parser, "recordings", "NPZ (responses, bin_edges_ms, rows, neurons) or NWB")
    add(parser, "out", str, "folder for results, tables, figure and report; files of the same names are replaced")
    add(parser, "areas", str, "areas to compare, as v4,it; default: all in the file", "")
    add(parser, "method", Literal["ridge", "pls"], "regression", "ridge")
    add(parser, "mapping", Literal["per_bin", "fixed"], "a map for every time bin, or one for all", "per_bin")
    add(parser, "step_ms", float | None, "duration of a model step; default: time bin b is step b", None)
    add(parser, "latency_ms", float, "time after onset at which step 0 begins", 0.0)
    add(parser, "num_folds", int, "folds of stimuli", 5)
    add(parser, "num_splits", int, "random halvings of the repeats", 100)
    add(parser, "min_reliability", float, "neurons below it in a time bin do not count there", 0.1)
    add(parser, "correct_fit", bool, "correct also for what the recording's noise costs the fit", False)
    add(parser, "max_dimensions", int | None, "principal components that larger features are reduced to", 1000)
    add(parser, "num_components", int, "of PLS", 25)
    add(parser, "seed", int, "of folds and halvings", 0)
    add(parser, "table", str, "NWB: table of presentations", "trials")
    add(parser, "stimulus_column", str, "NWB: its column that tells stimuli apart", "stimulus_id")
    add(parser, "start_ms", float, "NWB: start of the first time bin, relative to a presentation", 0.0)
    add(parser, "stop_ms", float, "NWB: end of the last", 260.0)
    add(parser, "bin_ms", float, "NWB: width of a time bin", 10.0)
    _add_extraction(parser)


def _search(parser: CommandParser) -> None:
    from rnndyn_fast.search.config import SearchConfig

    add_config(parser, SearchConfig)


def _search_report(parser: CommandParser) -> None:
    from rnndyn_fast.search.found import FoundConfig

    positional(parser, "search", "folder of a search, which the report goes to")
    for name in ("cells", "split", "limit", "bootstrap", "backend"):
        add_field(parser, FoundConfig, name)


def _search_proxies(parser: CommandParser) -> None:
    from rnndyn_fast.search.proxies import ProxiesConfig

    positional(parser, "search", "folder of a search, whose space, images and options are taken")
    for name in ("out", "architectures", "epochs", "max_train_images", "bootstrap", "seed"):
        add_field(parser, ProxiesConfig, name)


def _compare(parser: CommandParser) -> None:
    from rnndyn_fast.search.compare_config import CompareConfig

    add_config(parser, CompareConfig)


def _doctor(parser: CommandParser) -> None:
    """No options."""


def _study(parser: CommandParser) -> None:
    _add_study_options(parser, {})


def _demo(parser: CommandParser) -> None:
    from rnndyn_fast.study.config import demo_options

    _add_study_options(parser, demo_options())


def _add_study_options(parser: CommandParser, defaults: dict[str, Any]) -> None:
    import dataclasses

    from rnndyn_fast.study import StudyConfig

    hints = typing.get_type_hints(StudyConfig)
    for item in dataclasses.fields(StudyConfig):
        hint, default = hints[item.name], defaults.get(item.name, item.default)
        if item.name in ("networks", "checkpoints"):  # names with commas between them
            hint, default = str, ",".join(default)
        add(parser, item.name, hint, item.metadata["help"], default)


ARGUMENTS: dict[str, Callable[[CommandParser], None]] = {
    "data make": _data_make,
    "data shards": _data_shards,
    "plan": _plan,
    "train": _train,
    "report": _report,
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
    "search report": _search_report,
    "search proxies": _search_proxies,
    "compare": _compare,
    "doctor": _doctor,
    "study": _study,
    "demo": _demo,
}


def command_parser(command: str) -> CommandParser:
    """The parser of a command, with its arguments."""
    parser = CommandParser(command)
    ARGUMENTS[command](parser)
    return parser
