"""What must hold of the repository as a whole: what is built, what is packed, what its pages say."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
from readme_blocks import STAND_IN, code_blocks

import rnndyn_fast

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = re.compile(r"(libstdc\+\+|libgcc_s|libgomp|libc|libm|ld-linux[-\w]*)\.so(\.\d+)?")


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=cwd, env=env)
    assert done.returncode == 0, f"{shlex.join(words)}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def repository_files() -> list[Path]:
    """Tracked files, and those about to be: untracked ones that are not ignored."""
    if (ROOT / ".git").exists():
        names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    # An unpacked source distribution: everything but what building and testing leave behind.
    left_behind = {"build", "demo", "runs", "__pycache__"}
    parts = {path: path.relative_to(ROOT).parts for path in ROOT.rglob("*") if path.is_file()}
    return [path for path, names in parts.items() if not left_behind & set(names) and names[0][0] != "."]


def texts(suffixes: tuple[str, ...] = ()) -> dict[str, str]:
    """Text files of the repository by path; binary ones are left out."""
    found = {}
    for path in repository_files():
        if not suffixes or path.suffix in suffixes:
            try:
                found[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return found


# ---------------------------------------------------------------- native module


@pytest.fixture(scope="module")
def kernel_commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Path, list[str]]]:
    """Compiler and flags for each file of kernels of each instruction set, as CMake has them, without input and output."""
    import pybind11

    folder = tmp_path_factory.mktemp("cmake")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake, "no cmake, with which the package was built"
    options = {
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "SKBUILD_PROJECT_VERSION": rnndyn_fast.__version__,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    run(cmake, "-S", ROOT, "-B", folder, *(f"-D{name}={value}" for name, value in options.items()))
    found: dict[str, dict[Path, list[str]]] = {}
    for entry in json.loads((folder / "compile_commands.json").read_text(encoding="utf-8")):
        words = shlex.split(entry["command"])
        for isa in (word.partition("=")[2] for word in words if word.startswith("-DRNNDYN_ISA=")):
            found.setdefault(isa, {})[Path(entry["file"])] = words[: words.index("-o")]
    return found


def weak_functions(command: list[str], source: Path, out: Path) -> list[str]:
    """Mangled names of the functions of which the linker keeps one copy when several objects define them."""
    # Unoptimised: inlining hides most of them, and not the same ones with every compiler.
    run(*command, "-O0", "-c", source, "-o", out)
    rows = [line.split() for line in run("nm", "--defined-only", out).splitlines()]
    return [row[-1] for row in rows if row[-2] == "W"]


def outside(names: list[str], isa: str) -> list[str]:
    """Those outside rnndyn::<isa>. What is local to one of its functions (_ZZ...), as lambdas are, lies inside."""
    inside = re.compile(rf"_ZZ?NK?6rnndyn{len(isa)}{isa}")
    return [name for name in names if not inside.match(name)]


def test_no_function_is_shared_between_instruction_sets(kernel_commands: dict[str, dict[Path, list[str]]], tmp_path: Path) -> None:
    """The linker would keep one copy, compiled for any of the instruction sets, and call it on every processor."""
    assert set(rnndyn_fast.build_info()["isa_supported"]) <= kernel_commands.keys()
    sources = set((ROOT / "csrc" / "cpu").glob("kernels_*.cpp"))
    assert kernel_commands["portable"].keys() == sources
    for isa, files in kernel_commands.items():
        names = [name for source, command in files.items() for name in weak_functions(command, source, tmp_path / f"{isa}.o")]
        assert names, "expected the kernels' own templates among the weak functions"
        assert not outside(names, isa), "give these internal linkage (static), or put them into rnndyn::<isa>"


def test_matrix_units_are_emulated_once(kernel_commands: dict[str, dict[Path, list[str]]]) -> None:
    of = {isa for isa, files in kernel_commands.items() if any(path.name == "kernels_amx_conv.cpp" for path in files)}
    assert of <= {"portable", "amx"}


@pytest.mark.parametrize(
    ("asked", "expected"), [("avx2", "portable;avx2"), ("amx", "portable;avx512;amx"), ("portable", "portable"), ("avx3", None)]
)
def test_fewer_instruction_sets_can_be_built(asked: str, expected: str | None, tmp_path: Path) -> None:
    if "avx2" not in rnndyn_fast.build_info()["isa_supported"]:
        pytest.skip("can_run_avx2: not an x86-64 processor")
    import pybind11

    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DRNNDYN_CUDA=OFF"]
    environment = {**os.environ, "RNNDYN_ISAS": asked}
    words = [cmake, "-S", str(ROOT), "-B", str(tmp_path), *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    if expected is None:
        assert done.returncode != 0
        assert "RNNDYN_ISAS: expected some of" in " ".join(done.stderr.split())
    else:
        assert f"CPU kernels for {expected}:" in done.stdout


def test_the_check_for_shared_functions_finds_them(kernel_commands: dict[str, dict[Path, list[str]]], tmp_path: Path) -> None:
    source = tmp_path / "shared.cpp"
    source.write_text(
        textwrap.dedent("""\
        #include <algorithm>
        namespace rnndyn {
        inline int loose(int x) { return x + 1; }
        namespace RNNDYN_ISA {
        template <typename Real> Real kernel(Real x) { return std::max(Real(loose(int(x))), x); }
        }
        float use(float x) { return RNNDYN_ISA::kernel(x); }
        }
        """)
    )
    found = outside(weak_functions(next(iter(kernel_commands["portable"].values())), source, tmp_path / "shared.o"), "portable")
    assert len(found) == 2
    assert any("loose" in name for name in found)
    assert any("max" in name for name in found)


def test_native_module_needs_only_the_system() -> None:
    spec = importlib.util.find_spec("rnndyn_fast._core")
    assert spec is not None
    assert spec.origin is not None
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", spec.origin))
    assert needed
    assert [name for name in needed if not LIBRARIES.fullmatch(name)] == []


WITHOUT_NATIVE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "rnndyn_fast._core":
            raise ImportError("hidden for this test")
sys.meta_path.insert(0, Hide())
import torch, rnndyn_fast
from rnndyn_fast.analysis import readout_zones
from rnndyn_fast.models import blt_net_64

net = blt_net_64(timesteps=2, image_size=16, widths=(2, 4, 8, 16, 32), backend="reference")
log_probs, r = net(torch.rand(3, 3, 16, 16), return_representations=True)
log_probs.sum().backward()
assert net.it.lateral.weight.grad.abs().sum() > 0
labels = torch.tensor([0, 1, 2])
for backend in ("reference", None):
    assert readout_zones(r, net.readout.weight, labels, backend=backend).n == 3
for call in (
    rnndyn_fast.build_info,
    lambda: blt_net_64(image_size=16, backend="native")(torch.rand(1, 3, 16, 16)),
    lambda: readout_zones(r, net.readout.weight, labels, backend="native"),
):
    try:
        call()
    except (ImportError, ValueError) as error:
        assert "hidden for this test" in str(error), error
        print(type(error).__name__)
"""


def test_runs_without_the_native_module_on_the_reference() -> None:
    out = run(sys.executable, "-W", "ignore", "-c", WITHOUT_NATIVE)
    assert out.split() == ["ImportError", "ValueError", "ValueError"]


# ---------------------------------------------------------------- files


def test_files_name_no_machine_and_are_finished() -> None:
    # In pieces, so that this file does not hold what it looks for.
    patterns = [rf"(^|[^\w.])/{folder}/" for folder in ("wo" + "rk", "ro" + "ot", "tmp/bash" + "_jobs")]
    patterns += ["TO" + "DO", "FIX" + "ME", "X" * 3]
    pattern = re.compile("|".join(patterns))
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_one_file_takes_addresses_of_tensors() -> None:
    sources = {name: text for name, text in texts((".py",)).items() if name.startswith("rnndyn_fast/")}
    assert [name for name, text in sources.items() if "data_ptr(" in text] == ["rnndyn_fast/ops/addresses.py"]


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == rnndyn_fast.__version__ == rnndyn_fast.build_info()["version"]
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_source_distribution_has_what_a_build_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scikit_build_core.build import build_sdist

    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {name for name in texts((".py", ".h", ".cpp")) if name.startswith(("csrc/", "rnndyn_fast/"))}
    assert {"csrc/bindings.cpp", "csrc/cpu/kernels.cpp", "csrc/cpu/kernels_area_step.cpp"} <= sources
    assert sources | {"pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"} <= names
    unwanted = re.compile(r"(^|/)(\.venv|\.git|\.ci|build|demo|runs|__pycache__|\.\w+_cache)/|\.(so|o|pyc)$")
    assert [name for name in names if unwanted.search(name)] == []


# ---------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('case "$1" in -V) echo Python 3.9.1;; *) exit 1;; esac', "Python 3.11 or later is needed.*Python 3.9.1"),
        ('case "$2" in *version_info*) ;; *venv*) exit 1;; esac', "cannot make virtual environments.*-venv"),
        ('case "$2" in *sysconfig*) echo /nowhere;; esac', "C headers.*-dev"),
    ],
    ids=["old", "no venv", "no headers"],
)
def test_set_up_says_what_is_missing(tmp_path: Path, body: str, message: str) -> None:
    """With a Python that has a fault, where nothing may be installed."""
    python, apt = tmp_path / "python", tmp_path / "apt-get"
    python.write_text(f"#!/bin/sh\n{body}\n")
    apt.write_text("#!/bin/sh\nexit 100\n")
    for file in (python, apt):
        file.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["sh", str(ROOT / "scripts" / "system.sh"), str(python)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr


def test_benchmark_tables(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import benchmark_tables
    finally:
        sys.path.pop(0)
    machine = {"processor": "A processor", "threads": 2, "python": "3.11", "torch": "2.13", "commit": "abc"}
    times = {"median_s": 0.5, "min_s": 0.4, "max_s": 0.625, "rounds": 7}
    contenders = {
        "rnndyn": {**times, "ours_is_faster_by": 1.0},
        "eager": {**times, "median_s": 1.25, "ours_is_faster_by": 2.5},
    }
    zones = [
        {"name": f"test_zones[{param}]", "param": param, "extra_info": {"samples": 25000}}
        | {"stats": {"median": median, "min": 0.001, "max": 4}}
        for param, median in (("native", 0.002), ("published_loops", 3.0))
    ]
    files: dict[str, dict[str, object]] = {
        "forward": {"machine": machine, "what": "forward", "batch": 16, "contenders": contenders},
        "memory": {"machine": machine, "what": "memory", "peak_bytes": {"rnndyn": 2**20, "eager": 2**22}},
        "zones": {"machine_info": {"rnndyn": machine}, "benchmarks": zones},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    text = benchmark_tables.tables(tmp_path)
    for line in (
        "|  | rnndyn | eager |",
        "| forward | 500 ms (400 ms - 625 ms) | 1.25 s (400 ms - 625 ms), x 2.5 |",
        "| memory | 1 MiB | 4 MiB, 25% |",
        "| zones | 2 ms (1 ms - 4 s) | 3 s (1 ms - 4 s), x 1,500 |",
    ):
        assert line in text.splitlines()
    assert "batch 16, A processor, 2 threads" in text
    assert "samples 25,000, A processor" in text
    page = f"before\n{benchmark_tables.START}\nold\n{benchmark_tables.END}\nafter"
    assert benchmark_tables.replaced(page, "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="page: expected one"):
        benchmark_tables.replaced("no marks", "new")


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (folder / target).exists()] == []


@pytest.mark.parametrize("name", sorted(m.name for m in pkgutil.walk_packages(rnndyn_fast.__path__, "rnndyn_fast.")))
def test_docstring_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


PAGES = ("README.md", "CONTRIBUTING.md", "docs/install.md", "docs/commands.md", "docs/python.md")


def test_readme_fits_on_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_picture_is_that_of_its_script(tmp_path: Path) -> None:
    run(sys.executable, ROOT / "scripts" / "overview_figure.py", tmp_path / "overview.svg")
    assert (tmp_path / "overview.svg").read_bytes() == (ROOT / "docs" / "overview.svg").read_bytes()


def test_readme_make_commands_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    words = {word for pair in re.findall(r"^make (\w+)|`make (\w+)`", text, re.MULTILINE) for word in pair if word}
    assert {"demo", "test", "bench", "docs"} <= words <= targets


def test_python_blocks_run() -> None:
    """Of each page in order and in one namespace, as somebody types them; `net` stands for an instance of the published class."""
    for page, least in (("docs/design.md", 2), ("README.md", 3), ("docs/python.md", 6)):
        namespace: dict[str, object] = {}
        exec(STAND_IN, namespace)
        blocks = code_blocks(page, "python")
        assert len(blocks) >= least
        for block in blocks:
            exec(compile(block, page, "exec"), namespace)
        if page == "README.md":
            assert namespace["log_probs"].shape == (10, 4, 100)  # type: ignore[attr-defined]
    assert namespace["state"].shape == (4, 128, 16, 16)  # type: ignore[attr-defined]
    assert namespace["log_probs"].shape == (8, 4, 10)  # type: ignore[attr-defined]
    torch.testing.assert_close(namespace["result"].accuracy, namespace["reducer"].result().accuracy)  # type: ignore[attr-defined]


# What is put behind a README command, so that it takes seconds. (An option given twice has its last value.)
SMALLER = {
    "data": "--source digits --size 16 --num-train 60 --num-val 20 --num-test 20 --num-testplus 40",
    "plan": "",
    "phase": "--epochs 1 --hidden 8 --train-trials 64",
    "train": "--widths 2,4,8,16,32 --timesteps 3 --batch-size 20 --epochs 1 --threads 1",
    "extract": "--limit 30",
    "analyse": "",
    "study": "--quick --out runs/study --networks lateral_additive --epochs 1",
    "doctor": "",
}


def test_readme_commands_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rnndyn_fast.cli import main

    monkeypatch.chdir(tmp_path)
    pages = [code_blocks(page, "sh") for page in ("docs/commands.md", "README.md")]
    lines = [line for blocks in pages for block in blocks for line in block.splitlines() if line.startswith("rnndyn ")]
    commands = list(dict.fromkeys(lines))
    assert {shlex.split(line)[1] for line in commands} == SMALLER.keys()
    for line in commands:
        words = shlex.split(line)[1:]
        assert main([*words, *shlex.split(SMALLER[words[0]])]) == 0, f"{line}\n{capsys.readouterr().err}"
    assert len(list((tmp_path / "runs/lateral/analysis").glob("*.csv"))) >= 5
    assert len(list((tmp_path / "runs/lateral/analysis").glob("*.png"))) >= 3


def test_readme_names_only_options_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    from rnndyn_fast.cli import main
    from rnndyn_fast.cli.table import COMMANDS

    for name in COMMANDS:
        assert main([*name.split(), "--help"]) == 0
    known = {option.replace("_", "-") for option in re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)}
    pages = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/commands.md", "docs/python.md"))
    text = re.sub(r"```.*?```|<!--.*?-->", "", pages, flags=re.DOTALL)
    named = {option.replace("_", "-") for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert {"--save", "--overwrite"} <= named <= known


def test_readme_benchmark_table_is_that_of_the_results() -> None:
    out = run(sys.executable, ROOT / "scripts" / "benchmark_tables.py", "--check", ROOT / "README.md")
    assert "up to date" in out


def test_no_large_file_is_tracked() -> None:
    """Wheels, data and builds are none of the repository's."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).is_file()}
    assert {name: size for name, size in sizes.items() if size > 1 << 20} == {}
