"""Every setting of the engine, in one frozen place. The worker resolves "auto" values and says what they became."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from brigade.spec.layout import Layout

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

Kind = Literal["bf16", "int8", "int4"]
Weights = Literal["auto", "bf16", "int8", "int4"]
Wire = Literal["auto", "bf16", "int8", "fp8"]
Link = Literal["shared", "tcp", "nixl"]
"""How prompts get from rank to rank: through memory where two share a host, over TCP where not; or all over TCP, or all
over NIXL."""

JOIN_PORT = 7000
"""Where the head of several hosts listens for them unless told otherwise."""

DEMO_MODEL = Path(__file__).parent.parent / "demo"
"""The bundled demo model: a real, small DeepSeek-V3-architecture mixture of experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to run one model. Raises ValueError, naming the field, for values that cannot work."""

    model: str = str(DEMO_MODEL)
    dtype: Dtype = "auto"
    """Type of weights, activations and cache while computing."""
    weights: Weights = "auto"
    """Type of the experts' and the large layers' weights: bf16, or quantised while loading (C++ kernels only).

    int4 is that of experts and feed-forward layers; attention and head are int8 beside it.
    """
    max_context: int = 0
    """Positions a request may have; 0: the model's context, or less if the cache is smaller."""
    kv_bytes: int = 0
    """Memory for the KV cache; 0: a quarter of what the weights leave free, at most what max_running requests need."""
    page: int = 16
    """Tokens a page of the KV cache."""
    kv_disk: str = ""
    """Existing folder under which prompts' KV caches are kept for when they have left memory; empty: nowhere."""
    kv_disk_bytes: int = 0
    """Bytes that they may take there, whoever keeps them in that folder."""
    max_running: int = 64
    """Requests that run in one step."""
    max_waiting: int = 256
    """Requests that may wait beyond the running ones before new ones are refused."""
    max_step_tokens: int = 512
    """Tokens a step may compute: the size of a prefill chunk and so the longest pause of a running decode."""
    drafts: int = 0
    """Tokens that the checkpoint's multi-token-prediction layer guesses for each request in a step, for the next one to
    check: 0 or 1. Right guesses are more tokens a step, wrong ones cost their rows; text stays the same."""
    depth: int = 1
    """Steps in flight: 1 waits for each step; 2 plans the next one while a step runs."""
    ranks: int = 1
    """Worker processes of the unit: routed experts are spread over them, attention is data-parallel."""
    redundant_experts: int = 0
    """Further copies of routed experts in each layer, over all ranks: the busiest experts get them."""
    rebalance: float = 60.0
    """Seconds between two looks at the experts' loads, after which experts move to less busy ranks; 0: they stay."""
    wire: Wire = "auto"
    """How rows travel to experts and back. auto: exactly, in the type the model computes in, results in float32. The
    others are smaller and rounded, results in bf16; the rounding is the same on one rank, so text does not depend on
    the number of ranks."""
    micro_batches: int = 0
    """Into how many a step is cut, so that the exchange of one runs behind the compute of the other: 1 or 2; 0: as is
    found to be faster, by trying both now and then. It never changes text."""
    threads: int = 0
    """CPU threads of each rank; 0: the cores this process may use, shared by the ranks."""
    rank_deadline: float = 5.0
    """Seconds that a rank waits for the others in a step before it says who is missing, which is replaced; then, that
    requests of the others wait for the replacement before they end with an error."""
    step_deadline: float = 60.0
    """Seconds without progress after which the worker is considered stuck, killed and replaced."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_context", 0, 1 << 24),
            ("kv_bytes", 0, 1 << 50),
            ("kv_disk_bytes", 0, 1 << 60),
            ("page", 1, 1024),
            ("max_running", 1, 4096),
            ("max_waiting", 0, 1 << 20),
            ("max_step_tokens", 1, 1 << 20),
            ("drafts", 0, 1),
            ("depth", 1, 4),
            ("ranks", 1, 1024),
            ("redundant_experts", 0, 4096),
            ("rebalance", 0, 86400),
            ("rank_deadline", 0.1, 3600),
            ("micro_batches", 0, 2),
            ("threads", 0, 1024),
            ("step_deadline", 0.1, 3600),
        ):
            value = getattr(self, name)
            kinds = (int, float) if name.endswith("_deadline") or name == "rebalance" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ValueError(f"{name} must be a {'' if float in kinds else 'whole '}number, not {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be between {low} and {high}, not {value}")
        if self.dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ValueError(f"dtype must be auto, bfloat16, float16 or float32, not {self.dtype!r}")
        if self.weights not in ("auto", "bf16", "int8", "int4"):
            raise ValueError(f"weights must be auto, bf16, int8 or int4, not {self.weights!r}")
        if self.weights != "auto" and self.dtype not in ("auto", "bfloat16"):
            raise ValueError(f"weights {self.weights} are computed in bfloat16; leave dtype at auto, not {self.dtype}")
        if bool(self.kv_disk) != bool(self.kv_disk_bytes):
            raise ValueError("kv_disk needs a folder and kv_disk_bytes above 0, or neither")
        if self.redundant_experts and self.ranks == 1:
            raise ValueError("redundant_experts are copies on other ranks, but ranks is 1; leave it at 0")
        if self.wire not in ("auto", "bf16", "int8", "fp8"):
            raise ValueError(f"wire must be auto, bf16, int8 or fp8, not {self.wire!r}")
        if self.micro_batches == 2 and self.ranks == 1:
            raise ValueError("micro_batches is 2, but one rank waits for no other; leave it at 0 or 1")
        if self.drafts and self.depth > 1:
            raise ValueError(
                f"depth {self.depth} plans steps whose tokens are not known yet, but with drafts their number is not "
                "known either; leave depth at 1, or drafts at 0"
            )
        if self.max_step_tokens < self.max_running * (1 + self.drafts):
            times = f" times {1 + self.drafts}, with drafts {self.drafts}" if self.drafts else ""
            raise ValueError(
                f"max_step_tokens must be at least max_running{times}, or some running requests would never advance"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostsConfig:
    """On which hosts units run, and how they reach the head. Raises ValueError for values that cannot work."""

    layouts: tuple[Layout, ...]
    """Of each unit. A host may have ranks of several."""
    head: str = ""
    """Address of the host whose process serves the clients; it listens on it, and need not have ranks. Empty: the first
    host of the first unit."""
    secret: bytes = field(repr=False)
    """At least 16 bytes, the same on all hosts."""
    port: int = JOIN_PORT
    """Where supervisors call; 0 takes a free one."""
    wait: float = 300.0
    """Seconds that the head waits for all hosts at the start."""

    @property
    def here(self) -> str:
        """Address of the head."""
        return self.head or self.layouts[0].hosts[0].address

    @property
    def others(self) -> tuple[str, ...]:
        """Addresses of the hosts that join the head, in the order of the layouts."""
        every = (host.address for layout in self.layouts for host in layout.hosts)
        return tuple(address for address in dict.fromkeys(every) if address != self.here)

    def __post_init__(self) -> None:
        if len(self.secret) < 16:  # whoever can connect is given an HMAC, so a short one could be guessed at leisure
            raise ValueError(f"secret: needs at least 16 bytes, not {len(self.secret)}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, not {self.port}")
        if not 0 < self.wait <= 86400:
            raise ValueError(f"wait must be above 0 and at most 86400 seconds, not {self.wait}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvConfig:
    """How the ranks of one unit give prompts to those of others and take them: each can do both, and what it does is
    decided request by request.

    The unit says what is the same for all its ranks; the rest is known where they run (`brigade.engine.kv_host`).
    """

    link: Link = "shared"
    n_here: int = 1
    """Ranks of all units on this machine: they share its cores and its memory."""
    files: tuple[int, ...] = ()
    """Shared memory of the caches of all ranks of all units: file numbers, which processes inherit; -1 for those on
    other hosts."""
    first: int = 0
    """Which of them is that of this unit's rank 0; those of its other ranks follow."""
    address: str = ""
    """Where ranks tell what is finished, each on a port of its own."""
    secret: bytes = field(default=b"", repr=False)
    """What ranks know each other by over TCP. Never sent: every host derives it."""
