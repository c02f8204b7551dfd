"""The commands: names and what they are for. Nothing is imported for it, so that the overview appears at once."""

from __future__ import annotations

from pathlib import Path

from rnndyn_fast.suggestions import nearest

COMMANDS: dict[str, str] = {
    "data make": "Write an HDF5 image file from images of your own or of a bundled set.",
    "data shards": "Write an HDF5 image file as tar shards (WebDataset).",
    "plan": "Print what a network computes: once, per component, per time step.",
    "train": "Train a network.",
    "report": "Write a page about a run of train, finished or not.",
    "import": "Turn weights from elsewhere (a state_dict) into a checkpoint.",
    "extract": "Stream images through a trained network into the analyses.",
    "analyse": "Write report, tables and figures of an extraction, or of anybody's trajectories.",
    "phase train": "Train a continuous-time RNN on modulo arithmetic.",
    "phase sweep": "Train a grid of continuous-time RNNs on modulo arithmetic together.",
    "phase analyse": "Analyse networks of phase train or sweep: oscillation, automaton, kind of solution.",
    "phase report": "Write a page with figures of analysed networks.",
    "react": "Reaction times by an entropy threshold: speed against accuracy, comparison with people.",
    "predict": "Fit recorded responses of neurons from the activations of model areas.",
    "search": "Search architectures: trials in a study that can be stopped and resumed.",
    "search report": "Write the report of a search, with published cells trained and analysed beside the best.",
    "search proxies": "Say how well cheaper trainings rank the architectures of a search, against full training.",
    "compare": "Train cells at equal numbers of parameters, and say which is best.",
    "doctor": "Report what runs on this machine, and the reason for what does not.",
    "study": "Train or take four kinds of networks, compare their dynamics, and write a report.",
    "demo": "A small study on real images, in minutes.",
}
# Commands of two words, by the first.
GROUPS = {"data": "Image files.", "phase": "Phase codes in continuous-time RNNs on modulo arithmetic."}
ABOUT = "Fast convolutional recurrent networks: train them, run images through them, and see how their representations move."
# Commands without options, which run without optional packages.
WITHOUT_OPTIONS = ("doctor",)
# Commands that write one file, and its name in a folder.
FILES = {
    "data make": "images.h5",
    "import": "imported.pt",
    "extract": "extraction.h5",
    "phase report": "report.html",
    "report": "training.html",
}
_FILE_SUFFIXES = (".h5", ".hdf5", ".pt", ".pth", ".npz", ".html", ".csv", ".json", ".yaml", ".png")
_HELP = ("-h", "--help")


def overview(group: str = "") -> str:
    """The text of ``rnndyn --help``, or of a group of commands."""
    shown = {name: text for name, text in COMMANDS.items() if not group or name.startswith(group + " ")}
    head = [f"usage: rnndyn {f'{group} ' if group else ''}COMMAND ...", "", GROUPS.get(group, ABOUT), "", "commands:"]
    return "\n".join(
        [
            *head,
            *(f"  {name:<15} {text}" for name, text in shown.items()),
            "",
            "options:",
            "  -h, --help      show this, or with a command its options",
            *([] if group else ["  --version       show the version"]),
            "",
            "--out names a folder in every command, made where it is missing; commands that write one file (data make, import, extract,",
            "report, phase report) take the name of a file too. RNNDYN_DEBUG=1 shows tracebacks.",
        ]
    )


def about(command: str) -> str:
    """The help of a command without options."""
    return f"usage: rnndyn {command}\n\n{COMMANDS[command]}"


def find_command(argv: list[str]) -> tuple[str, list[str]]:
    """The command that `argv` begins with, and the words after it; an empty name where it asks for an overview alone.

    Raises ``ValueError`` for a command that there is not, with the nearest.
    """
    for count in (2, 1):
        name = " ".join(argv[:count])
        if len(argv) >= count and name in COMMANDS:
            return name, argv[count:]
    if not argv or argv[0] in (*_HELP, "--version"):
        return "", argv
    group = argv[0] if argv[0] in GROUPS else ""
    if group and (len(argv) == 1 or argv[1] in _HELP):
        return "", argv
    known = [name for name in COMMANDS if name.startswith(group)]
    if group:
        raise ValueError(f"unknown command '{group} {argv[1]}'{nearest(f'{group} {argv[1]}', known)} (see rnndyn {group} --help)")
    if argv[0].startswith("-"):
        raise ValueError(f"expected a command before options, got {argv[0]} (see rnndyn --help)")
    near = nearest(argv[0], [*COMMANDS, *GROUPS])
    raise ValueError(f"unknown command '{argv[0]}'{near} (see rnndyn --help)")


def place(command: str, out: str) -> str:
    """Where a command writes: its folder, or the file that it writes in it.

    Raises ``ValueError`` where a folder is expected and a file given.
    """
    path = Path(out)
    if command in FILES:
        if path.is_file() and not path.suffix:
            raise ValueError(f"out: expected a folder, or a file ({Path(FILES[command]).suffix}), {out} is another file")
        return str(path / FILES[command]) if out.endswith("/") or path.is_dir() or not path.suffix else out
    if (path.exists() and not path.is_dir()) or path.suffix in _FILE_SUFFIXES:
        raise ValueError(f"out: expected a folder, {out} {'is a file' if path.exists() else 'is the name of a file'}")
    return out
