"""Which images tar shards (WebDataset) hold and where in them: counted once, so that an image can be read alone and in any order."""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rnndyn_fast.data.hdf5 import SPLITS
from rnndyn_fast.data.image_files import SUFFIXES
from rnndyn_fast.data.own_images import SHARE, SPELLINGS
from rnndyn_fast.data.sources import stratified_order
from rnndyn_fast.file_io import reads, written_whole
from rnndyn_fast.optional import require

Progress = Callable[[str, int, int], None]

INDEX = "index.npz"
FORMAT = "rnndyn_fast.shards/1"
KINDS = ("npy", *(suffix[1:] for suffix in SUFFIXES))
MOST_CLASSES = 100_000  # larger numbers are no labels
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BLOCK = 512  # bytes; an archive ends with at least one block of zeros


@dataclass(eq=False)
class ShardIndex:
    """Where the images of tar shards are, n of them in S files.

    Attributes:
        names: of the files; relative ones are beside the index.
        sizes: int64 [S], bytes.
        shard: int32 [n], number of the file.
        offset, length: int64 [n], bytes.
        kind: uint8 [n], number in `KINDS`.
        labels: int64 [n].
        split: uint8 [n], number in `SPLITS`.
        categories: names of the labels.
        note: what was counted, for people.
        image_size: H = W that images are brought to; 0: not known yet.
        mean, std: of the training images by channel, scale 0-255; empty: not known yet.
    """

    names: list[str]
    sizes: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    kind: np.ndarray
    labels: np.ndarray
    split: np.ndarray
    categories: list[str]
    note: str
    image_size: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    _ARRAYS = ("sizes", "shard", "offset", "length", "kind", "labels", "split")
    _WORDS = ("names", "categories", "note", "image_size", "mean", "std")

    def save(self, path: Path) -> Path:
        """Write it, atomically."""
        words = {"format": FORMAT, **{name: getattr(self, name) for name in self._WORDS}}
        with written_whole(path) as file:
            np.savez(file, words=np.array(json.dumps(words)), **{name: getattr(self, name) for name in self._ARRAYS})
        return path

    def rows(self, split: str) -> np.ndarray:
        """Numbers of the images of a split."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def files(self, beside: Path) -> list[Path]:
        """The shards; `beside` is the folder of the index."""
        return [beside / name for name in self.names]


@reads("index of tar shards")
def read_index(path: str | os.PathLike[str]) -> ShardIndex:
    """The index in a file. Raises ``ValueError`` where it is none, ``FileNotFoundError``."""
    with np.load(path, allow_pickle=False) as found:
        words = json.loads(str(found["words"]))
        if words.pop("format") != FORMAT:
            raise ValueError(f"{path} is no index of tar shards of this version; expected {FORMAT}")
        arrays = {name: found[name] for name in ShardIndex._ARRAYS}
    words |= {name: tuple(words[name]) for name in ("mean", "std")}
    return ShardIndex(**words, **arrays)


def is_shards(data: str | os.PathLike[str]) -> bool:
    """Whether a source is tar shards: their names, or a folder of them without class folders."""
    path = Path(data)
    if not path.is_dir():
        return any(part.lower().endswith((".tar", *_PACKED)) for part in os.fspath(data).split("::"))
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if any(entry.name.lower() not in SPELLINGS for entry in folders):
        return False
    return any(any(place.glob("*.tar")) for place in (path, *folders))


def find_shards(data: str | os.PathLike[str]) -> list[Path]:
    """The files: of a folder and its folders of splits, or by name, with braces (``{000..007}``), ``*``, and ``::`` between several.

    Raises: FileNotFoundError: some are not there; ValueError: packed, or not on disk.
    """
    path, text = Path(data), os.fspath(data)
    if path.is_dir():
        return sorted(file for file in (*path.glob("*.tar"), *path.glob("*/*.tar")) if not file.name.startswith("."))
    if "://" in text or text.startswith("pipe:"):
        raise ValueError(f"data: expected tar shards on disk, got {text}")
    require("webdataset")
    from webdataset.shardlists import expand_urls

    found: list[Path] = []
    for name in expand_urls(text):
        found += [Path(one) for one in (sorted(glob.glob(name)) if "*" in name or "?" in name else [name])]
    packed = [file for file in found if file.name.lower().endswith(_PACKED)]
    if packed:
        raise ValueError(f"data: {packed[0]} is packed; expected plain tar files, in which an image can be read alone")
    missing = [file for file in found if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"data: {len(missing)} of {len(found)} shards are not there (the first: {missing[0]})")
    if not found:
        raise FileNotFoundError(f"data: no file fits {text}")
    return found


def up_to_date(index: ShardIndex, beside: Path, files: Sequence[Path]) -> bool:
    """Whether an index is of these files as they are, by name and size."""
    known = [os.path.abspath(file) for file in index.files(beside)]
    return known == [os.path.abspath(file) for file in files] and [os.path.getsize(file) for file in files] == index.sizes.tolist()


def count(files: Sequence[Path], progress: Progress | None = None) -> ShardIndex:
    """Read the headers of all files, and the labels.

    The label of ``key.jpg`` is in ``key.cls``, a number or the name of a class, or else the folder of the key (``cat/0001.jpg``) is the
    class. Splits are those of file names or their folders (``train-000000.tar``, ``val/000.tar``); else all is train. Without val, a tenth
    of train becomes it, each class in proportion.

    Raises: ValueError: truncated or damaged, an image without a label or with two, no images, no training images; names the file.
    """
    parts, given = [], list[str]()
    for number, file in enumerate(files):
        places, labels = _members(file)
        parts.append(places)
        given += labels
        if progress is not None:
            progress("tar shards", number + 1, len(files))
    if not given:
        raise ValueError(f"data: no images ({', '.join(KINDS)}) in {len(files)} tar shards, of which the first is {files[0]}")
    classes, categories = _classes(given, files[0])
    shard = np.repeat(np.arange(len(files), dtype=np.int32), [len(places) for places in parts])
    split, note = _splits(files, shard, classes)
    offset, length, kind = np.concatenate(parts).T
    names, sizes = [os.path.abspath(file) for file in files], np.array([os.path.getsize(file) for file in files], np.int64)
    return ShardIndex(names, sizes, shard, offset.copy(), length.copy(), kind.astype(np.uint8), classes, split, categories, note)


def _members(path: Path) -> tuple[np.ndarray, list[str]]:
    """The images of a shard: offset, length and kind [n, 3], and their labels as they are written."""
    require("webdataset")
    from webdataset.tariterators import base_plus_ext

    images: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, str] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # (it would keep them all)
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                key, suffix = base_plus_ext(member.name)
                if not member.isreg() or key is None or os.path.basename(member.name).startswith("."):
                    continue
                suffix = suffix.lower().rpartition(".")[2]
                if suffix == "cls":
                    stream = archive.extractfile(member)
                    assert stream is not None
                    labels[key] = stream.read().decode("utf-8").strip()
                elif suffix in KINDS:
                    if key in images:
                        raise ValueError(f"{path}: two images of one key: {member.name}")
                    images[key] = (member.offset_data, member.size, KINDS.index(suffix))
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or damaged, or no tar file ({error})") from error
    if os.path.getsize(path) < end + _BLOCK:
        raise ValueError(f"{path} is truncated: the end of the archive is missing")
    found = [labels.get(key) or os.path.basename(os.path.dirname(key)) for key in images]
    if not all(found):
        key = list(images)[found.index("")]
        raise ValueError(f"{path}: {key} has no label; expected {key}.cls (a number or a name), or the class as its folder")
    return np.array(list(images.values()), np.int64).reshape(-1, 3), found


def _classes(given: list[str], first: Path) -> tuple[np.ndarray, list[str]]:
    """Labels and the names of the classes: numbers as they are, names in alphabetical order."""
    try:
        numbers = np.array([int(label) for label in given], np.int64)
    except (ValueError, OverflowError):
        names, labels = np.unique(np.array(given), return_inverse=True)
        return labels.astype(np.int64), names.tolist()
    if numbers.min() < 0 or numbers.max() >= MOST_CLASSES:
        wrong = numbers.min() if numbers.min() < 0 else numbers.max()
        raise ValueError(f"data: expected labels from 0 to {MOST_CLASSES - 1} in shards like {first}, got {wrong}")
    return numbers, [str(number) for number in range(int(numbers.max()) + 1)]


def _splits(files: Sequence[Path], shard: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, str]:
    """The split of each image, and how that came about, in words."""
    told = [_split_of(file) for file in files]
    if "train" in told:
        unknown = next((file for file, split in zip(files, told, strict=True) if split is None), None)
        if unknown is not None:
            raise ValueError(f"data: expected a split ({', '.join(SPLITS)}) in the name of every shard or of none, got {unknown}")
        of_file = [SPLITS.index(name) for name in told if name is not None]
    elif any(told):
        raise ValueError(f"data: expected shards of the split train, got {', '.join(sorted({name for name in told if name}))} alone")
    else:
        of_file = [0] * len(files)
    split = np.array(of_file, np.uint8)[shard]
    note = "splits as files are named" if "train" in told else ""
    if "val" not in told:
        train = np.flatnonzero(split == 0)
        if len(train) < 2:
            raise ValueError(f"data: expected at least 2 training images, of which one validates, got {len(train)}")
        order = stratified_order(labels[train], np.random.default_rng([0, 4]))
        split[train[order[: max(1, len(train) // SHARE)]]] = SPLITS.index("val")
        note = "; ".join(filter(None, [note, "val drawn from train with seed 0, each class in proportion"]))
    sizes = ", ".join(f"{name} {(split == k).sum():,}" for k, name in enumerate(SPLITS) if (split == k).any())
    return split, f"{len(shard):,} images in {len(files)} tar shards: {sizes} ({note})"


def _split_of(file: Path) -> str | None:
    """The split that a file is named after (imagenet-train-000017.tar), or else its folder."""
    for word in file.stem.lower().replace("_", "-").replace(".", "-").split("-"):
        if word in SPELLINGS:
            return SPELLINGS[word]
    return SPELLINGS.get(file.parent.name.lower())
