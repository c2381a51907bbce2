"""From a deployment file to what runs: the settings of its head and of each other host. Starts nothing itself."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from brigade.cli.deployed import Deployed
from brigade.cli.deployment_file import read_deployment
from brigade.cli.explained import cannot_run, is_fleet, memory_of
from brigade.cli.fault import Fault
from brigade.cli.secret import read_secret
from brigade.engine.auto import this_machine
from brigade.engine.config import EngineConfig, HostsConfig
from brigade.engine.fleet import FleetConfig
from brigade.spec.config import BadConfig, read_spec
from brigade.spec.deploy import Units
from brigade.spec.layout import Layout
from brigade.spec.model import ModelSpec

if TYPE_CHECKING:
    from brigade.engine.supervisor import JoinConfig


@dataclass(frozen=True)
class Launch:
    """What a deployment runs: one unit, or a fleet of several on this machine."""

    deployed: Deployed
    layout: Layout
    engine: EngineConfig
    hosts: HostsConfig | None
    """None: the unit is on one host."""
    fleet: FleetConfig | None = None
    """All units where prompts are computed by units of their own; `engine` is the first of them then."""

    def join(self, address: str, wait: float) -> "JoinConfig":
        """How the host with this address joins the unit. Raises Fault for an address that is not in the file."""
        from brigade.engine.supervisor import JoinConfig
        from brigade.engine.terms import layout_terms

        others = [h.address for h in self.layout.hosts[1:]]
        if self.hosts is None or address not in others:
            known = f"they are {', '.join(others)}" if others else "there are none"
            raise Fault(f"{self.deployed.file}: {address} is not one of the hosts that join; {known}", 2)
        return JoinConfig(
            head=(self.layout.hosts[0].address, self.hosts.port),
            address=address,
            secret=self.hosts.secret,
            model=self.engine.model,
            wait=wait,
            terms=layout_terms(self.layout, self.engine),
        )


def read_launch(file: Path) -> Launch:
    """Read a deployment file and its secret. Raises Fault for what cannot be run."""
    deployed = Deployed(file, read_deployment(file))
    try:
        spec = read_spec(deployed.model)
    except BadConfig as e:
        raise Fault(str(e), 2) from e
    if problems := cannot_run(deployed, spec):
        raise Fault(f"{file}: {problems[0].removeprefix(f'{file}: ')}", 2)
    layout = deployed.what.units[0].layouts()[0]
    fleet = _fleet(deployed, spec) if is_fleet(deployed.what) else None
    return Launch(deployed, layout, engine_config(deployed, spec), _hosts(deployed, layout), fleet)


def _fleet(deployed: Deployed, spec: ModelSpec) -> FleetConfig:
    units = deployed.what.units
    prefill, decode = (
        tuple(engine_config(deployed, spec, u) for u in units if u.role == role for _ in range(u.count))
        for role in ("prefill", "decode")
    )
    return FleetConfig(prefill=prefill, decode=decode)


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


def _hosts(deployed: Deployed, layout: Layout) -> HostsConfig | None:
    d = deployed.what
    if len(layout.hosts) == 1 or d.secret_file is None:
        return None
    return HostsConfig(layout=layout, secret=read_secret(str(deployed.path(d.secret_file))), port=d.host_port)
