"""Starts the units of a fleet at the same time, here and on the hosts that join, and ends them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from brigade.comm.kv.nixl import INSTALL, installed
from brigade.engine.client import Engine
from brigade.engine.config import HostsConfig, KvConfig
from brigade.engine.fleet_config import FleetConfig
from brigade.engine.kv_host import KvHost
from brigade.engine.messages import Loading
from brigade.engine.output import LoadError, Observer
from brigade.engine.rendezvous import Rendezvous
from brigade.engine.site import Site
from brigade.engine.unit import check_ranks
from brigade.spec.config import BadConfig, read_spec
from brigade.spec.layout import Layout, on_one_host


@dataclass
class Base:
    """What a fleet runs on. `close` it at the end."""

    config: FleetConfig
    layouts: tuple[Layout, ...]
    """Of each unit."""
    engines: list[Engine] = field(default_factory=list)
    """Of each unit; all are up after `start_units`."""
    rendezvous: Rendezvous | None = None
    """Where other hosts are met."""
    kv: KvHost | None = None
    """What the ranks here share, to give each other prompts; a unit alone needs nothing of it."""

    async def close(self, failure: str = "") -> None:
        """End all units. `failure`: why the fleet could not start, for the other hosts."""
        await asyncio.gather(*(engine.close() for engine in self.engines))
        if self.rendezvous is not None:
            await self.rendezvous.close(failure or "the head was ended", bool(failure))
        if self.kv is not None:
            self.kv.close()
        self.rendezvous = self.kv = None


async def start_units(
    config: FleetConfig, hosts: HostsConfig | None, progress: Callable[[Loading], None], observer: Observer
) -> Base:
    """All units, up. `hosts`: where each one runs, and how the others reach this one; None: all run here.

    Raises LoadError; then nothing is left of any unit.
    """
    if config.link == "nixl" and not installed():
        raise LoadError(f"link nixl: the package nixl-cu12 is not here; {INSTALL}")
    _check(config)
    layouts = tuple(on_one_host(u.engine.ranks) for u in config.units) if hosts is None else hosts.layouts
    base = Base(config, layouts)
    try:
        await _start(base, await _sites(base, hosts), progress, observer)
    except BaseException as e:
        await base.close(str(e) if isinstance(e, LoadError) else "")
        raise
    return base


def _check(config: FleetConfig) -> None:
    """What the small files of the checkpoint tell, before other hosts are waited for. Raises LoadError."""
    for unit in (u.engine for u in config.units):
        try:
            check_ranks(unit, read_spec(Path(unit.model), unit.drafts))
        except BadConfig as e:
            raise LoadError(str(e)) from e


async def _sites(base: Base, hosts: HostsConfig | None) -> list[Site]:
    """Where each unit runs; all its hosts are there. Raises LoadError."""
    config, here, secret = base.config, base.layouts[0].hosts[0].address, b""
    if hosts is not None:
        here, secret = hosts.here, hosts.secret
    names = config.names if len(config.units) > 1 else ("",)
    if len(config.units) > 1:
        base.kv = KvHost.create(here, base.layouts, secret)
    if hosts is None:
        return [Site(layout, unit=i, name=names[i], kv=base.kv) for i, layout in enumerate(base.layouts)]
    base.rendezvous = await Rendezvous.open([u.engine for u in config.units], hosts, config.names)
    await base.rendezvous.wait()
    others = base.rendezvous.units
    return [Site(layout, others[i], secret, i, names[i], base.kv) for i, layout in enumerate(base.layouts)]


async def _start(base: Base, sites: list[Site], progress: Callable[[Loading], None], observer: Observer) -> None:
    units = base.config.units
    told = [Loading(0, 0)] * len(units)
    kv = KvConfig(link=base.config.link) if base.kv is not None else None

    async def start(i: int) -> Engine:
        def tell(loading: Loading) -> None:
            told[i] = loading
            progress(Loading(sum(x.done for x in told), sum(x.total for x in told)))

        return await Engine.start(units[i].engine, progress=tell, observer=observer, site=sites[i], kv=kv)

    starting = [asyncio.create_task(start(i)) for i in range(len(units))]
    try:
        await asyncio.wait(starting, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in starting:
            task.cancel()  # no more than a word to those that are up
        ends = await asyncio.gather(*starting, return_exceptions=True)
        base.engines = [engine for engine in ends if isinstance(engine, Engine)]
    for unit, end in zip(units, ends, strict=True):
        if isinstance(end, LoadError):
            raise end if len(units) == 1 else LoadError(f"{unit.name}: {end}")
    for task in starting:
        task.result()
