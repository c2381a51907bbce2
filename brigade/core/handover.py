"""One request on its way over two ranks: a prefill rank computes its prompt, a decode rank goes on; or over one of a
mixed unit, which does both. Pure: events in, actions out. It sends nothing and reads no clock; whoever drives it does
what the actions say and reports events.

state         who holds pages                                      ends at its deadline with
queued        nobody                                               an error
computing     the decode rank: it does it all                      an error
routed        the decode rank, once it has room                    an error
prefilling    decode: for the prompt; nobody computes it yet       an error
transferring  both: prefill computes, and what is finished, layer  an error
              by layer, is written into the pages of decode
adopting      both: prefill under a lease, for what decode does    the loss of the decode rank's copy: queued again
              not have yet
decoding      decode                                               the loss of the decode rank's copy: queued again
ended         nobody; whoever held some was told

The first token is there when `adopting` begins; what is left to transfer then is seldom more than the last layer.

A request that is queued again has the tokens that its client has seen: they are computed once more together with the
prompt, so the text goes on as it would have. Every attempt on a rank has a number of its own, so whatever a rank says
late about an older one is about nobody.

What holds for each rank by itself, so that a driver that is gone strands nothing:
- A prefill rank holds the pages of a computed prompt under a lease (`Leases`); what comes after it finds nothing.
- While it computes, the pages are the running request's own. If that is preempted, nothing is finished until it runs
  again.
- A decode rank gives back the pages of a reservation that nobody has followed up within its own deadline, but never
  while they are being written: a transfer ends first, by itself or at its deadline.
"""

from dataclasses import dataclass, field
from enum import StrEnum, auto

from brigade.core.request import Request


class State(StrEnum):
    QUEUED = auto()
    COMPUTING = auto()
    ROUTED = auto()
    PREFILLING = auto()
    TRANSFERRING = auto()
    ADOPTING = auto()
    DECODING = auto()
    ENDED = auto()


class Event(StrEnum):
    PLACED = auto()
    """A decode rank was chosen."""
    PLACED_WHOLE = auto()
    """A rank was chosen that computes the prompt itself and goes on: it counts as the decode rank."""
    STARTED = auto()
    """That one has sampled the first token."""
    RESERVED = auto()
    """It holds pages for the prompt."""
    OFFERED = auto()
    """The prefill rank begins to compute the prompt, and gives each layer's rows as they are finished."""
    COMPUTED = auto()
    """The prefill rank has sampled the first token and holds the pages of the prompt."""
    ADOPTED = auto()
    """The decode rank runs the request: it has all pages, or computes them itself because they could not be fetched."""
    FINISHED = auto()
    """The last token is there; the rank that sampled it has given its pages back."""
    LEFT = auto()
    """The client does not want any more."""
    REFUSED = auto()
    """A rank says that this request can never run on it."""
    PREFILL_LOST = auto()
    """Whatever the prefill rank had of it is gone."""
    DECODE_LOST = auto()
    EXPIRED = auto()
    """It has been in its state for too long."""


class Action(StrEnum):
    PLACE = auto()
    """Choose a decode rank, now or when there is one."""
    COMPUTE = auto()
    """Give the decode rank the whole request."""
    RESERVE = auto()
    """Ask the decode rank for pages."""
    PREFILL = auto()
    """Have the prompt computed on a prefill rank, now or when there is one."""
    FOLLOW = auto()
    """Tell the decode rank where rows are to be had from now on."""
    ADOPT = auto()
    """Tell the decode rank that all rows are finished, and the first token."""
    DROP_PREFILL = auto()
    """Tell the prefill rank that its pages, or its work, are not needed any more."""
    DROP_DECODE = auto()
    FAIL = auto()
    """Give the client an error."""


_S, _E, _A = State, Event, Action

TABLE: dict[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {
    (_S.QUEUED, _E.PLACED): (_S.ROUTED, (_A.RESERVE,)),
    (_S.QUEUED, _E.PLACED_WHOLE): (_S.COMPUTING, (_A.COMPUTE,)),
    (_S.QUEUED, _E.LEFT): (_S.ENDED, ()),
    (_S.QUEUED, _E.EXPIRED): (_S.ENDED, (_A.FAIL,)),
    (_S.COMPUTING, _E.STARTED): (_S.DECODING, ()),
    (_S.COMPUTING, _E.FINISHED): (_S.ENDED, ()),
    (_S.COMPUTING, _E.DECODE_LOST): (_S.QUEUED, (_A.PLACE,)),
    (_S.COMPUTING, _E.REFUSED): (_S.ENDED, (_A.FAIL,)),
    (_S.COMPUTING, _E.LEFT): (_S.ENDED, (_A.DROP_DECODE,)),
    (_S.COMPUTING, _E.EXPIRED): (_S.ENDED, (_A.DROP_DECODE, _A.FAIL)),
    (_S.ROUTED, _E.RESERVED): (_S.PREFILLING, (_A.PREFILL,)),
    (_S.ROUTED, _E.DECODE_LOST): (_S.QUEUED, (_A.PLACE,)),
    (_S.ROUTED, _E.REFUSED): (_S.ENDED, (_A.FAIL,)),
    (_S.ROUTED, _E.LEFT): (_S.ENDED, (_A.DROP_DECODE,)),
    (_S.ROUTED, _E.EXPIRED): (_S.ENDED, (_A.DROP_DECODE, _A.FAIL)),
    (_S.PREFILLING, _E.OFFERED): (_S.TRANSFERRING, (_A.FOLLOW,)),
    (_S.PREFILLING, _E.FINISHED): (_S.ENDED, (_A.DROP_DECODE,)),
    (_S.PREFILLING, _E.PREFILL_LOST): (_S.PREFILLING, (_A.PREFILL,)),
    (_S.PREFILLING, _E.DECODE_LOST): (_S.QUEUED, (_A.DROP_PREFILL, _A.PLACE)),
    (_S.PREFILLING, _E.REFUSED): (_S.ENDED, (_A.DROP_DECODE, _A.FAIL)),
    (_S.PREFILLING, _E.LEFT): (_S.ENDED, (_A.DROP_PREFILL, _A.DROP_DECODE)),
    (_S.PREFILLING, _E.EXPIRED): (_S.ENDED, (_A.DROP_PREFILL, _A.DROP_DECODE, _A.FAIL)),
    (_S.TRANSFERRING, _E.COMPUTED): (_S.ADOPTING, (_A.ADOPT,)),
    (_S.TRANSFERRING, _E.FINISHED): (_S.ENDED, (_A.DROP_DECODE,)),
    # The decode rank keeps the rows that it has, and gets the others from the next one.
    (_S.TRANSFERRING, _E.PREFILL_LOST): (_S.PREFILLING, (_A.PREFILL,)),
    (_S.TRANSFERRING, _E.DECODE_LOST): (_S.QUEUED, (_A.DROP_PREFILL, _A.PLACE)),
    (_S.TRANSFERRING, _E.LEFT): (_S.ENDED, (_A.DROP_PREFILL, _A.DROP_DECODE)),
    (_S.TRANSFERRING, _E.EXPIRED): (_S.ENDED, (_A.DROP_PREFILL, _A.DROP_DECODE, _A.FAIL)),
    (_S.ADOPTING, _E.ADOPTED): (_S.DECODING, (_A.DROP_PREFILL,)),
    # The decode rank finds out what is still to be had: it has a deadline, and computes what it cannot get.
    (_S.ADOPTING, _E.PREFILL_LOST): (_S.ADOPTING, ()),
    (_S.ADOPTING, _E.DECODE_LOST): (_S.QUEUED, (_A.DROP_PREFILL, _A.PLACE)),
    (_S.ADOPTING, _E.LEFT): (_S.ENDED, (_A.DROP_PREFILL, _A.DROP_DECODE)),
    (_S.ADOPTING, _E.EXPIRED): (_S.QUEUED, (_A.DROP_PREFILL, _A.DROP_DECODE, _A.PLACE)),
    (_S.DECODING, _E.FINISHED): (_S.ENDED, ()),
    (_S.DECODING, _E.DECODE_LOST): (_S.QUEUED, (_A.PLACE,)),
    (_S.DECODING, _E.LEFT): (_S.ENDED, (_A.DROP_DECODE,)),
    (_S.DECODING, _E.EXPIRED): (_S.QUEUED, (_A.DROP_DECODE, _A.PLACE)),
}
"""(state, event) -> (next state, what is to be done, in order). What is not here cannot happen."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a request may be in a state. Decoding begins anew with every token.

    While a request waits for a prefill unit, as after the loss of the only one, it is `queued` that counts.
    """

    queued: float = 30.0
    computing: float = 1800.0
    routed: float = 600.0
    prefilling: float = 600.0
    transferring: float = 600.0
    adopting: float = 60.0
    decoding: float = 300.0

    def of(self, state: State) -> float | None:
        """None for an ended request."""
        return None if state is State.ENDED else float(getattr(self, state.value))


@dataclass(slots=True)
class Handover:
    """Where one request stands, and how often it had to begin again."""

    state: State = State.QUEUED
    n_lost: int = 0
    """How often the rank that computed or held it was lost, or took too long."""
    most_lost: int = 5
    """After so many it fails: a request that kills whoever runs it must not go round for ever."""

    def on(self, event: Event) -> tuple[Action, ...]:
        """Take an event; what is to be done now. Raises ValueError for one that cannot happen in this state."""
        if (row := TABLE.get((self.state, event))) is None:
            raise ValueError(f"a request that is {self.state} cannot be told {event}")
        before, (self.state, actions) = self.state, row
        if _A.PLACE in actions or (event is _E.PREFILL_LOST and _A.PREFILL in actions):
            self.n_lost += 1
            if self.n_lost > self.most_lost:
                return self._give_up(before, event)
        return actions

    def _give_up(self, before: State, event: Event) -> tuple[Action, ...]:
        self.state = _S.ENDED
        decode_holds = event is not _E.DECODE_LOST
        prefill_holds = before in (_S.PREFILLING, _S.TRANSFERRING, _S.ADOPTING) and event is not _E.PREFILL_LOST
        return (
            *((_A.DROP_PREFILL,) if prefill_holds else ()),
            *((_A.DROP_DECODE,) if decode_holds else ()),
            _A.FAIL,
        )


@dataclass(slots=True)
class Leases:
    """Requests of a prefill rank that are computed and whose pages others may read, each until a time.

    Times are the driver's. A lease that has ended is told once, by `expired`.
    """

    _held: dict[int, tuple[Request, float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def n_pages(self) -> int:
        """Pages held; one that two requests share counts twice."""
        return sum(len(req.pages) for req, _ in self._held.values())

    def hold(self, req: Request, until: float) -> None:
        if req.rid in self._held:
            raise ValueError(f"request {req.rid} is held already")
        self._held[req.rid] = req, until

    def get(self, rid: int) -> Request | None:
        held = self._held.get(rid)
        return None if held is None else held[0]

    def end(self, rid: int) -> Request | None:
        """The request, whose pages go back now; None if its lease has ended before."""
        held = self._held.pop(rid, None)
        return None if held is None else held[0]

    def expired(self, now: float) -> list[Request]:
        """Requests whose time is over; their pages go back now."""
        rids = [rid for rid, (_, until) in self._held.items() if now >= until]
        return [self._held.pop(rid)[0] for rid in rids]
