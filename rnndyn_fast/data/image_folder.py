"""Which image files there are: a folder per class, or a table of files; what is left out is counted, and what is missing an error."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rnndyn_fast.data.image_files import SUFFIXES
from rnndyn_fast.file_io import reads

FETCH = "git annex get, datalad get or the original data would fetch them"


@dataclass(eq=False)
class Listing:
    """Image files with their labels.

    Attributes:
        root: the folder that names are relative to.
        names: of the files, "cat/3.png".
        labels: int64 [n].
        class_names: of the labels.
        splits: the split of each file, where the table or the folders say one; else empty.
        left_out: why files were not taken -> how many.
    """

    root: Path
    names: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    splits: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """How many images of how many files, and why the others were not taken."""
        total = len(self.names) + sum(self.left_out.values())
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in sorted(self.left_out.items()))
        return f"{self.root}: {len(self.names):,} images of {total:,} files" + (f"; left out: {reasons}" if reasons else "")


def list_folder(root: str | os.PathLike[str], class_names: Sequence[str] | None = None) -> Listing:
    """Image files in a folder per class, as torchvision's ImageFolder finds them: classes and files in alphabetical order.

    Linked folders are entered (each once in a chain, so that a link to a folder above ends). Hidden files and folders, at any depth, and
    files of other suffixes are left out and counted.

    Args:
        root: the folder.
        class_names: the folders that there may be and the order of their labels; None: those there are.

    Raises:
        FileNotFoundError: image files that are broken links, with their number (unfetched git-annex or datalad files are such links).
        ValueError: no class folders, no images, or other classes than `class_names`.
    """
    root = Path(root)
    left_out: Counter[str] = Counter()
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    found = []
    for entry in entries:
        if entry.name.startswith("."):
            left_out["hidden"] += _count(Path(entry.path))
        elif entry.is_dir():
            found.append(entry.name)
        elif entry.is_symlink() and not os.path.exists(entry.path) and Path(entry.name).suffix == "":
            raise FileNotFoundError(f"data: {entry.path} is a broken link to {os.readlink(entry.path)}; {FETCH}")
        else:
            left_out["beside the class folders"] += 1
    classes = tuple(found if class_names is None else class_names)
    if not found:
        raise ValueError(f"data: expected a folder per class in {root}, found none")
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise ValueError(f"data: {root / unknown[0]} is none of the {len(classes)} categories of the network")
    names: list[str] = []
    labels: list[int] = []
    for name in found:
        files = sorted(_walk(root, name, left_out, ()))
        names += files
        labels += [classes.index(name)] * len(files)
    _refuse_broken(root, root, names)
    listing = Listing(root, names, np.array(labels, np.int64), classes, left_out=left_out)
    if not names:
        raise ValueError(f"data: expected image files ({', '.join(SUFFIXES)}) in the class folders; {listing}")
    return listing


def _walk(root: Path, folder: str, left_out: Counter[str], above: tuple[tuple[int, int], ...]) -> list[str]:
    """Image files below a folder, relative to the root."""
    found: list[str] = []
    stat = os.stat(root / folder)
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        left_out["links to a folder above them"] += 1
        return found
    for entry in os.scandir(root / folder):
        name = f"{folder}/{entry.name}"
        if entry.name.startswith("."):
            left_out["hidden"] += _count(Path(entry.path))
        elif entry.is_dir():
            found += _walk(root, name, left_out, (*above, here))
        elif Path(entry.name).suffix.lower() not in SUFFIXES:
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise FileNotFoundError(f"data: {entry.path} is a broken link to {os.readlink(entry.path)}; {FETCH}")
            left_out[f"no images ({Path(entry.name).suffix.lower() or 'no suffix'})"] += 1
        else:
            found.append(name)
    return found


def _count(path: Path) -> int:
    """Files at or below a path, links not followed."""
    if path.is_symlink() or not path.is_dir():
        return 1
    return sum(len(files) for _, _, files in os.walk(path))


def _refuse_broken(source: Path, root: Path, names: Sequence[str]) -> None:
    broken = [name for name in names if not (root / name).exists()]
    if broken:
        first = root / broken[0]
        what = (
            f"are broken links (the first: {first} to {os.readlink(first)})"
            if first.is_symlink()
            else f"are not there (the first: {first})"
        )
        raise FileNotFoundError(f"data: {len(broken):,} of {len(names):,} image files of {source} {what}; {FETCH}")


@reads("table of image files (CSV)")
def list_table(path: str | os.PathLike[str]) -> Listing:
    """Image files of a CSV with the columns ``path`` (relative to the table's folder), ``label`` (a name) and perhaps ``split``.

    Classes are in alphabetical order, or in that of numbers where all are numbers. Other columns have no effect.

    Raises:
        FileNotFoundError: files that are not there, with their number.
        ValueError: no such columns, or one twice; an empty or repeated path, an empty label, more cells than columns, or no rows; names the
            line.
    """
    path = Path(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            missing = [name for name in ("path", "label") if name not in columns]
            if missing:
                raise ValueError(f"source: {path}: expected the columns path and label (and split), got {', '.join(columns) or 'none'}")
            twice = next((name for name in ("path", "label", "split") if columns.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"source: {path}: expected one column {twice}, got {columns.count(twice)}")
            rows = [
                (reader.line_num, {k: (v or "").strip() for k, v in row.items() if isinstance(k, str)}, list(row.get(None) or ()))
                for row in reader
            ]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"source: {path}: expected a table in UTF-8 with commas: {error}") from error
    if not rows:
        raise ValueError(f"source: {path}: expected a row per image, got none")
    seen: dict[str, int] = {}
    for line, row, more in rows:
        if any(cell.strip() for cell in more):
            raise ValueError(
                f"source: {path}, line {line}: expected {len(columns)} cells, got {len(columns) + len(more)}; quote a text that has commas"
            )
        for name in ("path", "label", *(("split",) if "split" in columns else ())):
            if not row[name]:
                raise ValueError(f"source: {path}, line {line}: {name} is empty")
        file_path = os.path.normpath(path.parent / row["path"])
        if file_path in seen:
            raise ValueError(f"source: {path}, line {line}: {row['path']} is in line {seen[file_path]} too")
        seen[file_path] = line
    names = [row["path"] for _, row, _ in rows]
    labels = [row["label"] for _, row, _ in rows]
    numbers = all(label.isdecimal() for label in labels)
    classes = tuple(sorted(set(labels), key=(lambda label: (int(label), label)) if numbers else None))
    root = path.parent
    _refuse_broken(path, root, names)
    index = {name: k for k, name in enumerate(classes)}
    splits = [row["split"] for _, row, _ in rows] if "split" in columns else []
    return Listing(root, names, np.array([index[label] for label in labels], np.int64), classes, splits)
