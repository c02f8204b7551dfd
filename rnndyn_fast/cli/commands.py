"""What the commands do: each calls one function of the library with the same options."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def data_make(**options: Any) -> None:
    """`rnndyn data make`"""
    from rnndyn_fast.data import ImageFile, make_dataset
    from rnndyn_fast.train.progress import choose_reporter, split_progress

    with choose_reporter() as reporter:
        path = make_dataset(**options, progress=split_progress(reporter))
    with ImageFile(path, required_splits=None) as file:
        sizes = ", ".join(f"{name} {len(file.split(name))}" for name in file.split_names)
        print(f"{path}: {file.image_size} px, {file.num_classes} categories; images: {sizes}")
        print(file.attrs["source_note"])


def _names(text: str) -> tuple[str, ...]:
    """What is separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def data_shards(data: str, out: str, images_per_shard: int, overwrite: bool) -> None:
    """`rnndyn data shards`"""
    from rnndyn_fast.data import ImageFile
    from rnndyn_fast.data.shards import read_index, write_shards
    from rnndyn_fast.train.progress import choose_reporter, split_progress

    with choose_reporter() as reporter, ImageFile(data, required_splits=None, argument="data") as file:
        path = write_shards(file, out, images_per_shard=images_per_shard, overwrite=overwrite, progress=split_progress(reporter))
    print(f"{path}: {read_index(path).note}")


def plan(
    model: str,
    num_classes: int | None,
    image_size: int | None,
    engine: Any,
    device: str = "cpu",
    dtype: str = "float32",
    batch: int = 16,
    instructions: str | None = None,
    lesion: str = "",
    **options: Any,
) -> None:
    """`rnndyn plan`"""
    import torch

    from rnndyn_fast import models
    from rnndyn_fast.job_device import named_device
    from rnndyn_fast.ops.cuda_module import check_device
    from rnndyn_fast.program.describe import describe
    from rnndyn_fast.train import TrainConfig, read_checkpoint

    if dtype not in (known := ("float32", "float64", "float16", "bfloat16")):
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {dtype!r}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if model.endswith(".pt"):
        built = {**read_checkpoint(model)["model"], "engine": engine}
    else:
        built = TrainConfig(data="", out="", model=model, engine=engine, **options).build_options()
        if built["model"] != "network":  # (a spec has a size and classes of its own)
            given = {"num_classes": num_classes, "image_size": image_size}
            built |= {name: value for name, value in given.items() if value is not None}
    with torch.device("meta"):
        net = models.build(built)
    where = named_device(device)
    if torch.cuda.is_available():  # (elsewhere the plan says what it would depend on)
        check_device(where)
    with net.lesions_named(_names(lesion)):
        schedule = net.schedule()
    if str(built["model"]).startswith("blt_net") and not model.endswith(".pt"):
        print(_defaults(built))
    print(describe(schedule, engine, device=device, dtype=getattr(torch, dtype), samples=batch, instructions=instructions))


def _defaults(built: dict[str, Any]) -> str:
    """In what a plan's network differs from what its name alone gives in Python."""
    import inspect

    from rnndyn_fast.models import MODELS

    model = built["model"]
    own = {name: p.default for name, p in inspect.signature(MODELS[model]).parameters.items()}
    names = [name for name in own if name in built and name not in ("backend", "engine") and _plain(built[name]) != _plain(own[name])]
    if not names:
        return f"{model}: as {model}() in Python"
    words = ", ".join(f"{name.replace('_', ' ')} {_word(built[name])} ({_word(own[name])})" for name in names)
    return f"{model} with the options and defaults of rnndyn train; in brackets those of {model}() in Python: {words}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def train(**options: Any) -> None:
    """`rnndyn train`"""
    from rnndyn_fast.train import TrainConfig
    from rnndyn_fast.train import train as run

    config = TrainConfig(**options)
    if config.replay_failure:
        from rnndyn_fast.train.health import replay

        print(replay(config.out))
        return
    _run_resumable(run, config, "train", "train.yaml")


def report(run: str, out: str | None) -> None:
    """`rnndyn report`"""
    from rnndyn_fast.optional import require

    require("rich")
    from rich.console import Console

    from rnndyn_fast.report.training_page import write_training_page
    from rnndyn_fast.train.progress import epoch_table

    path, record = write_training_page(run, out)
    Console().print(epoch_table([(row, record.epochs) for row in record.rows]))
    print(record.status)
    print(path)


def import_weights(weights: str, out: str, overwrite: bool, **options: Any) -> None:
    """`rnndyn import`"""
    from pathlib import Path

    from rnndyn_fast.train.foreign import import_checkpoint

    if Path(out).exists() and not overwrite:
        raise FileExistsError(f"out: {out} exists; pass --overwrite to replace it")
    if Path(out).exists() and Path(weights).exists() and Path(out).samefile(weights):
        raise ValueError(f"out: expected another file than the weights, got {out}")
    path, notes = import_checkpoint(weights, _foreign(options["data"], options), out)
    for note in notes:
        print(note)
    print(path)


def _foreign(data: str, options: dict[str, Any]) -> Any:
    """Takes --model and what belongs to it out of the options; None without --model."""
    from rnndyn_fast.train.foreign import Foreign

    model, of_model, normalise = (options.pop(name, None) for name in ("model", "model_options", "normalise"))
    if model is None:
        if of_model or normalise:
            raise ValueError(f"{'model_options' if of_model else 'normalise'}: expected --model too, for weights from elsewhere")
        return None
    return Foreign(model, data, of_model or {}, normalise)


def extract(**options: Any) -> None:
    """`rnndyn extract`"""
    from rnndyn_fast.analysis import ReadoutZoneResult
    from rnndyn_fast.extract import REDUCERS, trajectories_path
    from rnndyn_fast.extract import extract as run

    lists: dict[str, Any] = {name: _names(options.pop(name)) for name in _LISTS}
    lists["reducers"] = REDUCERS if lists["reducers"] == ("all",) else lists["reducers"]
    for name in ("rdm_classes", "rdm_images"):
        text = options[name]
        if text is not None:
            if not all(part.strip().isdecimal() for part in text.split(",")):
                raise ValueError(f"{name}: expected numbers with commas between them, as 0,3,7, got {text!r}")
            options[name] = [int(part) for part in text.split(",")]
    foreign = _foreign(options["data"], options)
    path = run(**options, **lists, foreign=foreign)
    if int(os.environ.get("RANK", "0")):  # torchrun: the first process speaks
        return
    if "readout_zones" in lists["reducers"]:
        print(summary_lines(ReadoutZoneResult.load(path)))
    print(path)
    if lists["save"]:
        print(trajectories_path(path))


_LISTS = ("reducers", "areas", "pooled", "save", "lesion")


_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin")


def _extracted(given: str, out: str, options: dict[str, Any], **of_extract: Any) -> Any:
    """The path of an extraction: what is given, or for a checkpoint or weights ``<out>/extraction.h5``, computed now."""
    from pathlib import Path

    data, split = options.pop("data"), options.pop("split")
    foreign = _foreign(data, options)
    if Path(given).suffix.lower() not in _WEIGHTS:
        if data is not None or foreign is not None:
            raise ValueError(f"{'data' if data is not None else 'model'}: expected only with a checkpoint, which {given} is none")
        return Path(given)
    if data is None:
        raise ValueError(f"data: expected the images to run through the network in {given}, got none")
    from rnndyn_fast.extract import extract as run

    return run(given, data, split, out=Path(out) / "extraction.h5", foreign=foreign, overwrite=True, **of_extract)


def analyse(result: str, out: str, compare: str | None, pdf: bool = False, **names: Any) -> None:
    """`rnndyn analyse`"""
    result = str(_extracted(result, out, names, reducers=("readout_zones",), keep_samples=True))
    from rnndyn_fast.report.analysis_page import REPORT
    from rnndyn_fast.report.analysis_page import analyse as run

    loaded, claims, paths = run(result, out, compare=compare, names=names, pdf=pdf)
    print(summary_lines(loaded))
    for claim in claims:
        print(claim)
    if not claims:
        print("claims: inconclusive, the result holds sums only; run the extraction with --keep-samples")
    print(f"{len(paths)} files in {out}, among them {REPORT}")


def summary_lines(result: Any) -> str:
    """Accuracy over time and the four groups, as text."""
    accuracy = " ".join(f"{100 * value:.1f}" for value in result.accuracy)
    groups = ", ".join(f"{name.replace('_', '-')} {count:,}" for name, count in result.counts.items())
    return f"{result.n:,} trajectories; accuracy in % at t = 0..{result.timesteps - 1}: {accuracy}\n{groups}"


def phase_train(**options: Any) -> None:
    """`rnndyn phase train`"""
    from rnndyn_fast.train import PhaseTrainConfig, train_phase

    _run_resumable(train_phase, PhaseTrainConfig(**options), "phase train", "phase.yaml")


def phase_sweep(**options: Any) -> None:
    """`rnndyn phase sweep`"""
    from rnndyn_fast.train import PhaseSweepConfig, train_phase

    _run_resumable(train_phase, PhaseSweepConfig(**options), "phase sweep", "phase.yaml")


def _run_resumable(run: Callable[[Any], Any], config: Any, command: str, file: str) -> None:
    """Run and print where the results are; stopped, how to go on."""
    speaks = int(os.environ.get("RANK", "0")) == 0  # of the processes of torchrun the first
    try:
        path = run(config)
    except KeyboardInterrupt:
        if speaks:
            begun = os.path.exists(f"{config.out}/{file}")
            how = f"to go on: rnndyn {command} --config {config.out}/{file} --resume" if begun else "the same command begins again"
            print(f"\nstopped; {how}", flush=True)
        raise
    if speaks:
        print(path)


def react(out: str, unreached: str, **options: Any) -> None:
    """`rnndyn react`"""

    from rnndyn_fast.analysis.human_times import CEILINGS
    from rnndyn_fast.extract import react as run
    from rnndyn_fast.report.speed_accuracy import write_reaction_times

    foreign = _foreign(options["data"], options)
    result, comparison = run(**options, unreached=unreached, foreign=foreign)
    write_reaction_times(result, out, comparison, unreached=unreached)
    best = result.matched(unreached, accuracy=float(result.curve(unreached).accuracy.max()))
    print(f"{result.n:,} images; accuracy in % at t = 0..{result.timesteps - 1}: {' '.join(f'{100 * a:.1f}' for a in result.accuracy)}")
    print(f"best by threshold: {100 * best.accuracy:.1f}% at {best.threshold:.3g} nats, {best.mean_step + 1:.2f} steps on average")
    if comparison is not None:
        told = [f"{value:.3f} (95% interval {low:.3f} to {high:.3f})" for value, low, high in map(comparison.estimate, CEILINGS)]
        print(f"rank correlation with {len(comparison.correlation)} people over {comparison.images} images: {told[0]}")
        print(f"noise ceiling, lower {told[1]}, upper {told[2]}")
    print(out)


def predict(areas: str, **options: Any) -> None:
    """`rnndyn predict`"""
    from rnndyn_fast.extract import trajectories_path
    from rnndyn_fast.predictivity import predict as run

    chosen = tuple(area.strip() for area in areas.split(",") if area.strip())
    given = options.pop("features")
    if options["data"] is not None and not chosen:
        raise ValueError("areas: expected areas of the network, as v4,it, where a checkpoint is given, got none")
    made = _extracted(given, options["out"], options, reducers=("norms",), save=chosen)
    features = given if str(made) == given else trajectories_path(made)
    for result in run(features, **options, areas=chosen):
        corrected, plain = result.over_bins("corrected"), result.over_bins("correlation")
        print(
            f"{result.area}: corrected {corrected.median:.3f} ({corrected.low:.3f} to {corrected.high:.3f}, n = {int(corrected.n)}), "
            f"uncorrected {plain.median:.3f} (n = {int(plain.n)}), {len(result.bins)} time bins"
        )
    print(options["out"])


def search(**options: Any) -> None:
    """`rnndyn search`"""
    from rnndyn_fast.search import SearchConfig
    from rnndyn_fast.search import search as run

    _run_resumable(run, SearchConfig(**options), "search", "search.yaml")


def search_report(**options: Any) -> None:
    """`rnndyn search report`"""
    from rnndyn_fast.search.found import FoundConfig, report_found

    print(report_found(FoundConfig(**options)))


def search_proxies(**options: Any) -> None:
    """`rnndyn search proxies`"""
    from rnndyn_fast.search.proxies import ProxiesConfig, compare_proxies

    print(compare_proxies(ProxiesConfig(**options)))


def compare(**options: Any) -> None:
    """`rnndyn compare`"""
    from rnndyn_fast.search import CompareConfig
    from rnndyn_fast.search import compare as run

    _run_resumable(run, CompareConfig(**options), "compare", "compare.yaml")


def phase_analyse(networks: str, jobs: list[int] | None, **options: Any) -> None:
    """`rnndyn phase analyse`"""
    from rnndyn_fast.phase.run import TABLE, analyse_networks
    from rnndyn_fast.train.progress import choose_reporter

    with choose_reporter() as reporter:
        results = analyse_networks(networks, jobs=jobs, reporter=reporter, **options)
    for result in results:
        facts = result.facts
        adds = "" if facts["automaton.is_modulo"] else "not "
        print(
            f"{result.name}: {facts['solution.solution']} ({facts['solution.reason']}); automaton {adds}addition modulo {facts['modulus']}"
        )
    print(f"{options['out']}/{TABLE}")


def phase_report(analyses: str, **options: Any) -> None:
    """`rnndyn phase report`"""
    from rnndyn_fast.report.phase_page import write_phase_page

    print(write_phase_page(analyses, **options))


def doctor() -> None:
    """`rnndyn doctor`"""
    from rnndyn_fast.cli.doctor import report

    print(report())


def study(**options: Any) -> None:
    """`rnndyn study`, and with other defaults `rnndyn demo`"""
    from rnndyn_fast.study import StudyConfig, run_study

    for name in ("networks", "checkpoints"):
        options[name] = tuple(part.strip() for part in options[name].split(",") if part.strip())
    try:
        print(run_study(StudyConfig(**options)))
    except KeyboardInterrupt:
        print(f"\nstopped; the same command continues (files in {options['out']})")
        raise


demo = study
