"""The choice of an instruction set, and the threads of the native core."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rnndyn_fast import _core, build_info
from rnndyn_fast.models import blt_net_64

ISAS = _core.build_info()["isa_supported"]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "RNNDYN_ISA"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.parametrize("isa", ISAS)
def test_environment_variable_chooses(isa: str) -> None:
    code = "import rnndyn_fast; print(rnndyn_fast.build_info()['isa'])"
    assert run_python(code, RNNDYN_ISA=isa).stdout.strip() == isa


def test_best_is_the_default() -> None:
    result = run_python("import rnndyn_fast; print(rnndyn_fast.build_info()['isa'])")
    assert result.stdout.strip() == ISAS[-1]


def test_unknown_name_in_the_environment_is_an_error_where_the_core_is_used() -> None:
    code = """
import torch, warnings, rnndyn_fast
from rnndyn_fast.models import blt_net_64
try:
    rnndyn_fast.build_info()
except ImportError as error:
    print("INFO", error)
net = blt_net_64(widths=(2, 4, 8, 16, 32), backend="native")
try:
    net(torch.zeros(1, 3, 64, 64))
except ValueError as error:
    print("NATIVE", error)
net.backend = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    net(torch.zeros(1, 3, 64, 64))
print("WARNED", *[w.message for w in caught])
"""
    result = run_python(code, RNNDYN_ISA="sse9")
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert len(lines) == 3
    for line in lines:
        assert "RNNDYN_ISA" in line
        assert "'sse9'" in line


def test_select_isa_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"RNNDYN_ISA: expected portable, avx2, avx512 or amx.*'neon'"):
        _core.select_isa("neon")
    assert build_info()["isa"] in ISAS


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_every_isa_gives_the_same_network(training: bool) -> None:
    """To the rounding of float64; sums are taken in another order."""
    torch.manual_seed(1)
    net = blt_net_64(timesteps=3, widths=(2, 4, 8, 16, 32), num_classes=5, backend="native").double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before, results = build_info()["isa"], []
    try:
        for isa in ISAS:
            _core.select_isa(isa)
            assert build_info()["isa"] == isa
            with torch.set_grad_enabled(training):
                out = net(x)
            grads = torch.autograd.grad(out.sum(), [p for n, p in net.named_parameters() if n.startswith("v2")]) if training else ()
            results.append((out.detach(), *grads))
    finally:
        _core.select_isa(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-11)


def test_torch_set_num_threads_is_honoured() -> None:
    """Counted as threads of the process: the core's OpenMP runtime is torch's own, so one thread stays one."""
    code = """
import torch, rnndyn_fast, psutil
from rnndyn_fast.program.kinds import KINDS
x, state = torch.empty(8, 64, 64, 32), torch.empty(8, 64, 64, 32)
torch.set_num_threads({threads})
counts = [psutil.Process().num_threads()]
KINDS["area_step"].run(drives=[x], rectify=True, state=state)
counts.append(psutil.Process().num_threads())
torch.relu(x)
counts.append(psutil.Process().num_threads())
torch.set_num_threads(1)
KINDS["area_step"].run(drives=[x], rectify=True, state=state)
counts.append(psutil.Process().num_threads())
print(*counts)
"""
    for threads in (1, 3):
        result = run_python(code.format(threads=threads), OMP_NUM_THREADS="8")
        assert result.returncode == 0, result.stderr
        before, after_ours, after_torch, _ = map(int, result.stdout.split())
        assert after_ours - before == threads - 1
        assert after_torch == after_ours, "torch started threads of its own: two OpenMP runtimes"
