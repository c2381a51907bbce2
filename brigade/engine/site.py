"""Where the ranks of one unit run: here, on hosts that join, or both. Starts nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from brigade.engine.config import EngineConfig
from brigade.engine.kv_host import KvHost
from brigade.engine.local_host import LocalHost, RankHost
from brigade.spec.layout import Layout
from brigade.spec.model import ModelSpec


@dataclass(frozen=True)
class Site:
    """One unit's hosts. Outlives units."""

    layout: Layout
    others: Mapping[str, RankHost] = field(default_factory=dict)
    """Its hosts that are other machines, by address."""
    secret: bytes = field(default=b"", repr=False)
    """What its ranks on several hosts know each other by."""
    unit: int = 0
    name: str = ""
    """Of the unit, for people; empty where there is only one."""
    kv: KvHost | None = None
    """What its ranks here share with those of other units."""

    def hosts(self, config: EngineConfig, spec: ModelSpec) -> list[RankHost]:
        """In the layout's order, with the memory that ranks of this machine share. Raises LoadError."""
        return [
            self.others.get(host.address)
            or LocalHost.create(config, spec, self.layout, h, self.secret, self.kv, self.unit)
            for h, host in enumerate(self.layout.hosts)
        ]
