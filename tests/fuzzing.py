"""Mutated files: what is damaged in copying, downloading or by a dying disk, and whether a reader survives it."""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

# What the command line tells in one line and exit code 2.
TOLD = (ValueError, TypeError, OSError)


def mutated(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies: flipped bytes and bits, truncated, zeroed, overwritten by another part, longer, or with lines swapped."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            # Headers are where readers break: half of the damage is near either end.
            at = min(len(data) - 1, int(rng.expovariate(1 / 200))) if rng.random() < 0.5 else rng.randrange(max(1, len(data)))
            if rng.random() < 0.2:
                at = max(0, len(data) - 1 - at)
            length = rng.choice((1, 1, 4, 16, 512))
            kind = rng.randrange(7)
            if kind == 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            elif kind == 1 and data:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 2:
                data[at : at + length] = bytes(length)
            elif kind == 3:
                data[at : at + length] = b"\xff" * length
            elif kind == 4:
                other = rng.randrange(max(1, len(data)))
                data[at : at + length] = data[other : other + length]
            elif kind == 5 and rng.random() < 0.5:
                del data[at:]
            else:
                data[at:at] = rng.randbytes(length)
            if not data:
                break
        yield bytes(data)


def survive(read: Callable[[Path], object], good: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Read damaged copies of a file: how many were read, and refused in one line.

    Raises ``AssertionError`` with the traceback of any other error, and leaves the file that caused it.
    """
    content, damaged = good.read_bytes(), good.with_name("damaged" + good.suffix)
    found = {"read": 0, "refused": 0}
    for number, data in enumerate(mutated(content, count, seed)):
        damaged.write_bytes(data)
        try:
            read(damaged)
            found["read"] += 1
        except TOLD as error:
            if damaged.name not in str(error):
                raise AssertionError(f"{good.name}, mutation {number}: {type(error).__name__} does not name the file: {error}") from error
            found["refused"] += 1
        except Exception as error:
            last = "".join(traceback.format_exception(error)[-3:])
            raise AssertionError(f"{good.name}, mutation {number}: {type(error).__name__}: {error}\n{last}") from error
    print(good.name, found, file=sys.stderr)
    return found
