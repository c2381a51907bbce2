"""One request on its way through a fleet: does what the table in `brigade.core.handover` says, and reports to it.

What a unit runs of it is a `Part`, with a number of its own: what an older part still says is about nobody.
"""

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from brigade.comm.kv.offer import Offer
from brigade.core.handover import Action, Event, Handover, State
from brigade.core.roles import Side
from brigade.engine.generation import Generation
from brigade.engine.messages import Add, Adopt, Adopted, Computed, Follow, Gone, Offered, Reserve, Reserved, Token
from brigade.engine.output import BadRequest, EngineError, Unavailable

if TYPE_CHECKING:
    from brigade.engine.crew import Member
    from brigade.engine.fleet import Fleet

log = logging.getLogger("brigade.fleet")


class RequestPart:
    """What one rank does for a flight. The engine of its unit talks to it."""

    def __init__(self, flight: "Flight", side: Side, rid: int, unit: "Member", rank: int, whole: bool = False) -> None:
        """`whole`: the rank computes the prompt itself, and goes on."""
        self.flight, self.side, self.rid, self.unit, self.rank, self.whole = flight, side, rid, unit, rank, whole

    def push(self, token: Token) -> None:
        self.flight.on_token(self, token)

    def fail(self, error: EngineError) -> None:
        self.flight.on_lost(self, error)

    def hear(self, message: Reserved | Offered | Computed | Adopted | Gone) -> None:
        self.flight.on_message(message)


class Flight:
    """One generation and the ranks that work for it."""

    def __init__(self, fleet: "Fleet", generation: Generation, prompt: list[int], salt: str, priority: int = 0) -> None:
        self._fleet, self.generation, self.salt, self.priority = fleet, generation, salt, priority
        self.prompt, self.tokens = prompt, list(prompt)
        """The prompt, and with it every token so far."""
        self.handover = Handover()
        self.since = time.monotonic()
        """When it came into its state."""
        self._parts: dict[Side, RequestPart] = {}
        self._start = 0
        self._offer: Offer
        self._timer: asyncio.TimerHandle | None = None
        self._until = 0.0
        self._error: EngineError | None = None
        self._placed: asyncio.Future[None] | None = None

    @property
    def state(self) -> State:
        return self.handover.state

    def begin(self) -> None:
        self._arm()
        self._fleet.moved(self)
        self._do(Action.PLACE)

    async def placed(self) -> None:
        """Wait until a unit has it. Raises EngineError if none takes it: then the generation has ended."""
        if self.state is State.QUEUED:
            self._placed = asyncio.get_running_loop().create_future()
            await self._placed
        if self.state is State.ENDED and self._error is not None:
            raise self._error

    def close(self, error: EngineError) -> None:
        """The fleet ends."""
        self._error = error
        self._end(drop=False)
        self.generation.fail(error)

    # What happens

    def on(self, event: Event) -> None:
        if self.state is State.ENDED:
            return
        if event is Event.EXPIRED:
            self._error = self._expired()
            log.warning("request %d: %s", self.generation.rid, self._error)
        before, since = self.state, self.since
        actions = self.handover.on(event)
        self.since = time.monotonic()
        self._fleet.waits.left(before, self.since - since)
        self._fleet.moved(self)
        if event in (Event.PREFILL_LOST, Event.DECODE_LOST):
            self._leave("prefill" if event is Event.PREFILL_LOST else "decode", drop=False)
        self._arm()
        for action in actions:
            self._do(action)
        if State.ENDED is self.handover.state:
            self._end(drop=False)
        elif self.state is not State.QUEUED:
            self._wake()

    def on_token(self, part: RequestPart, token: Token) -> None:
        """A token of the decode rank, or one of the prefill rank that is the last."""
        self._fleet.crew.got_token(part)
        self._push(token)
        if token.finish:
            self.on(Event.FINISHED)
        elif self.state is State.COMPUTING:
            self.on(Event.STARTED)
        elif self.state is State.DECODING:
            self._arm()

    def on_lost(self, part: RequestPart, error: EngineError) -> None:
        self._error = error
        if isinstance(error, BadRequest):
            self.on(Event.REFUSED)
            return
        self._fleet.crew.lost(part)
        self.on(Event.PREFILL_LOST if part.side == "prefill" else Event.DECODE_LOST)

    def on_message(self, message: Reserved | Offered | Computed | Adopted | Gone) -> None:
        match message:
            case Reserved(_, start):
                self._start = start
                self.on(Event.RESERVED)
            case Offered(_, offer):
                self._offer = offer
                self.on(Event.OFFERED)
            case Computed(token):
                self._fleet.crew.got_token(self._parts["prefill"])
                self._push(token)
                self.on(Event.COMPUTED)
            case Adopted(_, failure, seconds):
                self._fleet.adopted(failure, seconds)
                part = self._parts["decode"]
                part.unit.engine.wake(part.rank)
                self.on(Event.ADOPTED)
            case Gone():
                self.on(Event.DECODE_LOST)

    def _push(self, token: Token) -> None:
        """Give a token to the client. A stop string ends the generation here, and so this flight; so does whatever
        goes wrong in making text, such as a panic inside the tokenizer library, which is not even an Exception."""
        self.tokens.append(token.token)
        try:
            self.generation.push(token)
        except (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
            raise
        except BaseException as e:
            log.exception("request %d failed", self.generation.rid)
            self.generation.fail(EngineError(f"this request's text cannot be made: {type(e).__name__}"))
            self.on(Event.LEFT)

    # What is to be done

    def _do(self, action: Action) -> None:
        match action:
            case Action.PLACE:
                self.place()
            case Action.PREFILL:
                self.prefill()
            case Action.RESERVE:
                part, params = self._parts["decode"], self.generation.params
                self._give(
                    part, Reserve(part.rid, self.tokens, len(self.prompt), params, self.salt, priority=self.priority)
                )
            case Action.COMPUTE:
                self._give(self._parts["decode"], self._add(self._parts["decode"]))
            case Action.FOLLOW:
                part = self._parts["decode"]
                part.unit.engine.tell(part.rid, Follow(part.rid, self._offer))
            case Action.ADOPT:
                part = self._parts["decode"]
                part.unit.engine.tell(part.rid, Adopt(part.rid, self.tokens[-1]))
            case Action.DROP_PREFILL:
                self._leave("prefill", drop=True)
            case Action.DROP_DECODE:
                self._leave("decode", drop=True)
            case Action.FAIL:
                self.generation.fail(self._error or Unavailable("the request could not be served; try again"))

    def place(self) -> None:
        """Find a decode rank, or wait until there is one."""
        if self.state is not State.QUEUED:
            return
        left = self.generation.params.max_tokens - (len(self.tokens) - len(self.prompt))
        part = self._fleet.choose(self, "decode", max(left, 1))
        if part is None:
            self._fleet.park(self, "decode", self.place)
            return
        self._parts["decode"] = part
        self.on(Event.PLACED_WHOLE if part.whole else Event.PLACED)

    def prefill(self) -> None:
        """Have the prompt computed, or wait until a prefill unit is there."""
        if self.state is not State.PREFILLING or "prefill" in self._parts:
            return
        part = self._fleet.choose(self, "prefill", 1)
        if part is None:
            self._fleet.park(self, "prefill", self.prefill)
            return
        self._parts["prefill"] = part
        self._arm()
        self._give(part, self._add(part, hold=self._start))

    def _add(self, part: RequestPart, hold: int = -1) -> Add:
        params, n_prompt = self.generation.params, len(self.prompt)
        return Add(part.rid, self.tokens, params, self.salt, n_prompt=n_prompt, hold=hold, priority=self.priority)

    def _give(self, part: RequestPart, message: Add | Reserve) -> None:
        try:
            part.unit.engine.enter(part, part.rank, message)
        except (TypeError, UnicodeError) as e:
            self.on_lost(part, BadRequest(f"the request cannot be sent to the worker: {e}"))

    def _leave(self, side: Side, drop: bool) -> None:
        if part := self._parts.pop(side, None):
            part.unit.engine.leave(part.rid, drop)
            self._fleet.crew.left(part)

    def _end(self, drop: bool) -> None:
        self.handover.state = State.ENDED
        if self._timer:
            self._timer.cancel()
        for side in list(self._parts):
            self._leave(side, drop)
        self._fleet.ended(self)
        self._wake()

    def _wake(self) -> None:
        """Whoever waits for a unit need not any more."""
        if self._placed is not None and not self._placed.done():
            self._placed.set_result(None)

    def _arm(self) -> None:
        """Begin the time of a state anew. Timers are set rarely: one that ends too early is set again."""
        if (seconds := self._seconds) is None:
            return
        loop = asyncio.get_running_loop()
        self._until = loop.time() + seconds
        if self._timer is None or self._timer.when() > self._until:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_at(self._until, self._expire)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._until:
            self._timer = loop.call_at(self._until, self._expire)
            return
        self._timer = None
        with contextlib.suppress(EngineError):
            self.on(Event.EXPIRED)

    @property
    def _waits(self) -> bool:
        """Whether it waits for a unit."""
        return self.state is State.QUEUED or (self.state is State.PREFILLING and "prefill" not in self._parts)

    @property
    def _seconds(self) -> float | None:
        """How long it may be as it is now."""
        return self._fleet.deadlines.of(State.QUEUED if self._waits else self.state)

    def _expired(self) -> Unavailable:
        seconds = self._seconds or 0
        if self._waits:
            return Unavailable(f"no unit could take the request within {seconds:g} s: {self._fleet.health().reason}")
        return Unavailable(f"the request was {self.state} for longer than {seconds:g} s; try again")
