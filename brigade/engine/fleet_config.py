"""Which units a fleet has and how they work together, frozen. Starts nothing."""

from dataclasses import dataclass, field

from brigade.core.handover import Deadlines
from brigade.core.roles import SIDES, Side, Targets
from brigade.engine.config import EngineConfig, Link
from brigade.spec.layout import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitConfig:
    """One unit of a fleet."""

    name: str
    """What people call it; it keeps it when its role changes."""
    role: Role
    """What it does at first."""
    engine: EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """Raises ValueError for what cannot work together."""

    units: tuple[UnitConfig, ...]
    link: Link = "shared"
    """How prompts get from one to the other."""
    deadlines: Deadlines = field(default_factory=Deadlines)
    targets: Targets | None = None
    """How long requests should wait, for units to change between prefill and decode by; None: only when told to."""

    def __post_init__(self) -> None:
        names = [u.name for u in self.units]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two units are called {double}; give each a name of its own")
        if frozenset[Side]().union(*(SIDES[u.role] for u in self.units)) != SIDES["mixed"]:
            raise ValueError("a fleet needs at least one prefill unit and one decode unit, or a mixed one")
        first = self.units[0].engine
        for unit in self.units:
            for name in ("model", "dtype", "weights", "page", "drafts"):
                a, b = getattr(first, name), getattr(unit.engine, name)
                if a != b:
                    raise ValueError(f"{name} must be the same in all units of a fleet, not {a!r} and {b!r}")

    @classmethod
    def alone(cls, engine: EngineConfig) -> "FleetConfig":
        """One unit that does it all."""
        return cls(units=(UnitConfig(name="mixed-0", role="mixed", engine=engine),))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the units, for people; of one alone, what it is called where there are no others."""
        return tuple(u.name for u in self.units) if len(self.units) > 1 else ("the unit",)

    @property
    def model(self) -> str:
        return self.units[0].engine.model
