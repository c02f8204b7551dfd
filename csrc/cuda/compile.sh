#!/bin/sh
# compile.sh OBJECT COMMAND...: runs a compiler. What it says is kept in OBJECT.log (ptxas reports every kernel's registers and spills there) and shown if
# it fails.
object=$1
shift
"$@" >"$object.log" 2>&1 || {
  status=$?
  cat "$object.log" >&2
  exit $status
}
