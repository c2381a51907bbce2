"""One request on its way through a fleet: does what the table in `brigade.core.handover` says, and reports to it.

What a unit runs of it is a `Part`, with a number of its own: what an older part still says is about nobody.
"""

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Literal

from brigade.core.handover import Action, Event, Handover, State
from brigade.engine.generation import Generation
from brigade.engine.messages import Add, Adopt, Adopted, Gone, Offered, Reserve, Reserved, Token
from brigade.engine.output import BadRequest, EngineError, Unavailable

if TYPE_CHECKING:
    from brigade.engine.client import Engine
    from brigade.engine.fleet import Fleet

log = logging.getLogger("brigade.fleet")

Side = Literal["prefill", "decode"]


class RequestPart:
    """What one rank does for a flight. The engine of its unit talks to it."""

    def __init__(self, flight: "Flight", side: Side, rid: int, engine: "Engine", rank: int) -> None:
        self.flight, self.side, self.rid, self.engine, self.rank = flight, side, rid, engine, rank

    def push(self, token: Token) -> None:
        self.flight.on_token(token)

    def fail(self, error: EngineError) -> None:
        self.flight.on_lost(self, error)

    def hear(self, message: Reserved | Offered | Adopted | Gone) -> None:
        self.flight.on_message(message)


class Flight:
    """One generation and the ranks that work for it."""

    def __init__(self, fleet: "Fleet", generation: Generation, prompt: list[int], salt: str) -> None:
        self._fleet, self.generation, self.salt = fleet, generation, salt
        self.prompt, self.tokens = prompt, list(prompt)
        """The prompt, and with it every token so far."""
        self.handover = Handover()
        self._parts: dict[Side, RequestPart] = {}
        self._start = 0
        self._offered: Offered
        self._timer: asyncio.TimerHandle | None = None
        self._error: EngineError | None = None

    @property
    def state(self) -> State:
        return self.handover.state

    def begin(self) -> None:
        self._arm()
        self._do(Action.PLACE)

    def close(self, error: EngineError) -> None:
        """The fleet ends."""
        self._error = error
        self._end(drop=False)
        self.generation.fail(error)

    # What happens

    def on(self, event: Event) -> None:
        if self.state is State.ENDED:
            return
        before = self.state
        if event is Event.EXPIRED:
            log.warning("request %d: %s for longer than %g s", self.generation.rid, before, self._seconds or 0)
            self._error = Unavailable(f"the request was {before} for longer than {self._seconds:g} s; try again")
        actions = self.handover.on(event)
        self._arm()
        if event in (Event.PREFILL_LOST, Event.DECODE_LOST):
            self._leave("prefill" if event is Event.PREFILL_LOST else "decode", drop=False)
        for action in actions:
            self._do(action)
        if State.ENDED is self.handover.state:
            self._end(drop=False)

    def on_token(self, token: Token) -> None:
        """A token of the decode rank, or one of the prefill rank that is the last."""
        self._push(token)
        if token.finish:
            self.on(Event.FINISHED)
        elif self.state is State.DECODING:
            self._arm()

    def on_lost(self, part: RequestPart, error: EngineError) -> None:
        self._error = error
        if isinstance(error, BadRequest):
            self.on(Event.REFUSED)
            return
        self._fleet.lost(part)
        self.on(Event.PREFILL_LOST if part.side == "prefill" else Event.DECODE_LOST)

    def on_message(self, message: Reserved | Offered | Adopted | Gone) -> None:
        match message:
            case Reserved(_, start):
                self._start = start
                self.on(Event.RESERVED)
            case Offered(token):
                self._offered = message
                self._push(token)
                self.on(Event.COMPUTED)
            case Adopted(_, failure, seconds):
                self._fleet.adopted(failure, seconds)
                part = self._parts["decode"]
                part.engine.wake(part.rank)
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
                part, g = self._parts["decode"], self.generation
                reserve = Reserve(part.rid, self.tokens, len(self.prompt), g.params, self.salt)
                part.engine.enter(part, part.rank, reserve)
            case Action.ADOPT:
                part = self._parts["decode"]
                part.engine.tell(part.rid, Adopt(part.rid, self._offered.token.token, self._offered.offer))
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
        part = self._fleet.choose(self, "decode", self.generation.params.max_tokens)
        if part is None:
            self._fleet.park(self.place)
            return
        self._parts["decode"] = part
        self.on(Event.PLACED)

    def prefill(self) -> None:
        """Have the prompt computed, or wait until a prefill unit is there."""
        if self.state is not State.PREFILLING or "prefill" in self._parts:
            return
        part = self._fleet.choose(self, "prefill", 1)
        if part is None:
            self._fleet.park(self.prefill)
            return
        self._parts["prefill"] = part
        add = Add(
            part.rid,
            self.tokens,
            self.generation.params,
            self.salt,
            n_prompt=len(self.prompt),
            hold=self._start,
        )
        part.engine.enter(part, part.rank, add)

    def _leave(self, side: Side, drop: bool) -> None:
        if part := self._parts.pop(side, None):
            part.engine.leave(part.rid, drop)
            self._fleet.left(part)

    def _end(self, drop: bool) -> None:
        self.handover.state = State.ENDED
        if self._timer:
            self._timer.cancel()
        for side in list(self._parts):
            self._leave(side, drop)
        self._fleet.ended(self)

    def _arm(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if (seconds := self._seconds) is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        with contextlib.suppress(EngineError):
            self.on(Event.EXPIRED)

    @property
    def _seconds(self) -> float | None:
        return self._fleet.deadlines.of(self.state)
