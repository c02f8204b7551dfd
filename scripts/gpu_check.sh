#!/bin/sh
# gpu_check.sh [--dry-run] [--seconds S] FOLDER [STEP...]: what a machine with a GPU is asked, by gpu_check.py beside it, which says more.
# PYTHON=python3.12 names another interpreter. Needs no network.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
