"""A PostgreSQL server for tests, from Debian's package `postgresql`: its own folder, a Unix socket, no network."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# The newest version that is installed; elsewhere what is on the path.
_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
_INITDB = _FOLDERS[-1] / "initdb" if _FOLDERS else shutil.which("initdb")
BIN = None if _INITDB is None else Path(_INITDB).parent


def _reason() -> str | None:
    """Why no server can be started here."""
    if BIN is None:
        return "no PostgreSQL server (apt-get install postgresql)"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "the server does not run as root, and there is no setpriv (apt-get install util-linux)"
    return None


@contextmanager
def postgresql_server() -> Iterator[str]:
    """A server with its files in a folder of its own, for the length of the block; gives the URL of its database "search"."""
    reason = _reason()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    assert BIN is not None
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # (pytest's folders are closed to other users, and too long for sockets)
    data, user, run_as = folder / "data", "searcher", []
    if os.geteuid() == 0:  # which PostgreSQL refuses to be
        account = next(pwd.getpwnam(name) for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()})
        run_as = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        os.chown(folder, account.pw_uid, account.pw_gid)

    def call(*words: str) -> None:
        done = subprocess.run([*run_as, *words], cwd="/", capture_output=True, text=True)
        log = folder / "log"
        assert done.returncode == 0, f"{words[0]}: {done.stdout}{done.stderr}{log.read_text() if log.exists() else ''}"

    call(str(BIN / "initdb"), "-D", str(data), "-U", user, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
    socket = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off -c max_connections=40"
    call(str(BIN / "pg_ctl"), "-D", str(data), "-l", str(folder / "log"), "-o", socket, "-w", "start")
    try:
        call(str(BIN / "createdb"), "-h", str(folder), "-U", user, "search")
        yield f"postgresql://{user}@/search?host={folder}"
    finally:
        call(str(BIN / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)
