"""What the commands do: each calls one function of the library with the same options."""

from __future__ import annotations

from typing import Any


def data_make(**options: Any) -> None:
    """`rnndyn data make`"""
    from rnndyn_fast.data import ImageFile, make_dataset
    from rnndyn_fast.train.progress import choose_reporter, split_progress

    with choose_reporter() as reporter:
        path = make_dataset(**options, progress=split_progress(reporter))
    with ImageFile(path) as file:
        sizes = ", ".join(f"{name} {len(file.split(name))}" for name in file.split_names)
        print(f"{path}: {file.image_size} px, {file.num_classes} categories; images: {sizes}")
        print(file.attrs["source_note"])


def plan(model: str, options: dict[str, Any] | None = None, **network: Any) -> None:
    """`rnndyn plan`"""
    import torch

    from rnndyn_fast import models
    from rnndyn_fast.graph.plan import describe

    if network["image_size"] is None:
        del network["image_size"]
    what = models.named(model)
    if "network" in what:  # a spec, with a size and classes of its own
        network = {name: network[name] for name in ("timesteps", "engine")}
    elif not model.startswith("blt_net"):  # the options of the command are those of blt_net; other models have options of their own
        network = {"engine": network["engine"]}
    with torch.device("meta"):
        net = models.build({**what, **network, **(options or {})})
    print(describe(net.schedule(), network["engine"]))


def train(**options: Any) -> None:
    """`rnndyn train`"""
    from rnndyn_fast.train import TrainConfig
    from rnndyn_fast.train import train as run

    config = TrainConfig(**options)
    try:
        path = run(config)
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: rnndyn train --config {config.out}/train.yaml --resume")
        raise
    print(path)


def extract(save: str, **options: Any) -> None:
    """`rnndyn extract`"""
    from rnndyn_fast.analysis import ReadoutZoneResult
    from rnndyn_fast.extract import extract as run
    from rnndyn_fast.extract import trajectories_path

    areas = tuple(area.strip() for area in save.split(",") if area.strip())
    path = run(**options, save=areas)
    print(summary_lines(ReadoutZoneResult.load(path)))
    print(path)
    if areas:
        print(trajectories_path(path))


def analyse(result: str, out: str, compare: str | None) -> None:
    """`rnndyn analyse`"""
    from rnndyn_fast.analysis import ReadoutZoneResult, check_claims
    from rnndyn_fast.analysis import analyse as run

    paths = run(result, out, compare=compare)
    loaded = ReadoutZoneResult.load(result)
    print(summary_lines(loaded))
    for claim in check_claims(loaded):
        print(f"{claim.statement}: {claim.verdict} (n = {claim.n:,})")
    print(f"{len(paths)} files in {out}")


def summary_lines(result: Any) -> str:
    """Accuracy over time and the four groups, as text."""
    accuracy = " ".join(f"{100 * value:.1f}" for value in result.accuracy)
    groups = ", ".join(f"{name.replace('_', '-')} {count:,}" for name, count in result.counts.items())
    return f"{result.n:,} trajectories; accuracy in % at t = 0..{result.timesteps - 1}: {accuracy}\n{groups}"


def react(out: str, unreached: str, **options: Any) -> None:
    """`rnndyn react`"""
    from pathlib import Path

    from rnndyn_fast.extract import react as run
    from rnndyn_fast.report.speed_accuracy import write_reaction_times

    if Path(out).exists() and not Path(out).is_dir():
        raise FileExistsError(f"out: expected a folder, {out} is a file")
    result, comparison = run(**options, unreached=unreached)
    write_reaction_times(result, out, comparison, unreached=unreached)
    best = result.matched(unreached, accuracy=float(result.curve(unreached).accuracy.max()))
    print(f"{result.n:,} images; accuracy in % at t = 0..{result.timesteps - 1}: {' '.join(f'{100 * a:.1f}' for a in result.accuracy)}")
    print(f"best by threshold: {100 * best.accuracy:.1f}% at {best.threshold:.3g} nats, {best.mean_step + 1:.2f} steps on average")
    if comparison is not None:
        (mean, half), (low, _), (high, _) = (comparison.mean(name) for name in ("correlation", "ceiling_low", "ceiling_high"))
        print(f"rank correlation with people {mean:.3f} (+- {half:.3f}), noise ceiling {low:.3f} to {high:.3f}")
    print(out)


def predict(areas: str, **options: Any) -> None:
    """`rnndyn predict`"""
    from rnndyn_fast.predictivity import predict as run

    for result in run(**options, areas=tuple(area.strip() for area in areas.split(",") if area.strip())):
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

    config = SearchConfig(**options)
    try:
        path = run(config)
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: rnndyn search --config {config.out}/search.yaml --resume")
        raise
    print(path)


def doctor() -> None:
    """`rnndyn doctor`"""
    from rnndyn_fast.cli.doctor import report

    print(report())


def demo(**options: Any) -> None:
    """`rnndyn demo`"""
    from rnndyn_fast.report.demo import DemoConfig, run_demo

    print(run_demo(DemoConfig(**options)))
