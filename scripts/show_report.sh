#!/bin/sh
# show_report.sh FILE: says where the report is, and opens it where there is a desktop. Never fails for want of one.
echo
echo "The report: $PWD/$1"
if [ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ] && command -v xdg-open >/dev/null 2>&1; then
  xdg-open "$1" >/dev/null 2>&1 </dev/null &
fi
exit 0
