"""For all tests: one thread, no terminal, no heap of tests to be searched for garbage."""

from __future__ import annotations

import gc
import os

# Before anything imports torch, here and in the programs that tests start: tests run side by side, and threads that
# wait for one another on cores that others use take many times as long.
os.environ["OMP_NUM_THREADS"] = "1"

for _size in ("COLUMNS", "LINES"):  # of a terminal that a test worker does not have
    os.environ.pop(_size, None)


def pytest_collection_finish() -> None:
    """The tests themselves are millions of objects: no collection need look through them again."""
    gc.collect()
    gc.freeze()
