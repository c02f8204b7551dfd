"""`pip install .` beside torch and numpy alone: what runs there, and what the rest says is missing."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from readme_blocks import STAND_IN, code_blocks

from rnndyn_fast.optional import OPTIONAL_PACKAGES, require

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rnndyn_fast"


def run(*command: str | Path, status: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command whose exit status is as expected."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RNNDYN_DEBUG")}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)
    assert done.returncode == status, f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def requirements(distribution: str) -> list[str]:
    """Names of the distributions that one needs without any extra, here."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in importlib.metadata.requires(distribution) or []]
    return [item.name for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without compiling."""
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-C", "wheel.cmake=false")
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", *options, "--wheel-dir", out, ROOT)
    (path,) = out.glob("rnndyn_fast-*.whl")
    return path


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an environment that holds the wheel with its native modules, torch, numpy, and what torch requires."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    pending, done = ["torch", "numpy"], set()
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in done:
            continue
        done.add(name)
        pending += requirements(name)
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(importlib.metadata.distribution(name).locate_file(top))))
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--no-deps", "--no-index", wheel)
    core = importlib.util.find_spec("rnndyn_fast._core")
    assert core is not None
    assert core.origin is not None
    for module in Path(core.origin).parent.glob("_c*.so"):
        shutil.copy(module, site / "rnndyn_fast")
    return python.parent


def test_wheel_requires_torch_and_numpy_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
        (scripts,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/entry_points.txt")]
    rows = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", metadata, re.MULTILINE)
    assert sorted(name for name, rest in rows if "extra ==" not in rest) == ["numpy", "torch"]
    extras = {name: rest for name, rest in rows if "extra ==" in rest}
    for package in OPTIONAL_PACKAGES.values():
        assert f'extra == "{package.extra}"' in extras[package.distribution].replace("'", '"')
    assert "rnndyn = rnndyn_fast.cli:main" in scripts
    # All that is beside the sources is in it, and nothing else of the repository.
    kept = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.suffix in (".py", ".pyi", ".yaml", ".typed")}
    assert {name for name in names if ".dist-info/" not in name} == kept


def test_bare_install_holds_no_optional_package(bare: Path) -> None:
    """What torch itself requires (networkx) may be there; otherwise the tests below would show nothing."""
    code = f"import importlib.util as u; print(*[n for n in {[*OPTIONAL_PACKAGES]} if u.find_spec(n)])"
    found = set(run(bare / "python", "-c", code, cwd=bare).stdout.split())
    assert found <= {"networkx"}


def test_readme_runs_in_a_bare_install(bare: Path, tmp_path: Path) -> None:
    blocks = code_blocks("README.md", "python")
    assert blocks
    (tmp_path / "readme.py").write_text("\n".join([STAND_IN, *blocks]), encoding="utf-8")
    run(bare / "python", "-W", "ignore", tmp_path / "readme.py", cwd=tmp_path)


EVERY_NETWORK = """
import warnings
warnings.simplefilter("ignore")
import numpy as np, torch, rnndyn_fast
from rnndyn_fast import models, nn
from rnndyn_fast.analysis import readout_zones
from rnndyn_fast.models.registry import MODELS, NAMES

assert rnndyn_fast.__file__.startswith(__import__("sys").prefix), rnndyn_fast.__file__
assert rnndyn_fast.build_info()["isa"]
for name in sorted({*MODELS, *NAMES} - {"convrnn", "network"}):
    with torch.device("meta"):
        net = models.build(models.named(name))
    assert sum(p.numel() for p in net.parameters()) > 0
    print(name)
net = models.blt_net_64(timesteps=2, image_size=16, widths=(2, 4, 8, 16, 32))
assert rnndyn_fast.accelerate(net)(torch.rand(1, 3, 16, 16)).shape[0] == 2
assert nn.CTRNN(1, 1, 4)(torch.rand(1, 2, 1))[0].shape == (1, 1, 2, 1)
result = readout_zones(np.random.rand(3, 20, 8), np.random.rand(4, 8), np.arange(20) % 4)
assert result.n == 20
"""


def test_every_network_can_be_built_in_a_bare_install(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "networks.py").write_text(EVERY_NETWORK, encoding="utf-8")
    assert len(run(bare / "python", tmp_path / "networks.py", cwd=tmp_path).stdout.split()) >= 10


COMMANDS = """
import contextlib, io, json, sys
from rnndyn_fast.cli import main

for line in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(line.split())
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def test_commands_in_a_bare_install(bare: Path, tmp_path: Path) -> None:
    assert re.match(r"rnndyn \d", run(bare / "rnndyn", "--version", cwd=tmp_path).stdout)
    runs = {
        "": "data make.*phase train.*doctor",
        "--help": "data make.*phase train.*doctor",
        "doctor --help": "Report what runs on this machine",
        "doctor": 'jsonargparse +missing, needed for .*: pip install "rnndyn-fast\\[cli\\]"',
    }
    needs_more = ["train --data images.h5 --out run", "train --help", "plan blt_net_64", "analyse a.npz --out b"]
    done = run(bare / "python", "-W", "ignore", "-c", COMMANDS, *runs, *needs_more, cwd=tmp_path)
    results = dict(zip([*runs, *needs_more], map(json.loads, done.stdout.splitlines()), strict=True))
    for line, expected in runs.items():
        status, out, err = results[line]
        assert (status, err) == (0, "")
        assert re.search(expected, out, re.DOTALL), out
    for line in needs_more:
        status, out, err = results[line]
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert 'pip install "rnndyn-fast[cli]"' in err


# Imports modules where none of the packages can be found.
WITHOUT = """
import importlib, sys
import numpy, torch

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in packages else self.finder.find_spec(name, path, target)

packages, modules = sys.argv[1].split(","), sys.argv[2].split(",")
for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
    del sys.modules[name]
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"{module}: {error!r}")
print("not hidden:", *(name for name in packages if name in sys.modules))
"""


def test_every_module_imports_without_optional_packages() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE.rglob("*.py")]
    modules = sorted(name for name in names if not name.endswith("__main__"))
    assert run(sys.executable, "-c", WITHOUT, ",".join(OPTIONAL_PACKAGES), ",".join(modules), cwd=ROOT).stdout == "not hidden:\n"


def unguarded(source: str) -> list[int]:
    """Lines that import an optional package without ``require`` of it in the same function."""
    found: list[int] = []

    def visit(node: ast.AST, guarded: set[str]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.FunctionDef):
                visit(child, set())
                continue
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id == "require":
                guarded |= {ast.literal_eval(argument) for argument in child.args}
            names = [child.module or ""] if isinstance(child, ast.ImportFrom) else []
            names += [alias.name for alias in child.names] if isinstance(child, ast.Import) else []
            if {name.partition(".")[0] for name in names} & (OPTIONAL_PACKAGES.keys() - guarded):
                found.append(child.lineno)  # type: ignore[attr-defined]
            visit(child, guarded)

    visit(ast.parse(source), set())
    return found


def test_imports_of_optional_packages_say_how_to_install_them() -> None:
    assert unguarded("def f():\n    import scipy.stats\n") == [2]
    assert unguarded("import h5py\n") == [1]
    assert unguarded("def f():\n    require('yaml')\n    import yaml\ndef g():\n    from yaml import load\n") == [5]
    found = {str(path): lines for path in PACKAGE.rglob("*.py") if (lines := unguarded(path.read_text(encoding="utf-8")))}
    assert found == {}


@pytest.mark.parametrize("name", OPTIONAL_PACKAGES)
def test_require_names_package_purpose_and_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    package = OPTIONAL_PACKAGES[name]
    expected = rf"{package.distribution} is needed for {re.escape(package.purpose)}.*: pip install \"rnndyn-fast\[{package.extra}\]\""
    with pytest.raises(ImportError, match=expected):
        require(name)
