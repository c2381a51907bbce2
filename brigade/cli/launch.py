"""From a deployment file to what runs: the settings of its head and of each other host. Starts nothing itself."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from brigade.cli.deployed import Deployed
from brigade.cli.deployment_file import read_deployment
from brigade.cli.explained import cannot_run, memory_of
from brigade.cli.fault import Fault
from brigade.cli.machine import disk_problem
from brigade.cli.secret import read_secret
from brigade.core.roles import Targets
from brigade.engine.auto import this_machine
from brigade.engine.config import EngineConfig, HostsConfig
from brigade.engine.fleet_config import FleetConfig, UnitConfig
from brigade.spec.config import BadConfig, read_spec
from brigade.spec.deploy import Units, unit_names
from brigade.spec.layout import Layout, is_loopback
from brigade.spec.model import ModelSpec

if TYPE_CHECKING:
    from brigade.engine.supervisor import JoinConfig


@dataclass(frozen=True)
class Launch:
    """What a deployment runs: one unit or several."""

    deployed: Deployed
    layouts: tuple[Layout, ...]
    """Of each unit."""
    fleet: FleetConfig
    hosts: HostsConfig | None
    """None: all ranks are on this machine."""

    @property
    def units(self) -> tuple[EngineConfig, ...]:
        return tuple(unit.engine for unit in self.fleet.units)

    def join(self, address: str, wait: float) -> "JoinConfig":
        """How the host with this address joins. Raises Fault for an address that is not in the file."""
        from brigade.engine.supervisor import JoinConfig
        from brigade.engine.terms import layout_terms

        others = self.hosts.others if self.hosts else ()
        if self.hosts is None or address not in others:
            known = f"they are {', '.join(others)}" if others else "there are none"
            raise Fault(f"{self.deployed.file}: {address} is not one of the hosts that join; {known}", 2)
        return JoinConfig(
            head=(self.hosts.here, self.hosts.port),
            address=address,
            secret=self.hosts.secret,
            model=self.units[0].model,
            wait=wait,
            terms=layout_terms(self.layouts, self.units, self.fleet.names),
        )


def read_launch(file: Path) -> Launch:
    """Read a deployment file and its secret. Raises Fault for what cannot be run."""
    deployed = Deployed(file, read_deployment(file))
    try:
        spec = read_spec(deployed.model, deployed.what.drafts)
    except BadConfig as e:
        raise Fault(str(e), 2) from e
    if problems := cannot_run(deployed, spec):
        raise Fault(f"{file}: {problems[0].removeprefix(f'{file}: ')}", 2)
    d = deployed.what
    each = [(units, layout) for units in d.units for layout in units.layouts()]
    units = tuple(
        UnitConfig(name=name, role=u.role, engine=engine_config(deployed, spec, u))
        for name, (u, _) in zip(unit_names(d), each, strict=True)
    )
    layouts = tuple(layout for _, layout in each)
    for unit, layout in zip(units, layouts, strict=True):
        if is_loopback(layout.hosts[0].address) and (problem := disk_problem(unit.engine.kv_disk)):
            raise Fault(f"{file}: kv_disk: {problem}", 2)
    targets = Targets(d.change_roles.prefill_seconds, d.change_roles.decode_seconds) if d.change_roles else None
    fleet = FleetConfig(units=units, targets=targets, link=d.link or "shared")
    return Launch(deployed, layouts, fleet, _hosts(deployed, layouts))


def engine_config(deployed: Deployed, spec: ModelSpec, units: Units | None = None) -> EngineConfig:
    """Settings of a unit (None: the first), as `brigade explain` shows them: with rank_memory, the cache is what it
    leaves."""
    units = units or deployed.what.units[0]
    layout = units.layouts()[0]
    engine = deployed.engine_config(units, layout.n_ranks)
    if deployed.what.rank_memory is None or engine.kv_bytes:
        return engine
    memory = memory_of(deployed, spec, this_machine(), units, layout)
    if not memory.kv_cache:
        raise Fault(f"{deployed.file}: rank_memory: {memory.verdict}", 2)
    return replace(engine, kv_bytes=memory.kv_cache)


def _hosts(deployed: Deployed, layouts: tuple[Layout, ...]) -> HostsConfig | None:
    d = deployed.what
    if not d.other_hosts or d.secret_file is None:
        return None
    secret = read_secret(str(deployed.path(d.secret_file)))
    return HostsConfig(layouts=layouts, head=d.head, secret=secret, port=d.host_port)
