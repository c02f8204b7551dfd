"""The record of a search and of its random control: every trial in one table, and what docs/search.md says of them.

    python benchmarks/search_record.py tpe=runs/search random=runs/random

Folders are those of `rnndyn search`; their studies are asked for the trials. With no arguments, what the page
says of the tables that are there.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "search_record"
TRIALS, IMPORTANCE, NETWORKS = "trials.csv", "importance.csv", "networks.csv"
GATED = ("gru", "lstm", "reciprocal")  # cells whose states are gated; the last unless `gating` is off or there is no cell memory
Trial = dict[str, str]


def write_record(folders: Mapping[str, Path]) -> None:
    """Write the tables."""
    from rnndyn_fast.search.found import load_search
    from rnndyn_fast.search.importance import importances
    from rnndyn_fast.search.storage import INFEASIBLE, accuracy, completed, open_study

    rows: list[dict[str, Any]] = []
    shares: list[dict[str, Any]] = []
    for name, folder in folders.items():
        config = load_search(folder)
        space, study = config.load_space(), open_study(config, create=False)
        for t in study.get_trials(deepcopy=False):
            about = t.user_attrs
            state = "passed over" if INFEASIBLE in about else "repeated" if "same_as" in about else t.state.name.lower()
            row = {"search": name, "trial": t.number, "state": state, "correct": f"{accuracy(t):.4f}" if t.values else ""}
            row["epochs"] = len(t.intermediate_values)
            row["curve"] = " ".join(f"{value:.4f}" for _, value in sorted(t.intermediate_values.items()))
            row["parameters"] = about.get("parameters", "")
            # Backward takes about twice the multiply-adds of forward.
            images = 3 * (config.max_train_images or 0) * len(t.intermediate_values)
            row["training_gmac"] = f"{about.get('multiply_adds', 0) * images / 1e9:.1f}" if state != "repeated" else "0.0"
            rows.append(row | {key: _short(t.params.get(key, "")) for key in space.open})
        for choice, share in importances(completed(study), space).items():
            shares.append({"search": name, "choice": choice, "share": f"{100 * share.value:.1f}", "low": f"{100 * share.low:.1f}",
                           "high": f"{100 * share.high:.1f}"})  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    for file, table in ((TRIALS, rows), (IMPORTANCE, shares)):
        with (FOLDER / file).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in table for key in row)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def read_record(file: str = TRIALS) -> list[Trial]:
    """Rows of a table."""
    with (FOLDER / file).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def is_gated(trial: Trial) -> bool:
    """Whether the states of a trial's cell are gated."""
    if trial["cell"] == "reciprocal":
        return trial["rgc_gate_kernel_size"] != "0" and trial["gating"] == "True"
    return trial["cell"] in GATED


def _percent(share: str) -> str:
    return f"{100 * float(share):.1f}"


def counts(trials: Sequence[Trial]) -> dict[str, int]:
    """Trials by what became of them."""
    return {state: sum(t["state"] == state for t in trials) for state in ("complete", "pruned", "passed over", "fail", "repeated")}


def best_within(trials: Sequence[Trial], gmac: float) -> float:
    """The best accuracy, in percent, of the trials whose training fits into that many multiply-adds, in the order of their numbers."""
    spent, best = 0.0, 0.0
    for trial in trials:
        spent += float(trial["training_gmac"])
        if spent > gmac:
            break
        if trial["state"] == "complete":
            best = max(best, 100 * float(trial["correct"]))
    return best


def cross(trials: Sequence[Trial]) -> dict[tuple[bool, bool], tuple[int, int, float, float, float]]:
    """(gated, bypass) -> trials that count, those completed, mean accuracy of the completed with half its 95% interval, the best (%)."""
    from rnndyn_fast.search.importance import mean_estimate

    table = {}
    for gated in (False, True):
        for bypass in (False, True):
            mine = [
                t for t in trials if t["state"] in ("complete", "pruned") and is_gated(t) is gated and (t["bypass"] == "True") is bypass
            ]
            values = [100 * float(t["correct"]) for t in mine if t["state"] == "complete"]
            mean = mean_estimate(values)
            table[gated, bypass] = (len(mine), len(values), mean.value, mean.high - mean.value, max(values, default=float("nan")))
    return table


def extrapolated(curve: np.ndarray, epoch: int) -> float:  # [k]
    """The value at an epoch of the power law ``a - b k^-c`` through the first ones (least squares; c from 0.1 to 3)."""
    k = np.arange(1, len(curve) + 1.0)
    fits = []
    for c in np.linspace(0.1, 3, 30):
        design = np.stack([np.ones_like(k), -(k**-c)], 1)
        found, *_ = np.linalg.lstsq(design, curve, rcond=None)
        fits.append((float(np.square(design @ found - curve).sum()), float(found[0] - found[1] * epoch**-c)))
    return min(fits)[1]


def epochs_as_proxies(trials: Sequence[Trial]) -> dict[str, Any]:
    """Rank correlations of the last epoch with earlier ones, and with what a power law makes of those; completed trials."""
    from rnndyn_fast.search.proxies import rank_correlations

    done = [np.array(t["curve"].split(), float) for t in trials if t["state"] == "complete"]
    curves = np.stack([curve for curve in done if len(curve) == max(map(len, done))])
    last = curves.shape[1]
    values = {f"epoch {k}": curves[:, k - 1] for k in range(1, last)}
    values[f"power law through {last - 1} epochs"] = np.array([extrapolated(curve[:-1], last) for curve in curves])
    return {"trials": len(curves), **{name: rank_correlations(value, curves[:, -1], 2000)[0] for name, value in values.items()}}


def page_lines() -> list[str]:
    """What docs/search.md says of the record, as lines of Markdown."""
    trials = read_record()
    searches = {name: [t for t in trials if t["search"] == name] for name in dict.fromkeys(t["search"] for t in trials)}
    cost = {name: sum(float(t["training_gmac"]) for t in mine) for name, mine in searches.items()}
    lines = ["| search | complete | pruned | lost with a worker | training (10^12 multiply-adds) | best (%) | best at equal cost (%) |",
             "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name, mine in searches.items():
        n, best = counts(mine), [best_within(mine, most) for most in (np.inf, min(cost.values()))]
        lines.append(
            f"| {name} | {n['complete']} | {n['pruned']} | {n['fail']} | {cost[name] / 1000:.2f} | {best[0]:.1f} | {best[1]:.1f} |"
        )
    lines += ["", "| all trials | that count | completed | mean of the completed (%) | best (%) |", "|---|---:|---:|---:|---:|"]
    for (gated, bypass), (count, done, mean, half, best_of) in cross(trials).items():
        what = f"{'gated' if gated else 'not gated'}, {'bypass' if bypass else 'no bypass'}"
        lines.append(f"| {what} | {count} | {done} | {mean:.1f} \u00b1 {half:.1f} | {best_of:.1f} |")
    by_norm = {
        norm: [100 * float(t["correct"]) for t in trials if t["state"] == "complete" and t["norm"] == norm] for norm in ("layer", "group")
    }
    lines += ["", " and ".join(f"{np.mean(values):.1f}% with {norm} norm ({len(values)} trials)" for norm, values in by_norm.items()) + "."]
    shares = [row for row in read_record(IMPORTANCE) if row["search"] == next(iter(searches))]
    lines += ["", "| choice | share of the variance (%) | 95% interval |", "|---|---:|---:|"]
    lines += [f"| `{row['choice']}` | {row['share']} | {row['low']} to {row['high']} |" for row in shares[:6]]
    mine = [row for row in shares[6:] if row["choice"] in ("bypass", "gating", "cell")]
    lines += [f"| `{row['choice']}` | {row['share']} | {row['low']} to {row['high']} |" for row in mine]
    lines += ["", "| network | parameters | validation (%) | test, t = 0 (%) | test, last step (%) |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row['network']} | {int(row['parameters']):,} | {_percent(row['validation'])} | {_percent(row['test_first'])} | "
        f"{_percent(row['test_last'])} |"
        for row in read_record(NETWORKS)
    ]
    proxies = epochs_as_proxies(trials)
    head = f"| {proxies.pop('trials')} completed trials, ranked by | Spearman's rho with the last epoch | 95% interval |"
    lines += ["", head, "|---|---:|---:|"]
    lines += [f"| {name} | {rho.value:.2f} | {rho.low:.2f} to {rho.high:.2f} |" for name, rho in proxies.items()]
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("searches", nargs="*", help="name=folder")
    given = dict(word.split("=", 1) for word in parser.parse_args().searches)
    if given:
        write_record({name: Path(folder) for name, folder in given.items()})
    print("\n".join(page_lines()))
