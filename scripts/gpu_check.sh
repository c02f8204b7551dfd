#!/bin/sh
# gpu_check.sh FOLDER: on a machine with a GPU, builds the package with its CUDA kernels, runs the tests on the device, compute-sanitizer on
# small cases, and the benchmarks. Logs and results (JSON) go to FOLDER, and summary.txt there says what ran and how it ended.
#
# Needs no network: Python with torch, numpy, pybind11, scikit-build-core, pytest, cmake and ninja; nvcc 12.4 or later. Each step has a time
# limit, all of them nine minutes together; a step that fails does not stop the ones after it (but nothing runs without a build).
# PYTHON=python3.12 names another interpreter, RNNDYN_BENCH_QUICK=1 makes the benchmarks tiny.
set -u
[ $# -eq 1 ] || {
  echo "usage: gpu_check.sh FOLDER" >&2
  exit 2
}
python=${PYTHON:-python3}
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
: >"$out/summary.txt"
failed=0

# step NAME SECONDS COMMAND...
step() {
  name=$1
  seconds=$2
  shift 2
  start=$(date +%s)
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=1
  case $status in 0) end="passed" ;; 124) end="stopped after its $seconds s" ;; *) end="failed, exit status $status" ;; esac
  echo "$name: $end, $(($(date +%s) - start)) s" | tee -a "$out/summary.txt"
  return $status
}

"$python" - >"$out/machine.json" <<'PYTHON'
import json, platform, subprocess, sys
import torch
def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        return None
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"devices": devices, "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"), "torch": torch.__version__,
                  "torch_cuda": torch.version.cuda, "python": platform.python_version(), "nvcc": said("nvcc", "--version"),
                  "commit": said("git", "describe", "--always", "--dirty")}, indent=1))
sys.exit(0 if devices else "no CUDA device")
PYTHON
[ $? -eq 0 ] || {
  echo "no usable CUDA device: see $out/machine.json" | tee -a "$out/summary.txt" >&2
  exit 1
}
capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')

# For this device alone: the others' code would take the time that the tests need.
step build 150 "$python" -m pip install --disable-pip-version-check --no-index --no-deps --no-build-isolation --prefix "$out/installed" \
  --config-settings=cmake.define.RNNDYN_CUDA=ON "--config-settings=cmake.define.RNNDYN_CUDA_ARCHITECTURES=$capability" \
  "--config-settings=build-dir=$out/build" . || exit 1
site=$("$python" -c 'import sys, sysconfig; print(sysconfig.get_path("platlib", vars={"platbase": sys.argv[1], "base": sys.argv[1]}))' "$out/installed")
# The tests import the installed package, not the source tree, which has no native modules.
export PYTHONPATH="$site:tests" PYTHONSAFEPATH=1

# The op tests that elsewhere run in the SIMT harness, and whole rollouts.
export RNNDYN_TEST_DEVICE=cuda
tests="tests/test_area_step_cuda.py tests/test_readout_zones_cuda.py tests/test_recurrent_conv_cuda.py"
step tests 150 "$python" -m pytest -q -p no:cacheprovider $tests tests/test_rollout_cuda.py
if command -v compute-sanitizer >/dev/null; then
  small="n1c33h5w7 or n2c8h5w3 or (2, 9, 48, 40) or 2x24x6x4 or splits"
  # Without torch's cache each tensor is an allocation of its own, past whose end nothing may be touched.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck synccheck; do
    step "sanitizer_$tool" 45 compute-sanitizer --tool $tool --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider $tests -k "$small"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  echo "compute-sanitizer: not there, left out" | tee -a "$out/summary.txt"
fi
RNNDYN_BENCH_RESULTS="$out" step benchmarks 150 "$python" -m pytest -q -s -p no:cacheprovider benchmarks/bench_rollout_cuda.py
rm -rf "$out/build" "$out/installed"
exit $failed
