#!/bin/sh
# sanitize.sh PYTHON FOLDER [PYTEST ARGUMENTS]: builds the native core with AddressSanitizer and UBSan in FOLDER, which may hold an
# earlier build, and runs tests on it. RNNDYN_SANITIZED_CORE names another core to run them on, and then nothing is built.
set -eu
python=$1
folder=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$(dirname "$python"):$PATH # cmake and ninja, where they were installed beside the interpreter
if [ -z "${RNNDYN_SANITIZED_CORE:-}" ]; then
  cmake -S "$root" -B "$folder" -G Ninja -DRNNDYN_SANITIZE=ON -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
    "-DSKBUILD_PROJECT_VERSION=$("$python" -c 'import rnndyn_fast; print(rnndyn_fast.__version__)')" \
    "-DPython_EXECUTABLE=$python" "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" >"$folder.log" || {
    cat "$folder.log" >&2
    exit 1
  }
  cmake --build "$folder" >"$folder.log" || {
    cat "$folder.log" >&2
    exit 1
  }
  RNNDYN_SANITIZED_CORE=$(echo "$folder"/_core.*)
fi
[ $# -gt 0 ] || exit 0

# The interpreter was built without the sanitizer, whose library must be the first to be loaded; and it finds the C++ library's functions
# only where that one is there from the start.
compiler=${CXX:-c++}
asan=$("$compiler" -print-file-name=libasan.so)
[ -f "$asan" ] || {
  echo "error: '$compiler' has no libasan.so, which the sanitised core needs; name GCC: CXX=g++" >&2
  exit 1
}
cd "$root"
# Leaks: Python and torch keep much until they end. Everything else that is reported ends the run.
LD_PRELOAD="$asan $("$compiler" -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  RNNDYN_SANITIZED_CORE=$RNNDYN_SANITIZED_CORE PYTHONPATH="$root/tests" \
  "$python" -m pytest -p sanitized_core -p no:cacheprovider -q "$@"
