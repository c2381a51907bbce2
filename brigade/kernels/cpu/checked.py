"""Bytes copied and hashed in one go, for KV rows that come from another rank: comm's Fast, on the C++ kernels."""

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STRIPE = 64
LEAST = 241
"""Bytes: fewer have a hash of another form."""


class CheckedCopy:
    """Safe from any thread: it has none of its own, and lets others run meanwhile."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """`library`: as structs.py opens it."""
        self._library = library

    def __call__(self, runs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> int | None:
        """Copy the first of each two runs of the same size into the second. The XXH3 (64 bits) of all that was written;
        None if it does not serve runs of these sizes, and nothing was done. Raises ValueError."""
        if any(a.size != b.size for a, b in runs):
            raise ValueError("runs: two of them differ in size")
        if not all(x.flags.c_contiguous for run in runs for x in run) or not all(b.flags.writeable for _, b in runs):
            raise ValueError("runs: must be contiguous, and those that are filled writable")
        sizes = np.array([a.size for a, _ in runs], np.int64)
        if sizes.sum() < LEAST or (sizes % STRIPE).any() or not sizes.all():
            return None
        source, target = (np.array([run[i].ctypes.data for run in runs], np.uint64) for i in (0, 1))
        check = self._library.copy_checked(target.ctypes.data, source.ctypes.data, sizes.ctypes.data, len(runs))
        return int(check)
