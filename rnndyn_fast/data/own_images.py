"""An HDF5 image file from images of one's own: class folders, or a table of files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rnndyn_fast.data.hdf5 import SPLITS
from rnndyn_fast.data.image_files import BACKGROUNDS, FITS, fit, read_image
from rnndyn_fast.data.image_folder import Listing, list_folder, list_table
from rnndyn_fast.data.sources import stratified_order
from rnndyn_fast.file_io import replaced_atomically, written_whole
from rnndyn_fast.hdf5_out import Patient, checked, hdf5_out
from rnndyn_fast.optional import require
from rnndyn_fast.suggestions import check_choice

if TYPE_CHECKING:
    import h5py

    from rnndyn_fast.extract.journal import Journal

Progress = Callable[[str, int, int], None]

SPELLINGS = {**{name: name for name in SPLITS}, "valid": "val", "validation": "val", "training": "train", "testing": "test"}
SHARE = 10  # val and test are one in that many, unless said otherwise
_BLOCK_PIXELS = 2**21


def list_own(source: str | os.PathLike[str]) -> Listing:
    """Image files of a folder or a table, with their splits where the table or folders (train/cat/1.png) say them.

    Raises what :func:`list_folder` and :func:`list_table` raise; ``ValueError`` for splits that are none, or classes that train lacks.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"source: no such folder or table: {path}")
    if not path.is_dir():
        if path.suffix.lower() != ".csv":
            raise ValueError(f"source: expected a folder or a table (.csv) of image files, got {path}")
        listing = list_table(path)
    else:
        folders = [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]
        if not any(SPELLINGS.get(name) == "train" for name in folders):
            return list_folder(path)
        listing = _of_splits(path, sorted(folders))
    if listing.splits:
        unknown = [name for name in listing.splits if name.lower() not in SPELLINGS]
        if unknown:
            raise ValueError(f"source: {path}: expected splits named {', '.join(SPLITS)}, got {unknown[0]!r}")
        listing.splits = [SPELLINGS[name.lower()] for name in listing.splits]
        if "train" not in listing.splits:
            raise ValueError(f"source: {path}: expected images of the split train, got {', '.join(sorted(set(listing.splits)))}")
    return listing


def _of_splits(root: Path, folders: list[str]) -> Listing:
    """A folder with a folder per split, and in each a folder per class."""
    others = [name for name in folders if name not in SPELLINGS]
    if others:
        raise ValueError(f"source: {root}: expected folders of splits ({', '.join(SPLITS)}) or of classes, got train beside {others[0]}")
    parts = {name: list_folder(root / name) for name in folders}
    classes = next(part.class_names for name, part in parts.items() if SPELLINGS[name] == "train")
    names, labels, splits = list[str](), list[int](), list[str]()
    whole = Listing(root, names, np.empty(0, np.int64), classes)
    for name, part in parts.items():
        absent = [one for one in part.class_names if one not in classes]
        if absent:
            raise ValueError(f"source: {root / name / absent[0]} is a class that the training images do not have")
        names += [f"{name}/{file}" for file in part.names]
        labels += [classes.index(part.class_names[label]) for label in part.labels]
        splits += [name] * len(part.names)
        whole.left_out.update(part.left_out)
    whole.labels, whole.splits = np.array(labels, np.int64), splits
    return whole


def divide(listing: Listing, wanted: Mapping[str, int | None], seed: int) -> tuple[dict[str, np.ndarray], str]:
    """Rows of every split, in stratified order, and how they came about, in words.

    Splits that the source says are taken as they are. Others are drawn with the seed, each class in proportion: val and, where no split is
    said at all, test are a tenth of the images unless `wanted` says how many; train is the rest.
    """
    rng = np.random.default_rng([seed, 4])
    given = np.array(listing.splits, dtype=object)
    rows: dict[str, np.ndarray] = {}
    said = sorted(set(listing.splits), key=SPLITS.index)
    for name in said:
        rows[name] = np.flatnonzero(given == name)
    note = f"splits {', '.join(said)} as the source says" if said else ""
    left = rows.pop("train") if said else np.arange(len(listing.names))
    left = left[stratified_order(listing.labels[left], rng)]
    drawn = []
    for name in ("val",) if said else ("val", "test"):
        if name in rows:
            continue
        asked = wanted.get(name)
        count = max(1, (len(listing.names) if not said else len(left)) // SHARE) if asked is None else asked
        if count >= len(left):
            raise ValueError(f"num_{name}: expected fewer images than the {len(left)} there are to divide, got {count}")
        rows[name], left = left[:count], left[count:]
        drawn.append(f"{name} {count:,}")
    most = wanted.get("train")
    if most is not None and most > len(left):
        raise ValueError(f"num_train: expected at most {len(left)} images, those that are left, got {most}")
    rows["train"] = left if most is None else left[:most]
    if drawn:
        words = f"{', '.join(drawn)} drawn from the others with seed {seed}, each class in proportion"
        note = f"{note}; {words}" if note else words
    absent = np.setdiff1d(np.arange(len(listing.class_names)), listing.labels[rows["train"]])
    if len(absent):
        raise ValueError(f"source: no training image of class {listing.class_names[absent[0]]!r}; it needs more images")
    return {name: rows[name] for name in SPLITS if name in rows}, note


def make_from_files(
    out: Path, source: str | os.PathLike[str], *, size: int, fit: str, background: str, seed: int, wanted: Mapping[str, int | None],
    overwrite: bool, progress: Progress | None,
) -> Path:  # fmt: skip
    """What ``make_dataset`` does with images of one's own.

    Interrupted and called again with the same arguments it goes on: blocks of images that are done lie in ``<out>.partial``.
    """
    from rnndyn_fast.extract.journal import Journal

    check_choice("fit", fit, FITS)
    check_choice("background", background, tuple(BACKGROUNDS))
    listing = list_own(source)
    rows, note = divide(listing, wanted, seed)
    manifest = made_from(listing, size=size, fit=fit, background=background, seed=seed, wanted=wanted)
    journal = Journal(out)
    journal.open(manifest, overwrite)
    block = max(1, _BLOCK_PIXELS // size**2)
    try:
        _read_blocks(journal, listing, rows, block, size, fit, background, progress)
    except BaseException:
        if not any(journal.folder.glob("*.npy")):
            journal.close()  # nothing to go on from
        raise
    note = f"{listing}; {note}"
    with replaced_atomically(out) as unfinished, hdf5_out(unfinished) as (file, below):
        for split, here in rows.items():
            parts = (np.load(journal.unfinished(f"{split}_{start:09d}.npy")) for start in range(0, len(here), block))
            _write_split(file, below, split, listing, here, size, parts)
        file.create_dataset("categories", data=np.array([name.encode() for name in listing.class_names]))
        parameters = {**{f"num_{name}": len(here) for name, here in rows.items()}, "fit": fit, "background": background}
        file.attrs.update({"source": str(source), "source_note": note, "seed": seed, "size": size, "parameters": json.dumps(parameters)})
        file.attrs["made_from"] = json.dumps(manifest, sort_keys=True)
    journal.close()
    return out


def _read_blocks(
    journal: Journal, listing: Listing, rows: Mapping[str, np.ndarray], block: int, size: int, how: str, background: str,
    progress: Progress | None,
) -> None:  # fmt: skip
    """Read, resize and keep the images of every block that is not done."""
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:

        def one(row: int) -> np.ndarray:
            return fit(read_image(listing.root / listing.names[row], background), size, how, background)

        for split, here in rows.items():
            for start in range(0, len(here), block):
                part = journal.unfinished(f"{split}_{start:09d}.npy")
                if not part.exists():
                    pixels = np.stack(list(pool.map(one, here[start : start + block])))
                    with written_whole(part) as file:
                        np.save(file, pixels)
                if progress is not None:
                    progress(split, min(start + block, len(here)), len(here))


def made_from(listing: Listing, *, size: int, fit: str, background: str, seed: int, wanted: Mapping[str, int | None]) -> dict[str, Any]:
    """What makes the file what it is: the files by name, size and time, their labels and splits, and the options."""
    digest = hashlib.sha256()
    for k, name in enumerate(listing.names):
        stat = (listing.root / name).stat()
        split = listing.splits[k] if listing.splits else ""
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0{listing.class_names[listing.labels[k]]}\0{split}\n".encode())
    options = {"size": size, "fit": fit, "background": background, "seed": seed, **{f"num_{name}": n for name, n in wanted.items()}}
    return {"files": digest.hexdigest(), "images": len(listing.names), **options}


def _write_split(
    file: h5py.File, below: Patient, split: str, listing: Listing, rows: np.ndarray, size: int, parts: Iterator[np.ndarray]
) -> None:
    group = file.create_group(split)
    group.create_dataset("labels", data=listing.labels[rows], **checked(rows))
    group.create_dataset("source_index", data=rows, **checked(rows))
    group.create_dataset("source_name", data=np.array([listing.names[row].encode() for row in rows]))
    chunk = min(len(rows), max(1, 2**15 // (3 * size**2)))
    data = group.create_dataset(
        "data", shape=(len(rows), size, size, 3), dtype=np.uint8, chunks=(chunk, size, size, 3), compression="gzip", compression_opts=1
    )
    total, squares, start = np.zeros(3, np.int64), np.zeros(3, np.int64), 0
    for pixels in parts:
        below.check()
        data[start : start + len(pixels)] = pixels
        start += len(pixels)
        total += pixels.sum((0, 1, 2), dtype=np.int64)
        squares += np.square(pixels, dtype=np.int64).sum((0, 1, 2))
    if split == "train":
        count = len(rows) * size**2
        variance = [(int(q) * count - int(s) ** 2) / count**2 for s, q in zip(total, squares, strict=True)]  # (integers: exact)
        if min(variance) <= 0:
            raise ValueError("source: the training images are all of one colour in a channel; they cannot be normalised")
        file.create_dataset("train_img_mean_channels", data=total / count)
        file.create_dataset("train_img_std_channels", data=np.sqrt(variance))


def images_for_training(
    data: str | os.PathLike[str], out: Path, size: int, overwrite: bool, progress: Progress | None = None
) -> tuple[Path, str]:
    """The HDF5 file to train on, and a word on it: `data` itself, or for a folder or table ``<out>_images.h5``, made of it once.

    Raises ``ValueError`` where that file was made from other images or in another size and `overwrite` is False.
    """
    path = Path(data)
    if not path.is_dir() and path.suffix.lower() != ".csv":
        return path, ""
    require("h5py")
    import h5py

    made = out.with_name(f"{out.name}_images.h5")
    options: dict[str, Any] = {"size": size, "fit": "crop", "background": "white", "seed": 0}
    wanted = dict.fromkeys(SPLITS)
    if made.exists():
        listing = list_own(path)
        with h5py.File(made, "r") as file:
            same = file.attrs.get("made_from") == json.dumps(made_from(listing, **options, wanted=wanted), sort_keys=True)
        if same:
            return made, f"{made}: images made before"
        if not overwrite:
            raise ValueError(f"data: {made} was made from other images or with other options; overwrite=True (--overwrite) makes it anew")
    make_from_files(made, path, **options, wanted=wanted, overwrite=overwrite, progress=progress)
    with h5py.File(made, "r") as file:
        return made, f"{made}: {file.attrs['source_note']}"
