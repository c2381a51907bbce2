"""Every backend says what the plain loops of the oracle say, bit by bit, for 1 to 4 ranks."""

import random
from dataclasses import asdict

import pytest

from tests.comm.oracle import Case
from tests.comm.pool import MAX_TOKENS, WIDTH, K, Pool

BACKENDS = ["shared", "distributed", "mesh", "hosts"]
SIZES = [1, 2, 3, 4]

pytestmark = [pytest.mark.parametrize("size", SIZES), pytest.mark.parametrize("backend", BACKENDS)]


@pytest.fixture
def opened(pool: Pool, backend: str, size: int) -> Pool:
    pool.open(backend, size)
    return pool


def cases(seed: int, size: int, n: int, **fixed: object) -> list[dict[str, object]]:
    """Random numbers of tokens, zero more often than chance; one set of bounds with uneven and empty ranges."""
    draw = random.Random(f"{seed} {size}")
    bounds = (0, *sorted(draw.choices(range(1, 12), k=size - 1)), 11)
    out = []
    for i in range(n):
        tokens = tuple(draw.choice([0, 1, 2, draw.randrange(40)]) for _ in range(size))
        case = Case(100 * seed + i, tokens, bounds, WIDTH, K)
        out.append({**asdict(case), **fixed})
    return out


@pytest.mark.parametrize("overlap", [False, True], ids=["one-lane", "two-lanes"])
@pytest.mark.parametrize("wire", ["auto", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_random_cases(opened: Pool, size: int, overlap: bool, dtype: str, wire: str) -> None:
    for seed in range(2):
        some = cases(seed, size, 9, dtype=dtype, wire=wire)
        assert opened.all(size, do="run", cases=some, overlap=overlap) == [{"ok": "equal"}] * size


def test_no_tokens_anywhere(opened: Pool, size: int) -> None:
    some = cases(0, size, 2, n_tokens=(0,) * size)
    assert opened.all(size, do="run", cases=some) == [{"ok": "equal"}] * size


def test_tokens_that_ask_for_no_expert(opened: Pool, size: int) -> None:
    some = cases(0, size, 2, n_tokens=(3,) * size, absent=1.1)
    assert opened.all(size, do="run", cases=some) == [{"ok": "equal"}] * size


def test_all_experts_on_the_last_rank_and_as_many_tokens_as_fit(opened: Pool, size: int) -> None:
    bounds = (*(0,) * size, 5)
    some = cases(0, size, 3, bounds=bounds, n_tokens=(MAX_TOKENS,) * size)
    assert opened.all(size, do="run", cases=some) == [{"ok": "equal"}] * size


def test_share_gathers_in_rank_order(opened: Pool, size: int) -> None:
    for turn in range(3):
        said = [[turn, -(1 << 63), *range(rank)] for rank in range(size)]
        for rank in range(size):
            opened.tell(rank, do="share", ints=said[rank])
        assert opened.hear_all(range(size)) == [{"ok": said}] * size
    assert opened.all(size, do="share", ints=list(range(64))) == [{"ok": [list(range(64))] * size}] * size
    assert opened.all(size, do="share", ints=[]) == [{"ok": [[]] * size}] * size


def test_what_cannot_be_shared_is_refused(opened: Pool, size: int) -> None:
    assert all("up to 64" in a["error"] for a in opened.all(size, do="share", ints=[0] * 65))
    assert all("64-bit" in a["error"] for a in opened.all(size, do="share", ints=[1 << 63]))
    assert opened.all(size, do="share", ints=[7]) == [{"ok": [[7]] * size}] * size
