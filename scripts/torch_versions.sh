#!/bin/sh
# torch_versions.sh WHEEL FOLDER REQUIREMENT...: runs the tests on one wheel with several versions of torch, each in a virtual environment of its own
# in FOLDER. For example:
#
#   python -m build && sh scripts/torch_versions.sh dist/rnndyn_fast-*.whl environments torch==2.6.0 torch
#
# PYTHON is the interpreter (3.11 or later). PIP_EXTRA_INDEX_URL and the like are passed on to pip: builds of torch for the CPU are
# much smaller. PYTEST_ARGS are passed on to pytest.
set -eu
[ $# -ge 3 ] || {
  sed -n 's/^# \{0,1\}//p' "$0" >&2
  exit 2
}
wheel=$1
folder=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
[ -f "$wheel" ] || {
  echo "error: no wheel $wheel" >&2
  exit 2
}
wheel=$(cd "$(dirname "$wheel")" && pwd)/$(basename "$wheel")
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
failed=
for requirement; do
  environment=$folder/$(printf %s "$requirement" | tr -c '[:alnum:].\n' '-')
  echo "== $requirement"
  "${PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet "$requirement" "$wheel[test]"
  # Away from the repository's root, so that what is imported is the wheel.
  mkdir -p "$environment/work"
  (cd "$environment/work" && "$environment/bin/python" -m pytest -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" -q ${PYTEST_ARGS:-} "$root/tests") ||
    failed="$failed $requirement"
done
[ -z "$failed" ] || {
  echo "error: tests failed with$failed" >&2
  exit 1
}
