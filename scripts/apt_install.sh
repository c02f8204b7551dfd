#!/bin/sh
# apt_install.sh PACKAGE...: installs Debian packages where that needs nobody's leave (root, apt-get there). Fails where it may not.
set -eu
[ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1 || exit 1
export DEBIAN_FRONTEND=noninteractive
echo "Installing $* with apt-get"
# The package lists of a fresh machine are empty or old.
apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 </dev/null && exit 0
apt-get update -qq >/dev/null 2>&1 </dev/null || exit 1
apt-get install -y -qq --no-install-recommends "$@" >/dev/null </dev/null
