"""What "auto" becomes: pure functions from what the machine and the model are to a value and the reason for it."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from brigade.engine.config import EngineConfig, Kind
from brigade.engine.machine import read_limits, usable_cores
from brigade.spec.model import ModelSpec
from brigade.spec.params import active, count

GIB = 1 << 30
SMALL_MODEL = 32e6
"""Active parameters below which one thread decodes faster than two on torch."""
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use."""

    cores: int
    free_bytes: int

    def part(self, n: int) -> "Machine":
        """What one of n processes on this machine may use."""
        return Machine(max(1, self.cores // n), self.free_bytes // n)


@dataclass(frozen=True, slots=True)
class Computing:
    """On which path a model is computed."""

    dtype: str
    kind: Kind | None
    """Weights of the C++ kernels; None on torch."""
    library: Path | None
    note: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """An EngineConfig without "auto", and a line for each value that was chosen."""

    n_pages: int
    max_context: int
    notes: list[str]


def this_machine() -> Machine:
    """Cores this process may run on, and memory it may still take within its control group."""
    limits = read_limits()
    cores = usable_cores() if limits.cores is None else min(usable_cores(), max(1, int(limits.cores)))
    free = psutil.virtual_memory().available
    if limits.memory is not None:
        free = min(free, max(limits.memory - limits.memory_used, 0))
    return Machine(cores, free)


def computing(config: EngineConfig, spec: ModelSpec, machine: Machine, library: Path | None, why_not: str) -> Computing:
    """The path a model is computed on. `library` holds the C++ kernels, or is None because of `why_not`.

    Raises ValueError if what was asked for needs the kernels and there are none.

    Without kernels it is float32 where that fits: torch's bfloat16 matmuls round differently for different batch sizes,
    and greedy text must not depend on who else is served.
    """
    if library is not None and config.dtype in ("auto", "bfloat16"):
        kind: Kind = "bf16" if config.weights == "auto" else config.weights
        what = "int4 experts and feed-forward layers, int8 attention and head" if kind == "int4" else f"{kind} weights"
        return Computing("bfloat16", kind, library, f"C++ kernels, {what}, bf16 activations")
    if config.weights != "auto":
        raise ValueError(f"weights {config.weights} need the C++ kernels, which cannot be used: {why_not}")
    without = f"torch, since {why_not}" if why_not else "torch"
    if config.dtype != "auto":
        return Computing(config.dtype, None, None, f"{without}; dtype {config.dtype}, as asked for")
    if 4 * count(spec) <= machine.free_bytes // 2:
        return Computing("float32", None, None, f"{without}; dtype float32, so that text does not depend on the batch")
    note = f"{without}; dtype {spec.dtype}, the checkpoint's: float32 would take more than half of the free memory"
    return Computing(spec.dtype, None, None, note)


def resolve(config: EngineConfig, spec: ModelSpec, machine: Machine, dtype_name: str) -> Resolved:
    """The cache, once the weights are in memory. Raises ValueError if it cannot hold one request."""
    wanted = min(config.max_context or spec.context, spec.context)
    if config.kv_bytes > machine.free_bytes:
        raise ValueError(
            f"kv_bytes (--kv-memory) is {config.kv_bytes}, but {machine.free_bytes} bytes are free after the weights"
        )
    page_bytes = spec.n_blocks * config.page * spec.kv_width * BYTES[dtype_name]
    pages_each = -(-wanted // config.page)
    budget = config.kv_bytes or machine.free_bytes // 4
    n_pages = budget // page_bytes
    if not config.kv_bytes:
        n_pages = min(n_pages, pages_each * config.max_running)
    if n_pages < 2:
        raise ValueError(
            f"the KV cache has {budget} bytes, but one page of {config.page} tokens takes {page_bytes}: "
            "give it more (--kv-memory) or free memory"
        )
    max_context = min(wanted, n_pages * config.page)
    notes = [
        f"KV cache {n_pages} pages of {config.page} tokens, {n_pages * page_bytes / GIB:.2f} GiB",
    ]
    if config.max_context > spec.context:
        notes.append(f"max_context {config.max_context} is more than the model's {spec.context}, which it is now")
    if max_context < wanted:
        notes.append(f"context {max_context} instead of {wanted}: that is what the KV cache holds")
    return Resolved(n_pages, max_context, notes)


def threads(config: EngineConfig, spec: ModelSpec, machine: Machine, computing: Computing) -> tuple[int, str]:
    """How many threads compute, and why."""
    if config.threads:
        return config.threads, f"threads {config.threads}, as asked for"
    if computing.library is None and active(spec) < SMALL_MODEL:
        return 1, "threads 1: on torch, handing so little work to a second thread costs more than it saves"
    return machine.cores, f"threads {machine.cores}, all cores this process may use"
