"""What a rank was sent before, in whole pages, within bounds and apart by tenant."""

from brigade.core.prefixes import SentPrefixes


def test_whole_pages_of_a_shared_beginning_are_known() -> None:
    sent = SentPrefixes(page=4, most=100)
    sent.add(list(range(10)))
    assert sent.known(list(range(10))) == 8
    assert sent.known([*range(8), 99, 98, 97, 96]) == 8
    assert sent.known([*range(7), 99]) == 4
    assert sent.known([99, *range(1, 10)]) == 0
    assert sent.known([1, 2, 3]) == 0


def test_a_page_counts_only_behind_the_pages_before_it() -> None:
    sent = SentPrefixes(page=2, most=100)
    sent.add([1, 2, 3, 4])
    assert sent.known([3, 4]) == 0


def test_tenants_do_not_know_each_others_prompts() -> None:
    sent = SentPrefixes(page=2, most=100)
    sent.add([1, 2, 3, 4], "a")
    assert sent.known([1, 2, 3, 4], "a") == 4
    assert sent.known([1, 2, 3, 4], "b") == sent.known([1, 2, 3, 4]) == 0


def test_the_oldest_pages_are_forgotten_and_used_ones_kept() -> None:
    sent = SentPrefixes(page=1, most=3)
    sent.add([1, 2])
    sent.add([5])
    sent.add([1])
    sent.add([6])
    assert [sent.known(p) for p in ([1], [1, 2], [5], [6])] == [1, 1, 1, 1]  # [1, 2] has lost its second page
