"""A rank's membership of its unit: what it does at each Form, and how that differs the first time."""

from brigade.comm.group import Group
from brigade.core.scheduler import StepPlan
from brigade.engine import auto
from brigade.engine.config import EngineConfig
from brigade.engine.messages import Form, Ready
from brigade.engine.unit_rank import UnitRank
from brigade.engine.worker import Worker


class Membership:
    """One worker that has its weights, and its place in the unit."""

    def __init__(self, config: EngineConfig, unit: UnitRank, worker: Worker) -> None:
        self._config, self._unit, self._worker = config, unit, worker
        self._resolved: auto.Resolved | None = None
        self._warm = False

    @property
    def group(self) -> Group:
        return self._unit.group

    @property
    def one_wire(self) -> bool:
        """Whether the group and the experts' exchange must not be used at the same time."""
        return self._unit.one_wire

    @property
    def generation(self) -> int:
        """The one last called for; 0 before."""
        return self._unit.generation

    def form(self, form: Form) -> Ready:
        """Meet the other ranks in a new generation and run one step with them: a token to warm up the first time, an
        empty one afterwards, when the cache holds what must stay.

        The cache is made the first time, when all ranks of this machine have read their weights. Raises PeerLost, and
        the first time ValueError and MemoryError.
        """
        if self._resolved is None:
            self._resolved = self._worker.make_cache(self._config, auto.this_machine().part(self._unit.n_sharing))
        self._unit.meet(form)
        self._worker.meet(self._unit)
        if self._warm:
            self._worker.run(StepPlan())
        else:
            self._worker.warm_up()
            self._warm = True
        r = self._resolved
        return Ready(r.n_pages, self._config.page, r.max_context, r.notes, form.generation)
