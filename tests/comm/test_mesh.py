"""The port between ranks: strangers are turned away without harm, strangers to the layout are told why."""

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from brigade.comm.group import PeerLost
from brigade.comm.handshake import Hello, Refused
from brigade.comm.meeting import listen
from brigade.comm.mesh import Mesh

SECRET, LAYOUT = b"a secret of ranks", b"l" * 32


def start(
    listeners: list[socket.socket],
    deadline: float = 5,
    odd: dict[int, dict[str, object]] | None = None,
    ranks: tuple[int, ...] = (),
) -> list["Future[Mesh]"]:
    """Ranks as threads of this process. `odd` changes what one of them believes."""
    addresses = [s.getsockname()[:2] for s in listeners]
    pool = ThreadPoolExecutor(len(listeners))

    def one(rank: int) -> Mesh:
        said = {"secret": SECRET, "layout": LAYOUT, "generation": 1, "deadline": deadline, **(odd or {}).get(rank, {})}
        return Mesh(rank, addresses, listeners[rank], **said)  # type: ignore[arg-type]

    futures = [pool.submit(one, r) for r in ranks or range(len(listeners))]
    pool.shutdown(wait=False)
    return futures


def listeners(n: int) -> list[socket.socket]:
    return [listen("127.0.0.1") for _ in range(n)]


def both(meshes: list[Mesh], call: Callable[[Mesh], object]) -> list[object]:
    with ThreadPoolExecutor(len(meshes)) as pool:
        return list(pool.map(call, meshes))


def test_it_listens_on_the_given_address_and_only_until_all_are_there() -> None:
    socks = listeners(2)
    addresses = [s.getsockname() for s in socks]
    assert [a[0] for a in addresses] == ["127.0.0.1"] * 2
    meshes = [f.result(5) for f in start(socks)]
    for address in addresses:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, 1)
    for mesh in meshes:
        mesh.close()


def test_large_buffers_cross_both_ways_at_once() -> None:
    meshes = [f.result(5) for f in start(listeners(3))]
    sizes = [0, 1, 20_000_000]

    def swap(mesh: Mesh) -> list[bytes]:
        return [bytes(b) for b in mesh.all_to_all([bytes([mesh.rank]) * sizes[(mesh.rank + r) % 3] for r in range(3)])]

    for rank, got in enumerate(both(meshes, swap)):
        assert got == [bytes([r]) * sizes[(r + rank) % 3] for r in range(3)]
    for mesh in meshes:
        mesh.close()


def test_silent_and_babbling_clients_neither_block_nor_crash_the_meeting() -> None:
    socks = listeners(2)
    address = socks[0].getsockname()
    silent = [socket.create_connection(address) for _ in range(20)]
    over = threading.Event()

    def babble() -> None:
        while not over.is_set():
            try:
                with socket.create_connection(address, 1) as s:
                    s.sendall(os.urandom(1 + os.urandom(1)[0] * 4))
            except OSError:
                time.sleep(0.01)

    threads = [threading.Thread(target=babble) for _ in range(3)]
    for t in threads:
        t.start()
    begun = time.monotonic()
    first = start(socks, deadline=10, ranks=(0,))
    time.sleep(0.5)
    second = start(socks, deadline=10, ranks=(1,))
    meshes = [first[0].result(12), second[0].result(12)]
    over.set()
    for t in threads:
        t.join()
    assert time.monotonic() - begun < 5
    assert both(meshes, lambda m: m.share([m.rank])) == [[(0,), (1,)]] * 2
    for thing in (*silent, *meshes):
        thing.close()


def test_idle_connections_that_were_there_first_do_not_keep_ranks_apart() -> None:
    socks = listeners(2)
    silent = [socket.create_connection(socks[0].getsockname()) for _ in range(64)]
    begun = time.monotonic()
    meshes = [f.result(5) for f in start(socks)]
    assert time.monotonic() - begun < 1.5
    for thing in (*silent, *meshes):
        thing.close()


def test_a_hello_cut_or_flipped_anywhere_is_turned_away() -> None:
    socks = listeners(2)
    address = socks[0].getsockname()
    first = start(socks, deadline=10, ranks=(0,))
    hello = Hello(1, 2, 1, LAYOUT, os.urandom(32)).pack()
    for i in range(0, len(hello), 5):
        for data in (hello[:i], hello[:i] + bytes([hello[i] ^ 1]) + hello[i + 1 :] + os.urandom(32)):
            with socket.create_connection(address, 5) as s:
                s.sendall(data)
                s.shutdown(socket.SHUT_WR)
                s.settimeout(5)
                try:
                    answered = len(s.recv(1000))
                except ConnectionResetError:
                    answered = 0
                assert answered in (0, len(hello) + 32), "never a welcome"
    second = start(socks, deadline=10, ranks=(1,))
    for future in first + second:
        future.result(12).close()


def test_who_knows_no_secret_is_refused_and_told_so() -> None:
    futures = start(listeners(2), deadline=1, odd={1: {"secret": b"another secret..."}})
    with pytest.raises(Refused, match="another secret"):
        futures[1].result(5)
    with pytest.raises(PeerLost, match="rank 1: did not come"):
        futures[0].result(5)


def test_another_layout_is_refused_with_both_values() -> None:
    for future in start(listeners(2), odd={1: {"layout": b"m" * 32}}):
        with pytest.raises(Refused) as e:
            future.result(5)
        assert all(s in str(e.value) for s in ("layout: ", "6c6c6c6c6c6c6c6c", "6d6d6d6d6d6d6d6d"))


def test_a_rank_that_was_left_behind_hears_it_at_once() -> None:
    ahead, behind = start(listeners(2), deadline=1, odd={1: {"generation": 7}})[::-1]
    with pytest.raises(PeerLost, match="rank 1 is in generation 7, this one in 1"):
        behind.result(0.8)
    with pytest.raises(PeerLost, match="rank 0: did not come to the meeting of generation 7"):
        ahead.result(5)


def test_a_rank_that_moved_on_first_waits_for_those_that_have_not_left_the_last_meeting() -> None:
    kept = listeners(2)
    addresses = [s.getsockname()[:2] for s in kept]

    def meeting(rank: int, generation: int) -> Mesh:
        said = {"secret": SECRET, "layout": LAYOUT, "generation": generation, "deadline": 5}
        return Mesh(rank, addresses, kept[rank].dup(), **said)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        for last in (0, 1):
            first = pool.submit(meeting, 1 - last, 7)
            with pytest.raises(PeerLost, match="generation 7"):
                meeting(last, 6)
            both_there = [meeting(last, 7), first.result(5)]
            for mesh in both_there:
                mesh.close()
    for sock in kept:
        sock.close()


def test_a_supervisor_ends_a_wait_and_a_meeting_and_says_who_is_to_blame() -> None:
    culprits: list[int] | None = None
    socks = listeners(3)
    odd: dict[int, dict[str, object]] = {r: {"stopped": lambda: culprits} for r in range(2)}
    meshes = [f.result(5) for f in start(socks, deadline=20, odd=odd)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(meshes[0].share, [1])
        time.sleep(0.2)
        culprits = [2]
        with pytest.raises(PeerLost, match="rank 2: the group was stopped"):
            waiting.result(1)
    with pytest.raises(PeerLost, match="rank 2: lost, as rank 0 tells"):
        meshes[2].share([1])
    alone = start(listeners(3), deadline=20, odd=odd, ranks=(0,))[0]
    with pytest.raises(PeerLost, match="rank 2: the meeting of generation 1 was stopped"):
        alone.result(1)
    for mesh in meshes:
        mesh.close()


def test_a_rank_that_waits_for_the_lost_one_is_not_taken_for_lost_by_a_third() -> None:
    """Rank 1 says nothing; rank 0 waits for it, and rank 2, which began to wait first, for both."""
    meshes = [f.result(5) for f in start(listeners(3), deadline=2)]
    with ThreadPoolExecutor(2) as pool:
        third = pool.submit(meshes[2].share, [1])
        time.sleep(0.2)
        second = pool.submit(meshes[0].collect, 8, [1])
        for waiting in (second, third):
            with pytest.raises(PeerLost) as e:
                waiting.result(3)
            assert e.value.ranks == (1,)
    for mesh in meshes:
        mesh.close()


def test_a_group_that_lost_a_rank_says_so_again_at_once() -> None:
    meshes = [f.result(5) for f in start(listeners(3), deadline=0.4)]
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises(PeerLost):
            meshes[0].share([1])
        took = time.monotonic() - begun
    assert took < 0.1
    for mesh in meshes:
        mesh.close()


def test_another_version_is_refused_with_both_values() -> None:
    here, there = (Hello(r, 2, 1, LAYOUT, bytes(32), version) for r, version in ((0, 1), (1, 2)))
    assert here.differences(there) == "protocol version: 1 here, 2 there"
    assert Hello.unpack(there.pack()).version == 2


def test_those_who_do_not_come_are_named() -> None:
    begun = time.monotonic()
    futures = start(listeners(4), deadline=0.5, ranks=(0, 2))
    for future in futures:
        with pytest.raises(PeerLost) as e:
            future.result(5)
        assert e.value.ranks == (1, 3)
    assert time.monotonic() - begun < 2


def test_a_stop_from_another_thread_ends_the_wait_at_once() -> None:
    meshes = [f.result(5) for f in start(listeners(3), deadline=30)]
    threading.Timer(0.2, meshes[0].stop, [(2,)]).start()
    begun = time.monotonic()
    with pytest.raises(PeerLost) as e:
        meshes[0].share([1])
    with pytest.raises(PeerLost) as told:
        meshes[1].share([1])
    assert e.value.ranks == told.value.ranks == (2,)
    assert time.monotonic() - begun < 1
    for mesh in meshes:
        mesh.close()


@pytest.mark.parametrize("secret", [b"", b"short"])
def test_short_secrets_are_refused(secret: bytes) -> None:
    with pytest.raises(ValueError, match="secret: needs at least 16 bytes"):
        start(listeners(1), odd={0: {"secret": secret}})[0].result(5)
