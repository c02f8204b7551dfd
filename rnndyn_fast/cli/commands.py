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


def plan(model: str, **options: Any) -> None:
    """`rnndyn plan`"""
    from rnndyn_fast import models
    from rnndyn_fast.graph.plan import describe

    if options["image_size"] is None:
        del options["image_size"]
    print(describe(models.build({"model": model, **options}).schedule(), options["engine"]))


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


def phase_train(**options: Any) -> None:
    """`rnndyn phase train`"""
    from rnndyn_fast.train import PhaseTrainConfig

    _train_phase(PhaseTrainConfig(**options), "train")


def phase_sweep(**options: Any) -> None:
    """`rnndyn phase sweep`"""
    from rnndyn_fast.train import PhaseSweepConfig

    _train_phase(PhaseSweepConfig(**options), "sweep")


def _train_phase(config: Any, command: str) -> None:
    from rnndyn_fast.train import train_phase

    try:
        path = train_phase(config)
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: rnndyn phase {command} --config {config.out}/phase.yaml --resume")
        raise
    print(path)


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
    from rnndyn_fast.phase.run import write_report

    print(write_report(analyses, **options))


def doctor() -> None:
    """`rnndyn doctor`"""
    from rnndyn_fast.cli.doctor import report

    print(report())


def demo(**options: Any) -> None:
    """`rnndyn demo`"""
    from rnndyn_fast.report.demo import DemoConfig, run_demo

    print(run_demo(DemoConfig(**options)))
