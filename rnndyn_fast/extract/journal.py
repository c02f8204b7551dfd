"""What an unfinished extraction has on disk: a folder ``<out>.partial`` that always holds a state to continue from.

::

    manifest.json    what is being computed (options, checkpoint, images, versions): only the same is gone on with
    shard_0003.pt    the reducers of a shard after its first `done` blocks: replaced as a whole, so never half of one
    part_000012.bin  trajectories of a block, where they are kept
    .*               files being written, which a killed process leaves behind; removed at the next start

A block counts once its shard's file says so: reducers and the number of blocks they hold are one file, so nothing is counted twice.
Parts of blocks that do not count yet are written again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rnndyn_fast.file_io import write_text, written_whole

_DONE = ".done"


class Journal:
    """The folder of an unfinished extraction.

    Args:
        out: the file that it is to become.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.resumed = False

    @property
    def exists(self) -> bool:
        """Whether there is something to go on with."""
        return (self.folder / "manifest.json").exists()

    def open(self, manifest: Mapping[str, Any], overwrite: bool) -> None:
        """Go on with what is there, or begin.

        Raises:
            ValueError: the folder holds an extraction of something else, and `overwrite` is False.
        """
        wanted = json.loads(json.dumps(dict(manifest)))
        _remove_finished(self.folder)
        if self.exists:
            found = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            if found == wanted:
                self.resumed = True
                for leftover in self.folder.glob(".*"):
                    leftover.unlink()
                return
            if not overwrite:
                raise ValueError(
                    f"out: {self.folder} holds unfinished work of another kind ({_difference(found, wanted)}); go on with "
                    f"the same options, or pass overwrite=True (--overwrite) to begin anew"
                )
        if self.folder.exists():
            self._discard()
        write_text(self.folder / "manifest.json", json.dumps(wanted, indent=2))

    def load_shard(self, shard: int) -> dict[str, Any] | None:
        """What `save_shard` last wrote, or None. Raises ValueError where it cannot be read."""
        path = self._shard(shard)
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: damaged ({error}); delete it to compute its images again") from error

    def save_shard(self, shard: int, state: Mapping[str, Any]) -> None:
        """Replace a shard's state."""
        with written_whole(self._shard(shard)) as file:
            torch.save(dict(state), file)

    def part(self, block: int) -> Path:
        """The file of a block's trajectories."""
        return self.folder / f"part_{block:06d}.bin"

    def unfinished(self, name: str) -> Path:
        """A file that is to leave the folder when it is complete."""
        return self.folder / name

    def close_if_empty(self) -> None:
        """Nothing counts yet: leave nothing behind."""
        if self.exists and not any(self.folder.glob("shard_*.pt")):
            self._discard()

    def close(self) -> None:
        """All is done: remove the folder."""
        self._discard()

    def _shard(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:04d}.pt"

    def _discard(self) -> None:
        # Under another name first: a folder that is half removed must not look like one to go on with.
        done = self.folder.with_name(self.folder.name + _DONE)
        self.folder.rename(done)
        shutil.rmtree(done)


def _remove_finished(folder: Path) -> None:
    done = folder.with_name(folder.name + _DONE)
    if done.exists():
        shutil.rmtree(done)


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """The first entries that differ, in words."""
    words = []
    for name in {**found, **wanted}:
        mine, theirs = found.get(name), wanted.get(name)
        if mine == theirs:
            continue
        if isinstance(mine, dict) and isinstance(theirs, dict):
            words.append(_difference(mine, theirs, f"{prefix}{name}."))
        else:
            words.append(f"{prefix}{name}: {_short(mine)}, now {_short(theirs)}")
    return "; ".join(words[:3])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
