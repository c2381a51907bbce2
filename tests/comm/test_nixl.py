"""What NIXL does not do itself: transfers end at our deadline, and one that was given up writes into no page.

NIXL is made up here, so that this is tested everywhere; where it is installed, test_kv runs on it, too.
"""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from brigade.comm.kv import nixl
from brigade.comm.kv.link import Failed
from brigade.comm.kv.nixl import Nixl
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.rows import Bytes
from brigade.comm.kv.tcp import Caller

CALLER = Caller(b"sixteen bytes or more")


class Broken(Exception):
    """An error of NIXL's."""


class Agent:
    """Copies when it is asked for the state of a transfer, unless it was told to do something else."""

    def __init__(self, name: str, config: Any) -> None:
        self.config, self.registered, self.peers = config, list[Any](), list[str]()
        self.does: Callable[[Callable[[], None]], str] = self.copies
        self.released = 0

    @staticmethod
    def copies(copy: Callable[[], None]) -> str:
        copy()
        return "success"

    def createBackend(self, name: str, options: dict[str, str]) -> None: ...

    def registerMem(self, memory: Any, backends: list[Any]) -> None:
        self.registered += memory

    def getLocalMD(self) -> bytes:
        return b"me"

    def loadRemoteMD(self, metadata: bytes) -> bytes:
        self.peers.append(metadata.decode())
        return metadata

    def invalidateRemoteMD(self, name: str) -> None:
        self.peers.remove(name)

    def createXferReq(self, what: str, here: Any, there: Any, peer: str, *rest: Any) -> Callable[[], None]:
        def copy() -> None:
            for (to, n, _), (source, m, _) in zip(here, there, strict=True):
                assert n == m
                ctypes.memmove(to, source, n)

        return copy

    def postXferReq(self, transfer: Callable[[], None], note: str) -> str:
        return "under way"

    def getXferStatus(self, transfer: Callable[[], None]) -> str:
        return self.does(transfer)

    def releaseXferReq(self, transfer: Callable[[], None]) -> None:
        self.released += 1


def made_up() -> tuple[Nixl, Agent]:
    bindings = SimpleNamespace(
        **{"nixlAgentConfig": SimpleNamespace, "nixlAgent": Agent, "nixlBackendError": Broken},
        **{"NIXL_THREAD_SYNC_STRICT": 1, "DRAM_SEG": 0, "NIXL_READ": "read"},
        **{"NIXL_IN_PROG": "under way", "NIXL_SUCCESS": "success"},
        **{"nixlRegDList": lambda segment, memory: memory, "nixlXferDList": lambda segment, lists: lists},
    )
    end = Nixl(CALLER, bindings)
    return end, end._agent


def goes_on() -> None: ...


@pytest.fixture
def memory() -> Bytes:
    return np.random.default_rng(1).integers(0, 256, 1000, np.uint8)


def test_rows_are_read_one_after_the_other_into_memory_that_is_used_again(memory: Bytes) -> None:
    end, agent = made_up()
    where = end.register(memory)
    first = end.read(where, [(100, 50), (10, 5)], 1, goes_on)
    assert bytes(first[:55]) == bytes(memory[100:150]) + bytes(memory[10:15])
    other = end.read(where, [(0, 1000)], 1, goes_on)
    assert other is not first
    end.done(first)
    assert end.read(where, [(7, 1)], 1, goes_on) is first
    assert agent.released == 3
    assert agent.peers == ["me"]
    assert agent.config.pthrDelay > 0, "its progress thread spins"


def test_a_transfer_that_never_ends_ends_at_our_deadline_and_its_memory_is_not_used_again(memory: Bytes) -> None:
    end, agent = made_up()
    where, lost = end.register(memory), list[Callable[[], None]]()

    def stays(copy: Callable[[], None]) -> str:
        lost.append(copy)
        return "under way"

    agent.does = stays
    with pytest.raises(Failed, match="did not end in time"):
        end.read(where, [(0, 100)], 0.01, goes_on)
    assert agent.peers == []
    agent.does = agent.copies
    landing = end.read(where, [(500, 100)], 1, goes_on)
    lost[0]()  # it goes on all the same
    assert bytes(landing[:100]) == bytes(memory[500:600])


def test_memory_of_a_transfer_that_nobody_waits_for_is_used_again_when_it_has_ended(memory: Bytes) -> None:
    end, agent = made_up()
    where = end.register(memory)

    def stop() -> None:
        raise Failed("it was stopped")

    agent.does = lambda copy: "under way"
    with pytest.raises(Failed, match="it was stopped"):
        end.read(where, [(0, 100)], 1, stop)
    (left,) = [landing for _, landing in end._left]
    with pytest.raises(Failed, match="in time"):
        end.read(where, [(0, 100)], 0, goes_on)
    agent.does = agent.copies
    assert end.read(where, [(0, 100)], 1, goes_on) is left
    assert not end._left


def test_one_that_goes_wrong_is_a_failure_and_the_next_connects_anew(memory: Bytes) -> None:
    end, agent = made_up()
    where = end.register(memory)

    def breaks(copy: Callable[[], None]) -> str:
        raise Broken("the other side is gone")

    agent.does = breaks
    with pytest.raises(Failed, match="NIXL: the other side is gone"):
        end.read(where, [(0, 100)], 1, goes_on)
    agent.does = lambda copy: "mismatch"
    with pytest.raises(Failed, match="ended with mismatch"):
        end.read(where, [(0, 100)], 1, goes_on)
    assert agent.peers == []
    assert not end._idle


def test_a_rank_does_not_lose_memory_without_end(memory: Bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "_MOST_LOST", 2)
    end, agent = made_up()
    where = end.register(memory)
    agent.does = lambda copy: "under way"
    for _ in range(2):
        with pytest.raises(Failed, match="in time"):
            end.read(where, [(0, 100)], 0, goes_on)
    with pytest.raises(Failed, match="2 NIXL transfers never ended"):
        end.read(where, [(0, 100)], 0, goes_on)


def test_an_offer_of_a_rank_without_nixl_is_refused() -> None:
    end, _ = made_up()
    with pytest.raises(Failed, match="over NIXL"), end.open(Offer(1, 0, 8, 4, 4, 1, 8, "127.0.0.1:1"), [0]):
        pass
