"""A page in a real headless browser (Chromium), and what a script in it found out."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def visit(page: Path, script: str, width: int, folder: Path) -> tuple[Any, list[str]]:
    """Load `page` in a frame `width` pixels wide, run `script` there, and return what it returned and the console's errors.

    `script` is the body of a function of (window, document) of the page. The frame is needed because a headless window has
    at least 500 pixels.
    """
    if CHROMIUM is None:
        message = "no chromium (apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    inner = html.escape(page.read_text(encoding="utf-8"), quote=True)
    outer = folder / "outer.html"
    outer.write_text(
        f"""<!doctype html><meta charset="utf-8"><body><pre id="found"></pre>
<iframe id="page" style="width: {width}px; height: 900px; border: 0" srcdoc="{inner}"></iframe>
<script>
document.getElementById('page').addEventListener('load', function () {{
  var window_ = this.contentWindow, result;
  try {{ result = {{ found: (function (window, document) {{ {script} }})(window_, window_.document) }}; }}
  catch (error) {{ result = {{ error: String(error) }}; }}
  document.getElementById('found').textContent = JSON.stringify(result);
}});
</script></body>""",
        encoding="utf-8",
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0"]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1280,900",
        "--virtual-time-budget=20000",
        "--dump-dom",
        outer.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, f"the page did not load\n{done.stderr[-2000:]}"
    assert match[1], f"the script did not run\n{done.stderr[-2000:]}"
    result = json.loads(html.unescape(match[1]))
    assert "error" not in result, result
    return result["found"], [line for line in done.stderr.splitlines() if "CONSOLE" in line]
