"""The C++ copy of KV rows writes what is there, and its checksum is the one of the xxhash library."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash

from brigade.comm.kv import rows as rows_of_kv
from brigade.comm.kv.rows import Bytes, Rows, checksum, copy_checked
from brigade.kernels.cpu.checked import LEAST, STRIPE, CheckedCopy
from brigade.kernels.cpu.structs import open_library


@pytest.fixture(scope="module")
def fast(library_path: Path) -> CheckedCopy:
    return CheckedCopy(open_library(library_path))


def some(n: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


@pytest.mark.parametrize("stripes", [4, 5, 15, 16, 17, 31, 32, 33, 48, 1000, 73728])
@pytest.mark.parametrize("offset", [0, 1, 48])
def test_the_checksum_is_that_of_the_library_however_the_bytes_are_cut(
    fast: CheckedCopy, stripes: int, offset: int
) -> None:
    n = stripes * STRIPE
    source = some(n, stripes)
    for cuts in ([], [1], [1, stripes - 1], sorted({3 * stripes // 4, stripes // 2, 2})):
        space = np.zeros(n + offset + 1, np.uint8)
        target = space[offset : offset + n]
        ends = [0, *(STRIPE * c for c in cuts), n]
        runs = [(source[a:b], target[a:b]) for a, b in pairwise(ends)]
        assert fast(runs) == xxhash.xxh3_64_intdigest(source.data)
        assert (target == source).all()
        assert not space[:offset].any()
        assert not space[offset + n :].any()


def test_every_bit_of_it_counts(fast: CheckedCopy) -> None:
    source, target = some(2 * 1024 + STRIPE), np.zeros(2 * 1024 + STRIPE, np.uint8)
    right = fast([(source, target)])
    for bit in range(8 * source.size):
        source[bit // 8] ^= 1 << bit % 8
        assert fast([(source, target)]) != right
        source[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("sizes", [[], [LEAST - LEAST % STRIPE - STRIPE], [240], [STRIPE, 3 * STRIPE + 1], [0, 320]])
def test_sizes_that_it_does_not_serve_are_left_alone(fast: CheckedCopy, sizes: list[int]) -> None:
    target = [np.zeros(n, np.uint8) for n in sizes]
    assert fast([(some(t.size), t) for t in target]) is None
    assert not any(t.any() for t in target)


def test_what_must_not_be_written_or_is_not_bytes_in_a_row_is_refused(fast: CheckedCopy) -> None:
    source, target = some(640), np.zeros(640, np.uint8)
    with pytest.raises(ValueError, match="differ in size"):
        fast([(source[:320], target)])
    with pytest.raises(ValueError, match="contiguous"):
        fast([(source[::2], target[:320])])
    target.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        fast([(source, target)])


@pytest.mark.parametrize(("row", "page", "mine"), [(64, 4, 4), (1152, 16, 16), (576, 3, 16), (48, 4, 1)])
def test_rows_of_scattered_pages_are_those_of_the_plain_way(
    fast: CheckedCopy, row: int, page: int, mine: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_of_kv, "FAST_RUN", 1)
    rng = np.random.default_rng(row)
    source, plain, quick = (Rows(some(2 * 64 * p * row, p), 2, p, row) for p in (page, mine, mine))
    start, end = 5, 40
    theirs, own = (rng.permutation(64)[: -(-end // p)].tolist() for p in (page, mine))
    for layer in range(2):
        said = [
            copy_checked(source.runs(layer, theirs, start, end), rows.runs(layer, own, start, end), way)
            for rows, way in ((plain, None), (quick, fast))
        ]
        assert said == [checksum(source.runs(layer, theirs, start, end))] * 2
    assert (plain.memory == quick.memory).all()
