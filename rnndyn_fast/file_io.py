"""Atomic writes of files."""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast


@contextmanager
def replaced_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the same folder that takes the place of ``path`` when the block ends without an error.

    Otherwise the temporary file goes and ``path`` stays as it was. Folders that do not exist are made.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        full = space_error(error, path)
        if full is None:
            raise
        raise full from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    # Same suffix: writers of figures choose the format by it.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    return Path(name)


_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "no space left in the disk quota", errno.EFBIG: "the file grew too large"}


def space_error(error: BaseException, path: str | os.PathLike[str] | None = None) -> OSError | None:
    """An ``OSError`` that says so where an error, or what it came of, is that there was no room to write; else None.

    Args:
        error: any error; libraries wrap the system's in theirs, or give its text alone.
        path: what was being written.
    """
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        number = one.errno if isinstance(one, OSError) else None
        if number not in _FULL and ("No space left on device" in str(one) or "database or disk is full" in str(one)):
            number = errno.ENOSPC
        if number in _FULL:
            if isinstance(one, OSError) and str(one.strerror).startswith(tuple(_FULL.values())):
                return one
            where = path if path is not None else getattr(one, "filename", None)
            told = f"{_FULL[number]}: cannot write {where}" if where else _FULL[number]
            return OSError(number, f"{told}; what was complete before is kept: make room and run the same again")
        one = one.__cause__ or one.__context__
    return None


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[io.BytesIO]:
    """A file in memory that takes the place of ``path`` when the block ends without an error.

    For writers (zip archives, torch.save) that tell of a full disk in words of their own, or from a destructor. Memory: the file.
    """
    buffer = io.BytesIO()
    yield buffer
    with replaced_atomically(path) as unfinished:
        unfinished.write_bytes(buffer.getbuffer())


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` (UTF-8) to `path`, atomically; returns the path."""
    with replaced_atomically(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def reading(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Whatever goes wrong while a damaged file is read is a ``ValueError`` that names it; errors that name it themselves pass.

    Args:
        path: the file.
        what: it should be, for the message.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, NameError):
        raise
    except Exception as error:  # libraries raise nearly everything, by kind of damage
        if isinstance(error, ValueError | TypeError | OSError) and os.fspath(path) in str(error):
            raise
        other = stand_in(path) if os.path.isfile(path) else None
        if other is None and type(error) in (ValueError, TypeError) and re.match(r"[\w, ]+: ", str(error)):
            raise type(error)(f"{os.fspath(path)}: {error}") from error  # (of ours, about what is in a sound file)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{os.fspath(path)} {other or f'is damaged, or no {what} ({reason})'}") from error


Reader = TypeVar("Reader", bound=Callable[..., Any])


def reads(what: str, argument: int = 0) -> Callable[[Reader], Reader]:
    """A function that reads the file named by its argument of that number, under :func:`reading`."""

    def decorate(function: Reader) -> Reader:
        @functools.wraps(function)
        def read(*args: Any, **options: Any) -> Any:
            path = args[argument] if len(args) > argument else next(iter(options.values()), "")
            with reading(path, what):
                return function(*args, **options)

        return cast(Reader, read)

    return decorate


_ANNEX = re.compile(rb"(^|/)(\.git/)?annex/objects/")


def stand_in(path: str | os.PathLike[str]) -> str | None:
    """What a file is, in words, where it only stands in for another or is of a kind that nobody meant; None where it may be what it should.

    Looks at the first bytes: Git LFS and git-annex pointers, pages and error messages that a download left behind, empty and packed files.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "is empty (0 bytes)"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; git lfs pull fetches it"
    if _ANNEX.search(start[:200].split(b"\n")[0]):
        return "is a git-annex pointer, not the file itself; git annex get (or datalad get) fetches it"
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "is an HTML page, not the file itself; the download gave a page (a login, a redirect, an error)"
    if text.startswith((b"<?xml", b"<error")) and b"<svg" not in text:
        return "is an XML document; the download gave an error message"
    if start.startswith(b"\x1f\x8b"):
        return "is packed (gzip); unpack it first"
    if start.startswith(b"(\xb5/\xfd") or start.startswith(b"\xfd7zXZ") or start.startswith(b"BZh"):
        return "is packed; unpack it first"
    return None
