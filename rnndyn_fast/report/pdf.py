"""A report as PDF, printed by a browser."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from rnndyn_fast.file_io import replaced_atomically

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str:
    """The path of Chromium or Chrome.

    Raises ImportError, naming what to install, where there is none.
    """
    for name in BROWSERS:
        found = shutil.which(name)
        if found:
            return found
    raise ImportError(
        f"pdf: expected a browser that prints, one of {', '.join(BROWSERS)}, found none on the path; install Chromium (Debian: apt-get "
        "install chromium), not by pip install, or print the page from any browser"
    )


def print_pdf(page: str | os.PathLike[str]) -> Path:
    """Print an HTML page to a PDF of the same name beside it, whole or not at all; returns its path.

    Raises:
        ImportError: there is no browser.
        OSError: the browser fails.
    """
    page, browser = Path(page), find_browser()
    out = page.with_suffix(".pdf")
    with tempfile.TemporaryDirectory() as profile, replaced_atomically(out) as temporary:
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-pdf-header-footer"]
        words += [f"--user-data-dir={profile}", f"--print-to-pdf={temporary.resolve()}", page.resolve().as_uri()]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        if done.returncode or not temporary.exists() or not temporary.read_bytes().startswith(b"%PDF"):
            raise OSError(f"pdf: {browser} did not print {page}: {done.stderr.strip()[-300:]}")
    return out
