"""One rank's use of the disk store: what it asks it for, and what it gives it. Used by the loop, between two steps.

A prompt whose beginning the store has: `look` when it comes -> the scheduler takes pages -> `begin` -> the store fills
them behind the steps -> `turn` -> the request runs on from there. `computed` keeps what was computed, behind the steps.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from importlib import metadata
from typing import Any

import torch

from brigade.comm.kv.disk import DiskStore
from brigade.comm.kv.entry import Form
from brigade.comm.kv.folder import Folder
from brigade.comm.kv.rows import Rows
from brigade.core.filling import Fill
from brigade.core.keys import keys
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler
from brigade.engine.config import EngineConfig
from brigade.engine.fingerprint import identity
from brigade.engine.messages import StoreStats
from brigade.engine.worker import Worker
from brigade.spec.sizes import show_size

log = logging.getLogger("brigade.kv")

TOKENS = 64
"""Tokens of an entry, in whole pages: prefixes are found in steps of it. DeepSeek's own store has the same."""
OPEN = 1.0
"""Seconds that a rank waits at its start for the folder to be looked through, and at most a quarter of the time that
others wait for it in their first step; after that it serves without, until the folder is."""
SOON = 0.002
"""Seconds between two looks of an idle loop at what is being read."""


class Storing:
    """What one rank does with a store."""

    def __init__(self, store: DiskStore, scheduler: Scheduler, name: bytes) -> None:
        """`name`: what rows depend on besides their tokens."""
        self._store, self._scheduler, self._name = store, scheduler, name
        self._begun: list[tuple[Future[Any], Fill]] = []
        """Fills that wait for the steps which were in flight."""

    @classmethod
    def of(cls, config: EngineConfig, checkpoint: bytes, worker: Worker, scheduler: Scheduler) -> "Storing":
        """Of a rank that has its cache; `checkpoint`: its fingerprint. Raises ValueError."""
        layers = worker.model.cache.layers
        rows = Rows(
            layers.view(torch.uint8).reshape(-1).numpy(),
            layers.shape[0],
            worker.page,
            layers.shape[-1] * layers.element_size(),
        )
        tokens = worker.page * max(TOKENS // worker.page, 1)
        name = identity(
            checkpoint,
            version=metadata.version("brigade"),
            arithmetic=worker.arithmetic,
            wire=config.wire,
            page=worker.page,
            two_forms=worker.model.two_forms,
        )
        form = Form(rows.n_layers, tokens, rows.row_bytes, name)
        if config.kv_disk_bytes < form.size:
            raise ValueError(
                f"kv_disk has {config.kv_disk_bytes} bytes, but {tokens} tokens of this model take {form.size}; "
                "give it more"
            )
        storing = cls(DiskStore(Folder(config.kv_disk, config.kv_disk_bytes, form), rows), scheduler, name)
        storing._store.opened.wait(min(OPEN, config.rank_deadline / 4))
        return storing

    @property
    def note(self) -> str:
        """One line for people."""
        s, f = self._store, self._store.folder
        if not s.opened.is_set():
            return f"KV disk store {f.path}: not read yet"
        if not s.well:
            return f"KV disk store {f.path}: cannot be used now"
        bound = f"{show_size(f.used)} of {show_size(f.most)}"
        return f"KV disk store {f.path}: {bound}, {len(f)} entries of {f.form.tokens} tokens, {show_size(f.form.size)}"

    @property
    def rests(self) -> float | None:
        """Seconds after which an idle loop must come round again; None: only when told something."""
        return SOON if self._begun or self._store.pending else None

    @property
    def stats(self) -> StoreStats:
        c, f = self._store.counts, self._store.folder
        return StoreStats(
            c.read_bytes, c.written_bytes, f.used, f.n_evicted, c.dropped, c.damaged, c.late, c.failed, self._store.well
        )

    def look(self, req: Request) -> None:
        """Note how much of a new request may be stored."""
        tokens = self._scheduler.shareable(req)
        req.stored = self._store.known(self._keys(tokens[:-1], req.salt)) * self._store.step

    def begin(self, after: "Future[Any]") -> None:
        """Begin what the scheduler has planned, once the steps that are in flight have run."""
        begun = self._scheduler.filling.begun
        self._begun += [(after, fill) for fill in begun]
        begun.clear()

    def turn(self) -> None:
        """Go on with what is there by now."""
        for after, fill in [x for x in self._begun if x[0].done()]:
            self._begun.remove((after, fill))
            names = self._keys(fill.tokens, fill.salt)
            self._store.read(fill.rid, names, fill.pages, fill.start, fill.end)
        for rid, end in self._store.poll():
            self._scheduler.filled(rid, end)

    def drop(self, rid: int) -> None:
        """Nobody wants this request any more: its pages are not written from now on."""
        self._begun = [x for x in self._begun if x[1].rid != rid]
        self._store.drop(rid)

    def computed(self, req: Request) -> None:
        """Keep what this request has computed, as far as others may use it. Its pages must still be its own.

        Pages that it holds twice, since another request had published the same tokens before, are left out.
        """
        tokens = self._scheduler.shareable(req)
        n = min((len(tokens) - 1) // self._scheduler.pool.page, len(req.pages))
        if n * self._scheduler.pool.page < self._store.step:
            return
        pages, node = req.pages[:n], self._scheduler.pool.node
        nodes = [node(p) for p in pages]

        def still(a: int, b: int) -> bool:
            return None not in nodes[a:b] and [node(p) for p in pages[a:b]] == nodes[a:b]

        self._store.write(self._keys(tokens[: n * self._scheduler.pool.page], req.salt), pages, still)

    def close(self) -> None:
        self._store.close()

    def _keys(self, tokens: "list[int] | tuple[int, ...]", salt: str) -> Iterator[bytes]:
        return keys(self._name, salt, tokens, self._store.step)
