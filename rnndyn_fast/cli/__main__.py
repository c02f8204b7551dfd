"""``python -m rnndyn_fast.cli``: the command `rnndyn`, as torchrun starts it."""

import sys

from rnndyn_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
