"""Files are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rnndyn_fast.file_io import replaced_atomically, write_text


def test_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    with replaced_atomically(path) as temporary:
        temporary.write_text("one")
        assert (temporary.parent, temporary.suffix) == (path.parent, path.suffix)
        assert not path.exists()
    assert path.read_text() == "one"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(KeyError), replaced_atomically(path) as temporary:
        _write_and_fail(temporary)
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_write_text(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    assert write_text(path, "\u00e9") == path
    assert path.read_bytes() == b"\xc3\xa9"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_bytes() == b"\xc3\xa9"
    assert list(path.parent.iterdir()) == [path]


def _write_and_fail(path: Path) -> None:
    path.write_text("two")
    raise KeyError(path.name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
