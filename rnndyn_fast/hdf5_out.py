"""Writing HDF5 files where a disk may be full: HDF5 itself does not survive a write that fails (it crashes at exit)."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rnndyn_fast.optional import require

if TYPE_CHECKING:
    import h5py


class Patient(io.RawIOBase):
    """A file that never tells HDF5 of an error: it keeps the first one, and forgets what is written from then on."""

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._file = path.open("w+b", buffering=0)

    def check(self) -> None:
        """Raise the error that was kept, if there is one; for those who write for long."""
        if self.error is not None:
            raise self.error

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and (count := self._file.readinto(view[done:])):
            done += count
        view[done:] = bytes(len(view) - done)
        return len(view)

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        view, done = memoryview(data).cast("B"), 0
        try:
            while self.error is None and done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self.error = error
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()
        super().close()


def checked(value: Any) -> dict[str, Any]:
    """Options of ``create_dataset`` by which HDF5 refuses an array whose bytes have changed (it stores a sum of each chunk)."""
    return {"fletcher32": True} if np.ndim(value) and np.size(value) and np.asarray(value).dtype.kind in "iufb" else {}


@contextmanager
def hdf5_out(path: str | os.PathLike[str]) -> Iterator[tuple[h5py.File, Patient]]:
    """A new HDF5 file to write into, and below it the file whose ``error`` long writers look at.

    Raises:
        OSError: it could not be written.
    """
    require("h5py")
    import h5py

    patient = Patient(Path(path))
    try:
        with h5py.File(patient, "w") as file:
            yield file, patient
        patient.check()
    finally:
        patient.close()
