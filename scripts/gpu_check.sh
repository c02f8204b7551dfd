#!/bin/sh
# gpu_check.sh [--dry-run] FOLDER: on a machine with a GPU, builds the package with its CUDA kernels, runs the tests on the device,
# compute-sanitizer on small cases, and the benchmarks. Logs and results (JSON) go to FOLDER, with what ran and how it ended in summary.txt
# there, and all of it in FOLDER.tar.gz.
#
# Needs no network: Python with torch, numpy, pybind11, scikit-build-core, pytest, cmake and ninja; nvcc 12.4 or later. Each step has a time
# limit, all of them together nine minutes; a step that fails does not stop the ones after it (but nothing runs without a build).
# PYTHON=python3.12 names another interpreter, RNNDYN_BENCH_QUICK=1 makes the benchmarks tiny. What torch.compile does takes minutes of its
# own: RNNDYN_GPU_CHECK=compiled runs the build and the benchmarks against it instead (RNNDYN_BENCH_ONLY, an expression of pytest's -k, some of
# them).
#
# --dry-run: without a GPU, the package as it is installed for PYTHON, and the same steps: kernels run in the tests' SIMT harness, few of the
# tests and tiny benchmarks, and what compute-sanitizer would run is listed.
set -u
dry=
[ "${1:-}" = --dry-run ] && {
  dry=yes
  shift
}
[ $# -eq 1 ] || {
  echo "usage: gpu_check.sh [--dry-run] FOLDER" >&2
  exit 2
}
python=${PYTHON:-python3}
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
: >"$out/summary.txt"
failed=0
deadline=$(($(date +%s) + 540))

# limited NAME SECONDS COMMAND...: its output goes to NAME.log, its exit status and seconds to NAME.end.
limited() {
  name=$1
  seconds=$2
  shift 2
  start=$(date +%s)
  left=$((deadline - start))
  [ "$left" -lt "$seconds" ] && seconds=$left
  if [ "$seconds" -gt 0 ]; then
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
  else
    status=125
  fi
  echo "$status $seconds $(($(date +%s) - start))" >"$out/$name.end"
  return $status
}

# ended NAME: how it went, in the summary.
ended() {
  read -r status seconds took <"$out/$1.end"
  rm "$out/$1.end"
  [ "$status" -eq 0 ] || failed=1
  case $status in
  0) end="passed" ;;
  124) end="stopped after its $seconds s" ;;
  125) end="no time was left" ;;
  *) end="failed, exit status $status" ;;
  esac
  echo "$1: $end, $took s" | tee -a "$out/summary.txt"
  return "$status"
}

step() {
  limited "$@"
  ended "$1"
}

finish() {
  rm -rf "$out/build" "$out/installed"
  tar czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
  exit $failed
}

"$python" - "$dry" >"$out/machine.json" <<'PYTHON'
import json, platform, subprocess, sys
import torch
def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        return None
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"devices": devices, "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"), "torch": torch.__version__,
                  "torch_cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "python": platform.python_version(),
                  "nvcc": said("nvcc", "--version"), "commit": said("git", "describe", "--always", "--dirty")}, indent=1))
sys.exit(0 if devices or sys.argv[1] else "no CUDA device")
PYTHON
[ $? -eq 0 ] || {
  echo "no usable CUDA device: see $out/machine.json" | tee -a "$out/summary.txt" >&2
  exit 1
}

op_tests="tests/test_area_step_cuda.py tests/test_readout_zones_cuda.py tests/test_recurrent_conv_cuda.py tests/test_gate_step_cuda.py
  tests/test_norm_step_cuda.py tests/test_depthwise_conv_cuda.py tests/test_ctrnn_cuda.py
  tests/test_trajectory_norms_cuda.py"
small="n1c33h5w7 or n2c8h5w3 or 2-9-48-40 or 2x24x6x4 or splits or lstm or partial or buffers_in_place or threads_changes_no_bit"
if [ -z "$dry" ]; then
  capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  # For this device alone: the others' code would take the time that the tests need.
  step build 170 "$python" -m pip install --disable-pip-version-check --no-index --no-deps --no-build-isolation --prefix "$out/installed" \
    --config-settings=cmake.define.RNNDYN_CUDA=ON "--config-settings=cmake.define.RNNDYN_CUDA_ARCHITECTURES=$capability" \
    "--config-settings=build-dir=$out/build" . || finish
  site=$("$python" -c 'import sys, sysconfig; print(sysconfig.get_path("platlib", vars={"platbase": sys.argv[1], "base": sys.argv[1]}))' "$out/installed")
  # The tests import the installed package, not the source tree, which has no native modules.
  export PYTHONPATH="$site:tests" PYTHONSAFEPATH=1
  # The op tests that elsewhere run in the SIMT harness, and whole rollouts.
  export RNNDYN_TEST_DEVICE=cuda
  chosen=
else
  step build 60 "$python" -c 'import rnndyn_fast; print(rnndyn_fast.build_info())' || finish
  export RNNDYN_BENCH_DEVICE=harness
  chosen="lstm and float16"
fi
# Engines of convolutions as they are timed here: part of the results.
export RNNDYN_CACHE="$out"
pytest="$python -m pytest -q -p no:cacheprovider"

if [ "${RNNDYN_GPU_CHECK:-all}" = compiled ]; then
  RNNDYN_BENCH_COMPILE=1 RNNDYN_BENCH_RESULTS="$out" step benchmarks 540 $pytest -s benchmarks/bench_rollout_cuda.py \
    -k "${RNNDYN_BENCH_ONLY:-}"
  finish
fi

# shellcheck disable=SC2086  # words of the lists are arguments
step tests 150 $pytest $op_tests tests/test_rollout_cuda.py tests/test_rollout_device.py \
  tests/test_networks_cuda.py tests/test_train_device.py -k "$chosen"
tools="memcheck racecheck initcheck synccheck"
if [ -n "$dry" ] || command -v compute-sanitizer >/dev/null; then
  for tool in $tools; do
    sanitizer="compute-sanitizer --tool $tool --error-exitcode 9" listed=
    [ -n "$dry" ] && sanitizer='' listed=--collect-only
    # Without torch's cache each tensor is an allocation of its own, past whose end nothing may be touched. All at once: they wait for the host.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "sanitizer_$tool" 110 $sanitizer $pytest -x $op_tests -k "$small" $listed &
  done
  wait
  for tool in $tools; do ended "sanitizer_$tool"; done
else
  echo "compute-sanitizer: not there, left out" | tee -a "$out/summary.txt"
fi
RNNDYN_BENCH_RESULTS="$out" step benchmarks 240 $pytest -s benchmarks/bench_rollout_cuda.py benchmarks/bench_networks_cuda.py
finish
