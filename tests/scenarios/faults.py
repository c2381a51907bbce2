"""What can go wrong, each as a function of the scene."""

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from brigade.core.handover import State
from brigade.core.roles import Side
from brigade.engine.crew import QUIET
from tests.engine.asking import until
from tests.scenarios.fleets import any_up, pid_of, state_of
from tests.scenarios.link import Harm
from tests.scenarios.one_rank import GREEDY

if TYPE_CHECKING:
    from tests.scenarios.scenario import Fault, Scene


def kill(*sides: Side) -> "Fault":
    """kill -9 of the ranks that have the watched request."""

    async def do(scene: "Scene") -> None:
        for side in sides:
            os.kill(scene.pid(side), signal.SIGKILL)

    return do


async def kill_all(scene: "Scene") -> None:
    """kill -9 of every rank at once."""
    for pid in scene.pids("prefill") + scene.pids("decode"):
        os.kill(pid, signal.SIGKILL)


async def leave(scene: "Scene") -> None:
    """The client of the watched request leaves; the fleet must not think of it any more."""
    scene.watched.cancel()
    assert scene.watched.rid not in scene.fleet._flights


async def another_leaves(scene: "Scene") -> None:
    """A client comes while there is no decode rank, and leaves again."""
    assert await until(lambda: not any_up(scene.fleet, "decode"), 2)
    n = scene.fleet.states()["queued"]
    another = asyncio.create_task(scene.fleet.submit([5, 6, 7], GREEDY))
    assert await until(lambda: scene.fleet.states()["queued"] > n, 2)
    another.cancel()
    assert await until(lambda: scene.fleet.states()["queued"] == n, 2)


async def wait_for_the_deadline(scene: "Scene") -> None:
    assert await until(lambda: state_of(scene.fleet, scene.watched) is State.ENDED, 3)


def pause(side: Side, seconds: float) -> "Fault":
    """The rank that has the watched request stands still for a while, which is nobody's loss."""

    async def do(scene: "Scene") -> None:
        pid = scene.pid(side)
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        scene.go_on(pid)

    return do


def freeze(side: Side) -> "Fault":
    """It stands still for ever, and no other does."""

    async def do(scene: "Scene") -> None:
        pid = scene.pid(side)
        os.kill(pid, signal.SIGSTOP)
        scene.stopped.discard(pid)
        scene.go_on(*scene.stopped)

    return do


def newcomers_avoid(side: Side) -> "Fault":
    """Who comes now is not given to the rank of the watched request, although that is not known to be lost."""

    async def do(scene: "Scene") -> None:
        pid = scene.pid(side)
        await asyncio.sleep(QUIET)
        newcomers = [await scene.fleet.submit([5, 6, 7 + i], GREEDY) for i in range(6)]
        assert pid in scene.pids(side)
        assert pid not in [pid_of(scene.fleet, newcomer, side) for newcomer in newcomers]

    return do


def harm(what: Harm, times: int = 1) -> "Fault":
    """The link to prefill ranks does this to so many of the next transfers."""

    async def do(scene: "Scene") -> None:
        assert scene.link is not None
        scene.link.harm(what, times)

    return do
