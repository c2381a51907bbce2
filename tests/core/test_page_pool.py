"""The page pool: counts that never drift, and prefixes that are found only when every token is the same."""

import random
from collections import Counter

import pytest

from brigade.core.pages import Known, PagePool


def filled(pool: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    """Pages that hold `tokens`, published, as a request would leave them."""
    found, known = pool.match(tokens, salt)
    pages = pool.take(-(-len(tokens) // pool.page) - len(found), found)
    assert pages is not None
    pool.publish(tokens, pages, known)
    return pages


def reach(pool: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    return pool.match(tokens, salt)[0]


@pytest.mark.parametrize(("n_pages", "page"), [(0, 4), (4, 0), (-1, 4)])
def test_an_empty_pool_is_refused(n_pages: int, page: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        PagePool(n_pages, page)


def test_a_known_prefix_is_found_page_by_page() -> None:
    pool = PagePool(8, 2)
    pages = filled(pool, [1, 2, 3, 4, 5])
    assert reach(pool, [1, 2, 3, 4, 5, 6]) == pages[:2]
    assert reach(pool, [1, 2, 9, 9]) == pages[:1]
    assert reach(pool, [9, 2, 3, 4]) == []


def test_at_least_one_token_is_left_to_compute() -> None:
    pool = PagePool(8, 2)
    pages = filled(pool, [1, 2, 3, 4])
    assert reach(pool, [1, 2, 3, 4]) == pages[:1]
    assert reach(pool, [1, 2, 3, 4, 0]) == pages
    assert reach(pool, [1, 2]) == []
    assert reach(pool, [1]) == []


def test_with_pages_of_one_token_all_but_the_last_are_found() -> None:
    pool = PagePool(8, 1)
    pages = filled(pool, [1, 2, 3])
    assert reach(pool, [1, 2, 3]) == pages[:2]


def test_a_page_that_is_not_full_is_never_found() -> None:
    pool = PagePool(8, 4)
    filled(pool, [1, 2, 3])
    assert reach(pool, [1, 2, 3, 4, 5]) == []


def test_the_same_tokens_behind_another_prefix_are_another_page() -> None:
    pool = PagePool(8, 2)
    filled(pool, [1, 2, 7, 7])
    other = filled(pool, [3, 4, 7, 7])
    assert reach(pool, [3, 4, 7, 7, 0]) == other
    assert reach(pool, [7, 7, 0]) == []


def test_equal_hashes_are_not_equal_tokens() -> None:
    assert hash((-1, 5)) == hash((-2, 5))
    pool = PagePool(8, 2)
    filled(pool, [-1, 5])
    assert reach(pool, [-2, 5, 0]) == []
    assert len(reach(pool, [-1, 5, 0])) == 1


def test_big_tokens_with_equal_hashes_are_not_mixed_up() -> None:
    modulus = (1 << 61) - 1  # Python's hash of an int is its remainder by this
    assert hash((3, 4)) == hash((3 + modulus, 4))
    pool = PagePool(8, 2)
    filled(pool, [3, 4])
    assert reach(pool, [3 + modulus, 4, 0]) == []


def test_salts_never_share() -> None:
    pool = PagePool(16, 2)
    by_salt = {salt: filled(pool, [1, 2, 3, 4], salt) for salt in ("", "a", "b", "0")}
    assert len({p for pages in by_salt.values() for p in pages}) == 8
    for salt, pages in by_salt.items():
        assert reach(pool, [1, 2, 3, 4, 5], salt) == pages
    assert reach(pool, [1, 2, 3, 4, 5], "c") == []


def test_a_salt_that_looks_like_a_node_number_is_still_a_salt() -> None:
    pool = PagePool(16, 1)
    filled(pool, [1, 2, 3])
    for salt in map(str, range(4)):
        assert reach(pool, [2, 3], salt) == []


def test_twins_keep_the_first_page_and_the_second_one_stays_private() -> None:
    pool = PagePool(8, 2)
    first, second = pool.take(2), pool.take(2)
    assert first is not None
    assert second is not None
    pool.publish([1, 2, 3, 4], first, Known(0, ""))
    pool.publish([1, 2, 3, 4], second, Known(0, ""))
    assert reach(pool, [1, 2, 3, 4, 5]) == first
    pool.release(first)
    pool.release(second)
    assert reach(pool, [1, 2, 3, 4, 5]) == first
    assert pool.n_free == 8


def test_a_twin_builds_on_the_page_that_was_published_first() -> None:
    pool = PagePool(8, 2)
    first, second = pool.take(1), pool.take(2)
    assert first is not None
    assert second is not None
    pool.publish([1, 2], first, Known(0, ""))
    pool.publish([1, 2, 3, 4], second, Known(0, ""))
    assert reach(pool, [1, 2, 3, 4, 5]) == [first[0], second[1]]


def test_publishing_in_parts_is_publishing_at_once() -> None:
    pool = PagePool(8, 2)
    tokens = [1, 2, 3, 4, 5, 6]
    pages = pool.take(3)
    assert pages is not None
    known = Known(0, "")
    for end in range(len(tokens) + 1):
        known = pool.publish(tokens[:end], pages, known)
        assert known.n_pages == end // 2
    assert reach(pool, [*tokens, 0]) == pages


def test_released_pages_are_found_until_they_are_needed() -> None:
    pool = PagePool(4, 2)
    pages = filled(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.n_free == 4
    found, _ = pool.match([1, 2, 3, 4, 5])
    assert found == pages
    again = pool.take(1, found)
    assert again is not None
    assert again[:2] == pages
    assert pool.n_free == 1


def test_the_pages_that_were_free_longest_are_overwritten_first() -> None:
    pool = PagePool(4, 1)
    old, new = filled(pool, [1, 2]), filled(pool, [3, 4])
    pool.release(old)
    pool.release(new)
    assert pool.take(3) == [old[1], old[0], new[1]]
    assert reach(pool, [3, 0]) == new[:1]


def test_a_prefix_that_was_used_again_is_young_again() -> None:
    pool = PagePool(4, 1)
    a, b = filled(pool, [1, 2]), filled(pool, [3, 4])
    pool.release(a)
    pool.release(b)
    pool.take(0, a)
    pool.release(a)
    assert pool.take(2) == [b[1], b[0]]


def test_leaves_are_overwritten_before_the_prefixes_they_stand_on() -> None:
    pool = PagePool(3, 2)
    pages = filled(pool, [1, 2, 3, 4, 5, 6])
    pool.release(pages)
    pool.take(1)
    assert reach(pool, [1, 2, 3, 4, 5, 6, 0]) == pages[:2]


def test_an_overwritten_page_takes_everything_behind_it_out_of_reach() -> None:
    pool = PagePool(4, 1)
    root = filled(pool, [1])
    leaf = pool.take(1, root)
    assert leaf is not None
    pool.publish([1, 2], leaf, pool.match([1, 9])[1])
    pool.release(root)
    pool.release(root)  # only the leaf is held on to
    assert reach(pool, [1, 2, 0]) == leaf
    for _ in range(3):
        pool.take(1)
    assert reach(pool, [1, 2, 0]) == []


def test_a_root_computed_again_does_not_find_leaves_of_the_old_one() -> None:
    pool = PagePool(3, 1)
    old = filled(pool, [1, 2])
    pool.release(old[:1])
    assert pool.take(2) == [2, old[0]]
    assert reach(pool, [1, 2, 0]) == []
    pool.publish([1], [2], Known(0, ""))
    assert reach(pool, [1, 2, 0]) == [2]


def test_too_few_pages_take_nothing() -> None:
    pool = PagePool(4, 2)
    pages = filled(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.take(3, pages) is None
    assert pool.take(5) is None
    assert pool.n_free == 4
    assert pool.refs == [0, 0, 0, 0]


def test_spare_pages_are_left_free() -> None:
    pool = PagePool(4, 2)
    assert pool.take(3, spare=2) is None
    assert pool.take(2, spare=2) is not None
    assert pool.n_free == 2


def test_idle_pages_that_are_found_count_as_taken() -> None:
    pool = PagePool(3, 1)
    pages = filled(pool, [1, 2])
    pool.release(pages)
    assert pool.take(1, pages, spare=1) is None
    assert pool.take(0, pages, spare=1) == pages


def test_a_page_released_too_often_is_an_error() -> None:
    pool = PagePool(2, 2)
    pages = pool.take(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(ValueError, match="more often"):
        pool.release(pages)


@pytest.mark.parametrize("seed", range(10))
def test_the_pool_agrees_with_a_plain_account_of_who_holds_what(seed: int) -> None:
    """Random takes, shares and releases; a found page must hold exactly the tokens that were looked for."""
    rng = random.Random(seed)
    pool = PagePool(rng.randint(6, 16), rng.randint(1, 3))
    content: dict[int, tuple[str, tuple[int, ...]]] = {}  # page -> salt and the whole prefix up to its end
    held: list[list[int]] = []
    n_hits = 0
    for _ in range(600):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 8))]
            salt = rng.choice(("", "a"))
            found, known = pool.match(tokens, salt)
            assert known.n_pages == len(found)
            assert len(found) * pool.page < len(tokens)
            for i, p in enumerate(found):
                assert content[p] == (salt, tuple(tokens[: (i + 1) * pool.page]))
            n_new = -(-len(tokens) // pool.page) - len(found)
            n_free = pool.n_free
            pages = pool.take(n_new, found)
            if pages is None:
                assert n_free - sum(all(p not in h for h in held) for p in found) < n_new
                continue
            n_hits += len(found)
            for i in range(len(found), len(pages)):
                content[pages[i]] = (salt, tuple(tokens[: (i + 1) * pool.page]))
            pool.publish(tokens, pages, known)
            held.append(pages)
        refs = Counter(p for pages in held for p in pages)
        assert pool.refs == [refs[p] for p in range(pool.n_pages)]
        assert pool.n_free == pool.n_pages - len(refs)
    assert n_hits > 10
