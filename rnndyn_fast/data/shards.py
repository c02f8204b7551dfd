"""Images in tar shards (WebDataset), for storage that reads long files faster than places in one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from rnndyn_fast.data.hdf5 import ImageFile
from rnndyn_fast.file_io import replaced_atomically, write_text
from rnndyn_fast.optional import require

INDEX = "shards.json"


def write_shards(data: ImageFile, split: str, folder: str | os.PathLike[str], images_per_shard: int = 1000) -> Path:
    """Write a split as tar files of ``<number>.npy`` (uint8 [H, W, 3]) and ``<number>.cls`` (the label), and ``shards.json`` beside them.

    Args:
        data: the image file.
        split: its split.
        folder: where ``<split>-000000.tar``, ... go; made where it is not there.
        images_per_shard: at least 1.

    Returns: the path of ``shards.json``, which says what is in them, and is written last.

    Raises: ImportError: webdataset is not installed; ValueError: no such split, or fewer than one image per shard; FileExistsError:
    the split is there already.
    """
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard: expected at least 1, got {images_per_shard}")
    library, source, folder = _import_webdataset(), data.split(split), Path(folder)
    index = read_index(folder) if (folder / INDEX).exists() else {}
    if split in index:
        raise FileExistsError(f"folder: {folder} holds shards of {split} already")
    shards: list[dict[str, Any]] = []
    for start in range(0, len(source), images_per_shard):
        path = folder / f"{split}-{len(shards):06}.tar"
        stop = min(start + images_per_shard, len(source))
        with replaced_atomically(path) as unfinished, library.TarWriter(str(unfinished)) as writer:
            images, labels = source.read(slice(start, stop))
            for number, image, label in zip(range(start, stop), images, labels.tolist(), strict=True):
                writer.write({"__key__": f"{number:09}", "npy": image.permute(1, 2, 0).numpy(), "cls": label})
        shards.append({"name": path.name, "images": stop - start})
    index[split] = {
        "shards": shards, "categories": list(data.categories), "image_size": data.image_size,
        "mean": data.mean.tolist(), "std": data.std.tolist(),
    }  # fmt: skip
    return write_text(folder / INDEX, json.dumps(index, indent=1))


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``shards.json`` says by split. Raises FileNotFoundError or ValueError."""
    path = Path(folder) / INDEX
    if not path.exists():
        raise FileNotFoundError(f"folder: no {INDEX} in {folder}")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return found


class ShardLoader:
    """Batches (images uint8 [N, 3, H, W], labels int64 [N]) of the shards of a split.

    Every process takes every `count`-th shard, and of those every worker its share, so that no image is read twice or left out. In
    each, shards and then images, in a buffer of `buffer`, are shuffled by (seed, epoch). Unlike those of `BatchLoader`, batches are others
    with another number of processes or workers: it is for training loops of one's own.

    Args:
        folder: of `write_shards`.
        split: its split.
        batch_size: images of a batch of this process; a worker's last one may be smaller.
        shuffle: whether to.
        seed: of the order, with the epoch.
        buffer: images among which the next one is drawn.
        workers: processes that read; 0: none.
        rank, count: which of how many processes this one is.

    Raises: ImportError: webdataset is not installed; ValueError: no such split, or fewer shards than processes or workers.

    Deterministic: yes. Memory: `buffer` images and a few batches per worker.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer: int = 1000,
        workers: int = 0,
        rank: int = 0,
        count: int = 1,
    ) -> None:
        self._library = _import_webdataset()
        index = read_index(folder)
        if split not in index:
            raise ValueError(f"split: {folder} holds no shards of {split!r}; it has {list(index)}")
        self.description: dict[str, Any] = index[split]
        self.shards = self.description["shards"][rank::count]
        if len(self.shards) < max(1, workers):
            wanted = f"one for each of {max(1, workers)} workers of {count} processes"
            raise ValueError(f"split: {split} has {len(self.description['shards'])} shards; expected {wanted}")
        self.folder, self.batch_size, self.shuffle, self.seed = Path(folder), batch_size, shuffle, seed
        self.buffer, self.workers, self.epoch = buffer, workers, 0

    @property
    def images(self) -> int:
        """Images of this process in an epoch."""
        return sum(shard["images"] for shard in self.shards)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the iterations that begin from now on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        library = self._library
        paths = np.array([str(self.folder / shard["name"]) for shard in self.shards])
        seed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0])
        if self.shuffle:
            paths = np.random.default_rng(seed).permutation(paths)
        stages: list[Any] = [library.SimpleShardList(paths.tolist()), library.split_by_worker, library.tarfile_to_samples()]
        if self.shuffle:
            stages.append(library.detshuffle(self.buffer, seed=seed))
        stages += [library.decode(), library.to_tuple("npy", "cls"), library.batched(self.batch_size, collation_fn=_batch)]
        pipeline = library.DataPipeline(*stages)
        if not self.workers:
            return iter(pipeline)
        return iter(torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=self.workers, multiprocessing_context="forkserver"))


def _batch(samples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(np.stack([image for image, _ in samples])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for _, label in samples])


def _import_webdataset() -> ModuleType:
    require("webdataset")
    import webdataset

    found: ModuleType = webdataset
    return found
