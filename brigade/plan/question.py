"""What is asked and what is answered, in plain values."""

from dataclasses import dataclass, field

from brigade.plan.models import Model
from brigade.plan.quantity import Servers
from brigade.plan.say import Say
from brigade.plan.search import Found, Layout
from brigade.plan.serving import Served
from brigade.plan.step import Setup
from brigade.plan.units import Slo
from brigade.spec.device import Device
from brigade.spec.work import Precision


class Impossible(ValueError):
    """A request that cannot be met. The message says why, and the nearest that can."""


@dataclass(frozen=True)
class Question:
    """What is asked; see `brigade plan --help`."""

    model: Model
    fleets: tuple[Servers, ...]
    users: int
    n_in: int
    n_out: int
    hit: float
    slo: Slo
    precision: Precision
    precision_name: str
    engine: str = ""
    api_price: float | None = None
    loads: Setup = field(default_factory=Setup)
    draft: bool = True
    night: float | None = None
    """Share of the users at night."""
    night_hours: float = 8.0
    smaller: bool = True
    assumed: tuple[Say, ...] = ()

    @property
    def can_draft(self) -> bool:
        return self.draft and self.model.spec.n_mtp > 0

    @property
    def n_nodes(self) -> int:
        return sum(s.n for s in self.fleets)


@dataclass(frozen=True)
class Option:
    """One deployment, at the users that were asked for or as many as it keeps the promise for."""

    name: Say
    family: str
    model: str
    layout: Layout
    fits: bool
    """It serves all users within the promise."""
    users: float
    """At which everything below is."""
    most_users: float
    most_users_range: tuple[float, float]
    """80 % interval."""
    served: Served
    tokens_per_gpu: float
    """Output tokens/s, as all other rates here."""
    tokens_per_node: float
    tokens_range: tuple[float, float]
    """80 % interval of tokens_per_gpu at full use."""
    ttft_factor: float
    """80 % interval of each time to first token: the value divided and multiplied by this."""
    tpot_factor: float
    """The same of times per token."""
    ttft: tuple[float, float, float]
    """p50, p90, p99 in seconds."""
    tpot: tuple[float, float, float]
    cost: float | None
    """Dollars per million output tokens, all cost on output."""
    kilowatts: float
    limit: str
    why: Say

    @property
    def cost_range(self) -> tuple[float, float]:
        """80 % interval of the cost, as wide as the throughput's. Raises ValueError where there is no price."""
        if self.cost is None:
            raise ValueError("no price is known")
        low, high = self.tokens_range
        half = (high / low) ** 0.5
        return self.cost / half, self.cost * half

    @property
    def n_gpus(self) -> int:
        return self.layout.n_gpus

    @property
    def devices(self) -> tuple[Device, ...]:
        """The kinds it uses, each once."""
        return tuple(dict.fromkeys(u.pool.device for u, _ in self.layout.units))


@dataclass(frozen=True)
class Answer:
    """Options, the recommended one first."""

    question: Question
    options: tuple[Option, ...]
    recommended: Option | None
    sentence: Say
    crossover: Say
    notes: tuple[Say, ...]
    assumptions: tuple[Say, ...]
    found: tuple[tuple[Servers, Found], ...]
    n_across: int
    """Layouts over two kinds of servers that were considered."""
    about: str
    curve: tuple[tuple[int, dict[str, float]], ...]
    """Nodes of the first kind of servers that each family needs, by users."""
