#!/bin/sh
# system.sh PYTHON: checks that a virtual environment and the native module can be made with this Python, installs the Debian
# packages that are missing where it may, and says which they are where it may not.
set -eu
python=$1
here=$(dirname "$0")

need() { # need PACKAGE REASON
  sh "$here/apt_install.sh" "$1" && return
  echo "error: $2; install it and try again: apt-get install $1" >&2
  exit 1
}

command -v "$python" >/dev/null 2>&1 || {
  echo "error: no '$python' here; install Python 3.11 or later, or name one: make PYTHON=python3.12" >&2
  exit 1
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: Python 3.11 or later is needed, '$python' is $("$python" -V 2>&1); name another one: make PYTHON=python3.12" >&2
  exit 1
}
# Debian's packages for one Python are called after its version, python3.11-venv for example.
version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
"$python" -c 'import ensurepip, venv' 2>/dev/null || need "$version-venv" "'$python' cannot make virtual environments"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$include/Python.h" ] || need "$version-dev" "'$python' came without its C headers ($include/Python.h)"
command -v "${CXX:-c++}" >/dev/null 2>&1 || need g++ "there is no C++ compiler (${CXX:-c++})"
