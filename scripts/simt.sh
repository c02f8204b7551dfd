#!/bin/sh
# simt.sh PYTHON FOLDER: builds the tests' module _simt, the CUDA kernels in the SIMT harness, in FOLDER, which may hold an earlier build,
# and prints its path.
set -eu
python=$1
folder=$2
root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$(dirname "$python"):$PATH # cmake and ninja, where they were installed beside the interpreter
{
  cmake -S "$root" -B "$folder" -G Ninja -DRNNDYN_SIMT=ON -DRNNDYN_CUDA=OFF \
    "-DSKBUILD_PROJECT_VERSION=$("$python" -c 'import rnndyn_fast; print(rnndyn_fast.__version__)')" \
    "-DPython_EXECUTABLE=$python" "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" && cmake --build "$folder" --target _simt
} >"$folder.log" || {
  cat "$folder.log" >&2
  exit 1
}
echo "$folder"/csrc/simt/_simt.*
