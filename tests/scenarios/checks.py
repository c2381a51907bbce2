"""What must hold after every scenario."""

import psutil

from brigade.engine.fleet import Fleet
from tests.engine.asking import until
from tests.engine.conftest import workers
from tests.scenarios import fleets
from tests.scenarios.link import Link

RECOVERED = 20.0
"""Seconds by which lost ranks are there again."""
PAGES_BACK = 5.0


class Before:
    """What a fleet was like when a scenario began."""

    def __init__(self, fleet: Fleet, link: Link | None) -> None:
        self._link = link
        self.n_processes, self.n_files = len(fleets.pids(fleet)), self.files()
        self.transfers = fleet.transfers.copy()

    def files(self) -> int:
        """Open files of this process."""
        n: int = psutil.Process().num_fds()
        return n - (self._link.n_files if self._link else 0)

    def new_transfers(self, fleet: Fleet) -> set[str]:
        return set(fleet.transfers - self.transfers)


async def nothing_is_left(fleet: Fleet, before: Before) -> None:
    """Every unit serves, no request is in any state, no rank holds a page, and there is one process for each rank."""
    assert await until(lambda: fleets.all_up(fleet) and fleet.health().ready, RECOVERED), fleet.health().reason
    assert sum(fleet.states().values()) == 0, fleet.states()
    await fleets.news(fleet)
    assert await until(lambda: _idle(fleet), PAGES_BACK), fleet.stats()
    assert len(fleets.pids(fleet)) == before.n_processes
    assert set(fleets.pids(fleet)) <= workers()
    assert await until(lambda: before.files() <= before.n_files, 2), "files stay open"


def _idle(fleet: Fleet) -> bool:
    """Whether no rank has a page or a request, as far as is known; asks them for news."""
    fleets.ask_for_stats(fleet)
    s = fleet.stats()
    return not (s.pages_used or s.pages_reserved or s.pages_offered or s.running or s.waiting)
