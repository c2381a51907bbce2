"""What "auto" becomes: pure functions from what the machine and the model are to a value and the reason for it."""

from dataclasses import dataclass

import psutil

from brigade.engine.config import EngineConfig
from brigade.engine.machine import read_limits, usable_cores
from brigade.spec.model import ModelSpec
from brigade.spec.params import active, count

GIB = 1 << 30
SMALL_MODEL = 32e6
"""Active parameters below which one thread decodes faster than two (docs/performance.md)."""
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use."""

    cores: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """An EngineConfig without "auto", and a line for each value that was chosen."""

    dtype: str
    threads: int
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


def dtype(config: EngineConfig, spec: ModelSpec, machine: Machine) -> tuple[str, str]:
    """The compute type. float32 where it fits: torch's bfloat16 matmuls round differently for different batch sizes,
    and greedy text must not depend on who else is served."""
    if config.dtype != "auto":
        return config.dtype, f"dtype {config.dtype}, as asked for"
    if 4 * count(spec) <= machine.free_bytes // 2:
        return "float32", "dtype float32: fits into memory, and text then does not depend on the batch"
    return spec.dtype, f"dtype {spec.dtype}, the checkpoint's: float32 would take more than half of the free memory"


def resolve(config: EngineConfig, spec: ModelSpec, machine: Machine, dtype_name: str, dtype_note: str) -> Resolved:
    """Everything else, once the weights are in memory. Raises ValueError if the cache cannot hold one request."""
    threads, threads_note = _threads(config, spec, machine)
    wanted = min(config.max_context or spec.context, spec.context)
    if config.kv_bytes > machine.free_bytes:
        raise ValueError(
            f"kv_bytes (--kv-memory) is {config.kv_bytes}, but {machine.free_bytes} bytes are free after the weights"
        )
    page_bytes = spec.n_layers * config.page * spec.kv_width * BYTES[dtype_name]
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
        dtype_note,
        threads_note,
        f"KV cache {n_pages} pages of {config.page} tokens, {n_pages * page_bytes / GIB:.2f} GiB",
    ]
    if config.max_context > spec.context:
        notes.append(f"max_context {config.max_context} is more than the model's {spec.context}, which it is now")
    if max_context < wanted:
        notes.append(f"context {max_context} instead of {wanted}: that is what the KV cache holds")
    return Resolved(dtype_name, threads, n_pages, max_context, notes)


def _threads(config: EngineConfig, spec: ModelSpec, machine: Machine) -> tuple[int, str]:
    if config.threads:
        return config.threads, f"threads {config.threads}, as asked for"
    if active(spec) < SMALL_MODEL:
        return 1, "threads 1: the model is so small that handing work to a second thread costs more than it saves"
    return machine.cores, f"threads {machine.cores}, all cores this process may use"
