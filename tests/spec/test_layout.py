"""Ranks go through the hosts in order."""

import pytest

from brigade.spec.layout import Host, Layout, links, n_sharing, on_one_host


def test_ranks_are_numbered_through_the_hosts() -> None:
    layout = Layout((Host("a", 2), Host("b", 1), Host("c", 3)))
    assert layout.n_ranks == 6
    assert [list(layout.ranks(h)) for h in range(3)] == [[0, 1], [2], [3, 4, 5]]
    assert [layout.host_of(r) for r in range(6)] == [0, 0, 1, 2, 2, 2]


def test_one_host_has_all() -> None:
    assert on_one_host(4).sizes == (4,)


def test_hosts_are_nodes_for_placing_experts_where_they_are_alike() -> None:
    assert Layout((Host("a", 2), Host("b", 2))).n_nodes == 2
    assert Layout((Host("a", 2), Host("b", 1))).n_nodes == 1
    assert on_one_host(4).n_nodes == 1


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="host b needs at least one rank, not 0"):
        Layout((Host("a", 1), Host("b", 0)))
    with pytest.raises(ValueError, match="host a is there twice"):
        Layout((Host("a", 1), Host("a", 1)))
    with pytest.raises(ValueError, match="at least one host"):
        Layout(())
    with pytest.raises(ValueError, match="rank must be 0 to 1, not 2"):
        on_one_host(2).host_of(2)


def test_ranks_of_one_host_hand_over_through_its_memory_and_the_rest_over_tcp() -> None:
    a, b, both = (Layout(tuple(Host(x, 1) for x in hosts)) for hosts in ("a", "b", "ab"))
    assert links([a, a]) == ("shared",)
    assert links([a, b]) == ("tcp",)
    assert links([a, both]) == links([a, b, a]) == ("shared", "tcp")
    assert links([both]) == ()


def test_ranks_of_all_units_share_a_host_and_the_loopback_is_one_machine() -> None:
    one, two = Layout((Host("10.0.0.1", 2), Host("10.0.0.2", 1))), Layout((Host("10.0.0.2", 4),))
    assert (n_sharing([one, two], "10.0.0.1"), n_sharing([one, two], "10.0.0.2")) == (2, 5)
    assert n_sharing([Layout((Host("127.0.0.1", 1), Host("127.0.1.3", 2), Host("10.0.0.2", 4)))], "127.0.0.2") == 3
