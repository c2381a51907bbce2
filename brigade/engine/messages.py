"""What the client and the worker say to each other. msgspec structs: typed, checked on arrival, never pickle."""

import msgspec

from brigade.comm.kv.offer import Offer
from brigade.core.laps import Lap
from brigade.core.moves import Move
from brigade.core.placement import Placement
from brigade.engine.config import EngineConfig, KvConfig
from brigade.spec.sampling import SamplingParams


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message to a new worker: what to load and how to run it."""

    config: EngineConfig
    rank: int = 0
    segment: int = -1
    """File number of the memory that the ranks of a host share; -1 for a unit of one."""
    hosts: list[int] = []
    """Ranks of each host where there are several; empty: all are on this one."""
    address: str = ""
    """Where this rank listens for ranks of other hosts."""
    secret: bytes = b""
    """What ranks of several hosts know each other by; put in on the rank's own host, never sent over a network."""
    placement: Placement | None = None
    """Which slot holds which routed expert now; None: as at the first start."""
    portion: int = 0
    """Number of the last portion of moves that this placement includes."""
    kv: KvConfig | None = None
    """How this rank and those of other units give each other prompts; None: it computes and decodes alone."""


class Form(msgspec.Struct, frozen=True, tag=True):
    """Every rank has its weights: meet the others, then say Ready. After a loss it comes again, to all ranks.

    A rank that is in the middle of something gives up the steps it has not committed and keeps all else.
    """

    generation: int
    """1 at first, one more each time. The generation before it was stopped."""
    addresses: list[str] = []
    """Where each rank listens for ranks of other hosts, "host:port" by rank; empty where all are on one host."""
    portion: int = 0
    """The last portion of moves that holds. A rank that made another takes it back; one that missed it makes it."""


class Add(msgspec.Struct, frozen=True, tag=True):
    """Start a request. `params.seed` is set by now, so that a restart or a hand-over draws the same tokens."""

    rid: int
    prompt: list[int]
    params: SamplingParams
    salt: str = ""
    wake: int = 0
    """Number of this call; the other ranks get it as Wake."""
    n_prompt: int = 0
    """Of `prompt`, the tokens that are the prompt; 0: all. The rest were generated before, by a rank that was lost."""
    hold: int = -1
    """At least 0: offer the rows from this token on (Offered), sample one token (Computed), and keep the pages."""
    priority: int = 0
    """Lower values go first."""


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Another rank got a request: run steps with it."""

    wake: int


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget a request and give its pages back, also those that were offered or reserved; pages that are being filled
    come back when the transfer has ended. Unknown ids are fine: it may have finished meanwhile."""

    rid: int


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answered between two steps, so an answer means that the loop turns."""

    seq: int


class Portion(msgspec.Struct, frozen=True, tag=True):
    """Read the experts that are to come to this rank's slots, beside the running steps. The ranks agree between which
    two steps all change places, or that none does."""

    number: int
    moves: tuple[Move, ...]
    """Of all ranks. Layers are counted among those with routed experts."""


class TellLoads(msgspec.Struct, frozen=True, tag=True):
    """Say how often experts were asked for since the last time. Answered by Loads."""

    seq: int


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Hold pages for a request whose prompt another rank computes; answered by Reserved when there is room."""

    rid: int
    tokens: list[int]
    n_prompt: int
    params: SamplingParams
    salt: str = ""
    priority: int = 0


class Follow(msgspec.Struct, frozen=True, tag=True):
    """Fetch the offered rows into the reserved pages, as they are finished; instead of what was offered before."""

    rid: int
    offer: Offer


class Adopt(msgspec.Struct, frozen=True, tag=True):
    """The prompt is computed: fetch what is missing and go on after `token`."""

    rid: int
    token: int


class Record(msgspec.Struct, frozen=True, tag=True):
    """Keep spans of what is computed from now on, for so many seconds at most."""

    seconds: float
    most: int
    """Spans to keep, of each kind: the newest ones."""


class TellSpans(msgspec.Struct, frozen=True, tag=True):
    """Stop recording and say what was recorded. Answered by Spans, in portions."""

    seq: int


ToWorker = (
    Start | Form | Add | Wake | Abort | Ping | Portion | TellLoads | Reserve | Follow | Adopt | Record | TellSpans
)


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress of reading the checkpoint, in bytes."""

    done: int
    total: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The weights are read: this rank waits for Form."""

    port: int = 0
    """Where it listens for ranks of other hosts; 0 where all are on one host."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """This rank has met the others; requests may come once all ranks say so."""

    n_pages: int
    page: int
    max_context: int
    """Positions one request may have: the model's context, or what fits into the cache."""
    notes: list[str]
    """What "auto" settings became, and why."""
    generation: int = 1
    """That of the Form it answers."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot load the model; the message names the file or the setting and says what to do."""

    message: str


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    token: int
    logprob: float


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One new token of one request. A step may give several, in their order."""

    rid: int
    token: int
    finish: str = ""
    """"stop", "length" or "error"; empty while the request goes on."""
    logprob: float | None = None
    top: list[Logprob] = []
    n_cached: int = 0
    """Prompt tokens that came from the prefix cache."""
    n_stored: int = 0
    """Of these, the ones that had to be read from the disk store."""


class StoreStats(msgspec.Struct, frozen=True, array_like=True):
    """A rank's use of the disk store since the start."""

    read_bytes: int = 0
    written_bytes: int = 0
    used_bytes: int = 0
    """Bytes of all entries now, whoever wrote them."""
    evicted: int = 0
    """Entries that this rank removed to make room."""
    dropped: int = 0
    """Requests whose pages were not all written: too many waited, or the pages were used again."""
    damaged: int = 0
    """Entries removed because they were not what they should be."""
    late: int = 0
    """Reads given up because the disk was too slow."""
    failed: int = 0
    """Errors of the disk."""
    well: bool = False
    """Whether it works."""

    def __add__(self, other: "StoreStats") -> "StoreStats":
        """Of two ranks, which may share a folder."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        sums = StoreStats(*(a + b for a, b in pairs))
        used, well = max(self.used_bytes, other.used_bytes), self.well and other.well
        return msgspec.structs.replace(sums, used_bytes=used, well=well)


class Stats(msgspec.Struct, frozen=True, array_like=True):
    """The rank's state after a step."""

    n_steps: int
    running: int
    waiting: int
    pages_used: int
    n_preempted: int
    """Preemptions since the start."""
    pages_reserved: int = 0
    """Of the pages used, those that are being filled from elsewhere."""
    pages_offered: int = 0
    """Those of prompts that other ranks may read; one that two prompts share counts twice."""
    store: StoreStats | None = None
    """None: there is no disk store."""
    n_drafted: int = 0
    """Guesses at next tokens that were checked since the start."""
    n_accepted: int = 0
    """Those of them that were right."""


class Step(msgspec.Struct, frozen=True, tag=True):
    """What one step gave."""

    tokens: list[Token]
    stats: Stats


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request that the scheduler cannot take."""

    rid: int
    message: str


class Pong(msgspec.Struct, frozen=True, tag=True):
    seq: int
    stats: Stats
    clock: int = 0
    """Nanoseconds of CLOCK_MONOTONIC on the rank's host."""


class Lost(msgspec.Struct, frozen=True, tag=True):
    """This rank waited for others in vain, or was told to stop. It keeps weights, pages and requests, and waits for the
    next Form."""

    ranks: list[int]
    """Who is missing, as far as it knows."""
    message: str
    generation: int
    """The one that it belonged to."""


class Staged(msgspec.Struct, frozen=True, tag=True):
    """This rank has read its part of a portion, or could not."""

    number: int
    problem: str = ""
    """What could not be read, and why."""


class Settled(msgspec.Struct, frozen=True, tag=True):
    """All ranks have agreed about a portion: it holds from now on, or is dropped."""

    number: int
    applied: bool


class Loads(msgspec.Struct, frozen=True, tag=True):
    """What this rank has seen since the last TellLoads."""

    seq: int
    tokens: list[list[int]]
    """[layer with routed experts][logical expert] -> own tokens that were routed to it."""
    received: list[int]
    """[layer] -> rows of all ranks that were computed here; zeros where all experts are on one rank."""


class Ran(msgspec.Struct, frozen=True, array_like=True):
    """One step of a rank, in nanoseconds of its host's CLOCK_MONOTONIC."""

    begin: int
    end: int
    micro_batches: int
    slices: list[tuple[int, int, int]]
    """Of each request in it: rid, first position, tokens."""


class Spans(msgspec.Struct, frozen=True, tag=True):
    """Some of what a rank has recorded; `last`: that was all."""

    seq: int
    steps: list[Ran]
    parts: list[Lap]
    """Of steps, from the thread that runs them."""
    turns: list[Lap]
    """Of the loop, between them."""
    n_lost: int = 0
    """Older spans that there was no room for."""
    last: bool = False


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """Pages are held; the rows of tokens before `start` are here already."""

    rid: int
    start: int


class Offered(msgspec.Struct, frozen=True, tag=True):
    """This rank begins to compute the prompt, and gives its rows as they are finished."""

    rid: int
    offer: Offer


class Computed(msgspec.Struct, frozen=True, tag=True):
    """The prompt is computed, and this is its first token. Its pages are held."""

    token: Token


class Adopted(msgspec.Struct, frozen=True, tag=True):
    """The request runs here now."""

    rid: int
    failure: str = ""
    """Why its rows could not be fetched, so that this rank computes the prompt itself; empty: they are here."""
    seconds: float = 0.0
    """How long it waited for rows, after the prompt was computed."""


class Rouse(msgspec.Struct, frozen=True, tag=True):
    """A request of this rank can run that could not when the unit went to sleep: call all ranks (Wake)."""


class Gone(msgspec.Struct, frozen=True, tag=True):
    """This rank has nothing of a request that it was told to fetch or to adopt."""

    rid: int


FromWorker = (
    Loading
    | Loaded
    | Ready
    | Failed
    | Step
    | Refused
    | Pong
    | Lost
    | Staged
    | Settled
    | Loads
    | Reserved
    | Offered
    | Computed
    | Adopted
    | Gone
    | Rouse
    | Spans
)
