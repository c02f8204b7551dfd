"""Where a report comes from, how to say so in a paper, and whom to cite."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rnndyn_fast.analysis.claims import KEPT_CHANGE, METHOD, MIN_CHANGE, MIN_EFFECT, MIN_ORDER, MIN_SAMPLES
from rnndyn_fast.report.page import Cell, Page
from rnndyn_fast.train.checkpoint import versions

BIBTEX = """\
@inproceedings{thorat2023characterising,
  title     = {Characterising representation dynamics in recurrent neural networks for object recognition},
  author    = {Thorat, Sushrut and Doerig, Adrien and Kietzmann, Tim C.},
  booktitle = {Conference on Cognitive Computational Neuroscience},
  year      = {2023},
  note      = {arXiv:2308.12435}
}
@article{holm1979simple,
  title   = {A simple sequentially rejective multiple test procedure},
  author  = {Holm, Sture},
  journal = {Scandinavian Journal of Statistics},
  volume  = {6},
  pages   = {65--70},
  year    = {1979}
}
@software{rnndyn_fast,
  title   = {rnndyn\\_fast: fast convolutional recurrent networks and the analysis of their representation dynamics},
  version = {%(version)s},
  note    = {commit %(commit)s},
  year    = {%(year)s}
}
"""


def commit() -> str:
    """The commit of the package where it runs from a checkout, marked where files differ from it; else "none (installed)"."""
    folder = Path(__file__).resolve().parents[1]
    try:
        words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", str(Path(__file__).resolve())]
        subprocess.run(tracked, capture_output=True, timeout=20, check=True)
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none (installed)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return "; ".join([f"{name}, {os.cpu_count()} threads", *gpus])


def provenance_section(page: Page, facts: Mapping[str, Any], commands: Sequence[str], replicates: int) -> None:
    """Date, commit, versions, hardware, seeds and commands; a methods paragraph and BibTeX to paste."""
    section = page.section("Provenance, methods and references")
    now = datetime.now(UTC)
    known = {name: str(value) for name, value in versions().items()} | {"numpy": np.__version__}
    rows: list[list[Cell]] = [
        ["date", now.strftime("%Y-%m-%d %H:%M UTC")],
        ["commit", commit()],
        ["versions", ", ".join(f"{name} {value}" for name, value in known.items())],
        ["hardware of this report", _processor()],
    ]
    rows += [[name, str(value)] for name, value in facts.items()]
    section.table(["what", "value"], rows, "Where the numbers of this report come from.")
    if commands:
        section.text("The commands that give these numbers:")
        section.commands(commands)
    section.text("Methods, to be pasted:")
    section.code(methods(replicates, known["rnndyn_fast"]))
    section.text("References (BibTeX), to be pasted:")
    section.code(BIBTEX % {"version": known["rnndyn_fast"], "commit": commit(), "year": now.year})


def methods(replicates: int, version: str) -> str:
    """A methods paragraph."""
    return (
        "Trajectories of representations were analysed with rnndyn_fast "
        f"{version}, following Thorat et al. (2023). A trajectory is stable-correct if the network's prediction reaches the label at some "
        "time step, never leaves it, and did not visit it before. Intervals are 95% intervals from a bootstrap over images "
        f"({replicates:,} replicates, Poisson weights that all networks share); where several networks (seeds) of a kind were trained, the "
        "variance between networks was added and degrees of freedom were approximated after Satterthwaite. "
        f"{METHOD} Bounds: change in the last step, and change more than the untrained network's, {MIN_CHANGE:g} of the norm; share of a "
        f"step's change kept in the next, {KEPT_CHANGE:g}; departure from shuffled steps, {MIN_ORDER:g}; differences of norm and cosine, "
        f"{MIN_EFFECT:g} standard deviations between images. The first transition (onset of recurrence) was left out of all measures of "
        "change. Differences between stable and not-yet-stable images were taken as published, within classes, within readout zones, and "
        "within images (after minus before stabilisation, each step relative to images stable from the start in the same zone at the same "
        f"step). No verdict was given on fewer than {MIN_SAMPLES} images."
    )
