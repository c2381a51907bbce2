"""A store of KV rows on a local disk: read and written in the background, never waited for. Decides nothing.

- `read` fills pages; `poll` says how far that came: all of it, or up to what was missing, damaged or too slow. What it
  says is true at once: later nothing is written into those pages any more, also where the disk still has not answered.
- `write` is done when there is time, or not at all: pages that were used again meanwhile are left out.
- An error of the disk, or one that does not answer, switches reading or writing off; one line says so. It is tried
  again from time to time.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from queue import Empty, Full, Queue
from typing import NamedTuple

import numpy as np

from brigade.comm.kv.entry import Damaged
from brigade.comm.kv.folder import Folder
from brigade.comm.kv.rows import Bytes, Rows, copy
from brigade.comm.kv.troubles import Troubles

log = logging.getLogger("brigade.kv")

READERS = 2
AHEAD = 4
"""Entries that the system is asked to read before they are needed: a lone reader gets two thirds of a disk's speed."""
STALL = 2.0
"""Seconds that one entry may take to be read."""
PATIENCE, SLOW = 2.0, 50e6
"""Seconds that all entries of a request may take, and bytes a second beyond that: a slower disk is left alone."""
LOOK = 5.0
"""Seconds between two looks at what other processes have written."""
MOST_WRITES = 64
"""Requests whose pages may wait to be written."""
NICE, SHARE = 10, 0.25
"""Of the thread that writes: its priority, and the part of the time that it may compute. What it takes from a step that
wants all cores is spread over several steps; a gigabyte then takes about two seconds."""


class Filled(NamedTuple):
    """How a read ended."""

    rid: int
    end: int
    """The rows of tokens before it are there."""


@dataclass
class Counts:
    """What happened so far. Each number has one thread that adds to it."""

    read_bytes: int = 0
    written_bytes: int = 0
    damaged: int = 0
    """Entries that were removed because they were not what they should be."""
    late: int = 0
    """Reads that were given up because the disk was too slow."""
    failed: int = 0
    """Errors of the disk."""
    dropped: int = 0
    """Requests that were not written: too many waited, or their pages were used again."""


@dataclass
class _Read:
    rid: int
    keys: Iterable[bytes]
    pages: list[int]
    start: int
    n: int
    """Keys that are wanted."""
    end: int
    until: float | None = None
    """When it has taken too long; None: it is not its turn yet."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held to fill pages, and to say that none may be filled any more."""
    over: bool = False


class _Write(NamedTuple):
    keys: Iterable[bytes]
    pages: list[int]
    still: Callable[[int, int], bool]


class DiskStore:
    """Used from one thread; has threads of its own, which a disk may hold up for as long as it likes."""

    def __init__(self, folder: Folder, rows: Rows) -> None:
        """`rows`: the cache that is filled and read from."""
        self.folder, self.rows, self.step = folder, rows, folder.form.tokens
        self.counts = Counts()
        self.troubles = Troubles(folder.path)
        self.opened = threading.Event()
        """The folder was looked through, or cannot be used."""
        self._running: dict[int, _Read] = {}
        self._reads: Queue[_Read | None] = Queue()
        self._writes: Queue[_Write | None] = Queue(MOST_WRITES)
        self._asked: list[float | None] = [None] * READERS
        """Since when each reader has been waiting for the disk."""
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._write_all, name="kv-disk-write", daemon=True)]
        for n in range(READERS):
            self._threads.append(threading.Thread(target=self._read_all, args=(n,), name="kv-disk-read", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def pending(self) -> bool:
        """Whether `poll` will have something soon."""
        return bool(self._running)

    @property
    def well(self) -> bool:
        return self.opened.is_set() and self.troubles.none

    def known(self, keys: Iterable[bytes]) -> int:
        """How many of these there probably are, up to the first that is not there. Asks no disk."""
        if not self._may("read") or self._stuck():
            return 0
        n = 0
        for key in keys:
            if key not in self.folder:
                break
            n += 1
        return n

    def read(self, rid: int, keys: Iterable[bytes], pages: Sequence[int], start: int, end: int) -> None:
        """Fill `pages` with the rows of tokens start..end; `keys` are those of all tokens from the first one on.
        `start` is at the beginning of a page."""
        job = _Read(rid, keys, list(pages), start, end // self.step, start)
        self._running[rid] = job
        self._reads.put(job)

    def drop(self, rid: int) -> bool:
        """Nobody wants these rows any more: nothing is written into the pages from now on. Whether they were being
        read."""
        job = self._running.pop(rid, None)
        if job is not None:
            with job.lock:
                job.over = True
        return job is not None

    def poll(self) -> list[Filled]:
        """Reads that have ended, each once."""
        if not self._running:
            return []
        now, stuck = time.monotonic(), self._stuck()
        if stuck:
            self.troubles.failed("read", f"it has not answered for {STALL:g} s")
        out = []
        for job in list(self._running.values()):
            slow = job.until is not None and now >= job.until
            if not job.over and (slow or stuck):
                self.counts.late += 1
                if not stuck:
                    self.troubles.failed("read", f"it is slower than {SLOW / 1e6:g} MB a second")
            elif not job.over:
                continue
            self.drop(job.rid)
            out.append(Filled(job.rid, job.end))
        return out

    def write(self, keys: Iterable[bytes], pages: Sequence[int], still: Callable[[int, int], bool]) -> None:
        """Store these pages, which hold the rows of all keys; `still(a, b)` says, from any thread, whether pages
        number a..b of them have not been used for anything else."""
        if not self._may("write"):
            return
        try:
            self._writes.put_nowait(_Write(keys, list(pages), still))
        except Full:
            self.counts.dropped += 1

    def close(self) -> None:
        """End the threads, if the disk lets them go; what waits to be written is given up."""
        self._closed.set()
        for rid in list(self._running):
            self.drop(rid)
        for _ in range(READERS):
            self._reads.put(None)
        with contextlib.suppress(Full):  # then there is enough to wake it
            self._writes.put_nowait(None)
        until = time.monotonic() + STALL
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))

    def _stuck(self) -> bool:
        now = time.monotonic()
        return any(since is not None and now - since > STALL for since in self._asked)

    # Behind

    def _read_all(self, number: int) -> None:
        into = np.empty(self.folder.form.payload, np.uint8)
        while (job := self._reads.get()) is not None:
            if self._may("read") and not job.over:
                job.until = time.monotonic() + PATIENCE + job.n * self.folder.form.size / SLOW
                self._try("read", partial(self._read, job, into, number))
            self._asked[number] = None
            job.over = True

    def _read(self, job: _Read, into: Bytes, number: int) -> None:
        skipped = job.start // self.step
        keys, ahead = islice(job.keys, skipped, job.n), deque[tuple[bytes, int]]()
        at, more = skipped * self.step, True
        try:
            while not job.over:
                self._asked[number] = time.monotonic()
                more = more and self._ask(keys, ahead)
                if not ahead:
                    return
                key, fd = ahead.popleft()
                try:
                    self.folder.read(fd, key, into)
                except Damaged as e:
                    self.counts.damaged += 1
                    log.warning("an entry of the KV disk store was removed: %s: %s", self.folder.file(key), e)
                    return
                finally:
                    os.close(fd)
                self._asked[number] = None
                self.counts.read_bytes += self.folder.form.size
                self.troubles.worked("read")
                self._fill(job, at, into)
                at += self.step
        finally:
            for _, fd in ahead:
                os.close(fd)

    def _ask(self, keys: Iterator[bytes], ahead: deque[tuple[bytes, int]]) -> bool:
        """Have the system read further entries; whether there are more."""
        for key in islice(keys, AHEAD - len(ahead)):
            fd = self.folder.begin(key)
            if fd is None:
                return False
            ahead.append((key, fd))
        return True

    def _fill(self, job: _Read, at: int, into: Bytes) -> None:
        """Rows of the tokens from `at` on get to their pages, as far as they are wanted."""
        start, end = max(at, job.start), at + self.step
        layers = into.reshape(self.rows.n_layers, -1)
        with job.lock:
            if job.over:
                return
            for layer in range(self.rows.n_layers):
                source = layers[layer, (start - at) * self.rows.row_bytes :]
                copy([source], self.rows.runs(layer, job.pages, start, end))
            job.end = end

    def _write_all(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        self._try("open", self.folder.open)
        self.opened.set()
        look = time.monotonic() + LOOK
        while not self._closed.is_set():
            with contextlib.suppress(Empty):
                job = self._writes.get(timeout=max(look - time.monotonic(), 0.0))
                if job is not None and self._may("write"):
                    self._try("write", partial(self._write, job))
            if time.monotonic() >= look:
                if self.troubles.may("open"):
                    self._try("open", self._look)
                look = time.monotonic() + LOOK

    def _look(self) -> None:
        """Learn what others have done; after a trouble, see whether the folder is there again."""
        if self.troubles.has("open"):
            self.folder.open()
            self.troubles.worked("open")
        else:
            self.folder.refresh()

    def _may(self, what: str) -> bool:
        return self.troubles.may(what) and not self.troubles.has("open")

    def _try(self, what: str, do: Callable[[], None]) -> None:
        try:
            do()
        except OSError as e:
            self.counts.failed += 1
            # What an entry's own absence means is known before: here the folder itself is gone.
            self.troubles.failed("open" if isinstance(e, FileNotFoundError) else what, _text(e))

    def _write(self, job: _Write) -> None:
        each, whole, began = self.step // self.rows.page, True, time.thread_time()
        for i, key in enumerate(job.keys):
            first, last = i * each, (i + 1) * each
            if self._closed.is_set() or last > len(job.pages):
                return
            if key in self.folder and self.folder.touch(key):
                continue
            if not job.still(first, last):
                whole = False
                continue
            runs = [
                run
                for layer in range(self.rows.n_layers)
                for run in self.rows.runs(layer, job.pages, i * self.step, (i + 1) * self.step)
            ]
            if self.folder.write(key, runs, partial(job.still, first, last)):
                self.counts.written_bytes += self.folder.form.size
                self.troubles.worked("write")
            self._closed.wait((time.thread_time() - began) * (1 / SHARE - 1))
            began = time.thread_time()
        self.counts.dropped += not whole


def _text(e: OSError) -> str:
    if e.strerror and e.filename:
        return f"{e.filename}: {e.strerror}"
    return str(e) or type(e).__name__
