"""What comes out of training networks on modulo arithmetic: tables, networks, and the comparison with the published sweep."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import statistics
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.file_io import reads, write_text, written_whole
from rnndyn_fast.nn.ctrnn import CTRNN, PUBLISHED_NAMES
from rnndyn_fast.optional import require
from rnndyn_fast.train.checkpoint import versions

NETWORKS, RESULTS_CSV, RESULTS_JSON, HISTORY, COMPARISON = "networks.npz", "results.csv", "results.json", "history.csv", "comparison.json"
NETWORKS_FORMAT = "rnndyn_fast.networks/1"


@dataclass(frozen=True)
class NetworkResult:
    """A trained network; the first eight fields are the published table's columns.

    ``final_epoch`` is the 0-based epoch after which the network reached the stopping error, None if it never did. ``best_loss`` and
    ``best_accuracy`` are the validation error and accuracy of the saved weights. ``status``: reached, finished (all epochs), diverged or
    running.
    """

    job_id: int
    seed: int | None
    best_loss: float | None
    best_accuracy: float | None
    final_epoch: int | None
    alpha: float
    noise: float
    activation_fn: str
    epochs: int | None = None
    status: str | None = None


def save_networks(path: str | os.PathLike[str], net: CTRNN, rows: Sequence[NetworkResult]) -> Path:
    """Write networks and their rows as one .npz, under the published parameter names with a model axis in front; the write is atomic."""
    arrays: dict[str, Any] = {name: net.get_parameter(ours).detach().numpy() for name, ours in PUBLISHED_NAMES.items()}
    arrays |= {"alpha": net.alpha.numpy(), "noise_const": net.noise_std.numpy(), "h0": net.h0.numpy()}
    arrays["activation"] = np.array([a.value for a in net.activations])
    arrays["job_id"] = np.array([row.job_id for row in rows])
    arrays["results"] = np.array(json.dumps([dataclasses.asdict(row) for row in rows]))
    with written_whole(path) as file:
        np.savez(file, format=np.array(NETWORKS_FORMAT), **arrays)
    return Path(path)


@reads("file of networks")
def load_networks(path: str | os.PathLike[str], *, backend: str | None = None) -> tuple[CTRNN, list[NetworkResult]]:
    """The networks of ``rnndyn phase train`` or ``rnndyn phase sweep``, and a row for each.

    Args:
        path: ``networks.npz``, or the folder of the run.
        backend: of the module, see :class:`rnndyn_fast.nn.CTRNN`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file.
    """
    path = Path(path)
    path = path / NETWORKS if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"path: no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"path: {path} is truncated or not an .npz file: {error}") from error
    if str(found.get("format")) != NETWORKS_FORMAT:
        raise ValueError(f"path: {path} is not a file of networks (format {NETWORKS_FORMAT!r}, found {str(found.get('format'))!r})")
    count, inputs, hidden = found["W_in"].shape
    net = CTRNN(count, inputs, hidden, found["W_out"].shape[2], activation=found["activation"].tolist(), seeds=[0] * count, backend=backend)
    own = {ours: found[name] for name, ours in PUBLISHED_NAMES.items()}
    own |= {"alpha": found["alpha"], "noise_std": found["noise_const"], "h0": found["h0"]}
    net.load_state_dict({name: torch.from_numpy(value) for name, value in own.items()})
    return net, [NetworkResult(**row) for row in json.loads(str(found["results"]))]


def write_history(path: Path, rows: Sequence[NetworkResult], history: Sequence[Tensor]) -> None:  # [E, 3, 3] each
    """A line per network and epoch: error, activity and accuracy before and after each batch's step (means), and of the validation."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    kinds = [f"{when}_{what}" for when in ("train_before", "train", "val") for what in ("error", "activity", "accuracy")]
    writer.writerow(["job_id", "epoch", *kinds])
    for row, values in zip(rows, history, strict=True):
        for epoch, line in enumerate(values.flatten(1).tolist()):
            writer.writerow([row.job_id, epoch, *(f"{value:.7g}" for value in line)])
    write_text(path, table.getvalue())


def write_results(folder: Path, rows: Sequence[NetworkResult], config: Mapping[str, Any], seconds: float, published: str | None) -> None:
    """results.csv, results.json and, given the published table, comparison.json."""
    names = [item.name for item in dataclasses.fields(NetworkResult)]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow(["" if getattr(row, name) is None else getattr(row, name) for name in names])
    write_text(folder / RESULTS_CSV, table.getvalue())
    network_epochs = sum(row.epochs or 0 for row in rows)
    contents = {
        "summary": summarise(rows),
        "seconds": seconds,
        "network_epochs": network_epochs,
        "seconds_per_network_epoch": seconds / network_epochs if network_epochs else None,
        "config": dict(config),
        "versions": versions(),
        "networks": [dataclasses.asdict(row) for row in rows],
    }
    write_text(folder / RESULTS_JSON, json.dumps(contents, indent=1) + "\n")
    if published is not None:
        write_text(folder / COMPARISON, json.dumps(compare(rows, read_published(published)), indent=1) + "\n")


@reads("table of results")
def read_published(path: str | os.PathLike[str]) -> list[NetworkResult]:
    """The rows of a published table of results; networks without metrics are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, or a line cannot be read; names the line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"published: no such file: {path}")
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for number, line in enumerate(reader, start=2):
            try:
                if line["best_loss"] == "":
                    continue
                final = line["final_epoch"]
                rows.append(
                    NetworkResult(
                        job_id=int(line["job_id"]),
                        seed=int(line["seed"]) if line["seed"] else None,
                        best_loss=float(line["best_loss"]),
                        best_accuracy=float(line["best_accuracy"]),
                        final_epoch=int(float(final)) if final else None,
                        alpha=float(line["alpha"]),
                        noise=float(line["noise"]),
                        activation_fn=line["activation_fn"],
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"published: {path}, line {number}: not a row of results ({error!r})") from error
    if not rows:
        raise ValueError(f"published: no rows in {path}")
    return sorted(rows, key=lambda row: row.job_id)


def summarise(rows: Sequence[NetworkResult]) -> dict[str, Any]:
    """How many networks reached the stopping error, after how many epochs, and how accurate they are; also by condition."""

    def epochs(some: Sequence[NetworkResult]) -> dict[str, Any]:
        final = [row.final_epoch for row in some if row.final_epoch is not None]
        return {
            "networks": len(some),
            "reached": len(final),
            "final_epoch_median": statistics.median(final) if final else None,
            "final_epoch_min": min(final, default=None),
            "final_epoch_max": max(final, default=None),
        }

    conditions = sorted({(row.alpha, row.noise, row.activation_fn) for row in rows})
    return {
        **epochs(rows),
        "accuracy_1": sum(row.best_accuracy == 1.0 for row in rows),
        "conditions": [
            {"alpha": a, "noise": s, "activation_fn": f, **epochs([r for r in rows if (r.alpha, r.noise, r.activation_fn) == (a, s, f)])}
            for a, s, f in conditions
        ],
    }


def compare(ours: Sequence[NetworkResult], theirs: Sequence[NetworkResult]) -> dict[str, Any]:
    """The distributions of epochs of two sweeps.

    Two-sample Kolmogorov-Smirnov and Mann-Whitney tests over all networks that reached the stopping error, and per condition the ratio of
    medians (ours over theirs). Single networks cannot be compared: training amplifies rounding, and seeds draw other numbers here.
    """
    require("scipy")

    from scipy import stats

    def final(rows: Sequence[NetworkResult]) -> list[int]:
        return [row.final_epoch for row in rows if row.final_epoch is not None]

    result: dict[str, Any] = {"ours": summarise(ours), "published": summarise(theirs)}
    if final(ours) and final(theirs):
        ks, mw = stats.ks_2samp(final(ours), final(theirs)), stats.mannwhitneyu(final(ours), final(theirs))
        result["kolmogorov_smirnov"] = {"statistic": float(ks.statistic), "p": float(ks.pvalue)}
        result["mann_whitney"] = {"u": float(mw.statistic), "p": float(mw.pvalue)}
    published = {(c["alpha"], c["noise"], c["activation_fn"]): c for c in result["published"]["conditions"]}
    ratios = []
    for condition in result["ours"]["conditions"]:
        other = published.get((condition["alpha"], condition["noise"], condition["activation_fn"]))
        if other and other["final_epoch_median"] and condition["final_epoch_median"]:
            ratio = condition["final_epoch_median"] / other["final_epoch_median"]
            ratios.append({key: condition[key] for key in ("alpha", "noise", "activation_fn")} | {"median_ratio": ratio})
    result["conditions"] = ratios
    return result
