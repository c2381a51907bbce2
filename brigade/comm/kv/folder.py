"""The folder of the disk store: entries by key, bounded in bytes, shared by any number of processes. No threads.

    PATH/brigade-kv/            0700, of this user
        ledger                  bytes of all entries; its lock is held to change it and to remove entries
        3f/                     256 of them, by the key's first byte
            <rest of the key>   an entry, 0600
            .<pid>-<n>          one that is being written

An entry appears by a rename, so it is whole or not there as long as the system does not crash; what a crash of the
system leaves, its checksum finds. Nothing waits for the disk to have written: what is lost is computed again. Whoever
reads an entry that is removed meanwhile reads on. The oldest go first; reading one makes it young (its mtime).
"""

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

from brigade.comm.kv import entry
from brigade.comm.kv.entry import Damaged, Form
from brigade.comm.kv.rows import Bytes

NAME = "brigade-kv"
LEAVE = 0.95
"""Share of its bound that remains when room is made, so that this is not done for every entry."""
LEFT_BEHIND = 60.0
"""Seconds after which a half-written entry belongs to nobody any more."""
YOUNG = 60.0
"""Seconds for which an entry stays young: it is not made so again meanwhile."""
LOCK_WAIT = 10.0
"""Seconds to wait for another process that changes the ledger."""
_N = 256


class Unusable(OSError):
    """The folder cannot be used. The message says why."""


class Folder:
    """Used by threads of one process: one that writes, others that read. A call may take as long as the disk does."""

    def __init__(self, path: str, most: int, form: Form) -> None:
        """`most`: bytes of all entries in the folder, whoever wrote them."""
        self.path, self.most, self.form = Path(path) / NAME, most, form
        self.used = 0
        """Bytes of all entries when this was last counted."""
        self._known: list[set[bytes]] = [set() for _ in range(_N)]
        """Keys that had an entry when the folder was last looked through, by first byte."""
        self.n_evicted = 0
        self._seen: dict[int, int] = {}
        """Subfolder -> its mtime, in ns, when its names were read."""
        self._young: dict[bytes, float] = {}
        """Key -> when its entry was last made young by this process."""
        self._drafts = (f".{os.getpid()}-{os.urandom(4).hex()}-{n}" for n in count())

    def __contains__(self, key: bytes) -> bool:
        """Whether there probably is an entry. Asks no disk."""
        return key in self._known[key[0]]

    def __len__(self) -> int:
        return sum(map(len, self._known))

    def open(self) -> None:
        """Make or find the folder and look it through. Raises Unusable, OSError."""
        if not self.path.parent.is_dir():
            raise Unusable(f"{self.path.parent} is not a folder")
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(0o700)
        found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise Unusable(
                f"{self.path} must be a folder of this user that nobody else may use; remove it, or chmod 700"
            )
        for n in range(_N):
            with contextlib.suppress(FileExistsError):
                (self.path / f"{n:02x}").mkdir(0o700)
        with self._ledger() as ledger:
            if not os.fstat(ledger).st_size:
                _note(ledger, sum(size for _, size, _ in self._entries()))
        self._seen = {}
        self.refresh()

    def refresh(self) -> None:
        """Learn what other processes have written and removed, and remove what killed ones have left. Raises
        OSError."""
        now, left = time.time_ns(), False
        for n in range(_N):
            folder = self.path / f"{n:02x}"
            changed = folder.stat().st_mtime_ns
            if self._seen.get(n) == changed:
                continue
            names = os.listdir(folder)
            self._known[n] = set(_keys(n, names))
            drafts = [folder / name for name in names if name.startswith(".")]
            left |= sum(map(_remove_if_left, drafts)) > 0
            # A later change may have the same time, and a draft may be left behind without another one.
            self._seen[n] = changed if now - changed > 1_000_000_000 and not drafts else -1
        if left:  # whoever was killed had booked room for it
            self._count()
        self.used = int.from_bytes((self.path / "ledger").read_bytes()[:8], "little")

    def _count(self) -> None:
        with self._ledger() as ledger:
            _note(ledger, sum(size for _, size, _ in self._entries()))

    def file(self, key: bytes) -> Path:
        return self.path / key[:1].hex() / key[1:].hex()

    def begin(self, key: bytes) -> int | None:
        """Open an entry and have the system begin to read it; gives a file number for `read`, None if the entry is
        gone. Raises OSError."""
        try:
            fd = os.open(self.file(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            self._known[key[0]].discard(key)
            self.path.stat()  # the whole folder must not be gone
            return None
        with contextlib.suppress(OSError):  # it is no more than a hint
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        return fd

    def read(self, fd: int, key: bytes, into: Bytes) -> None:
        """The rows of an entry; what is damaged is removed. Raises Damaged, OSError."""
        try:
            entry.read(fd, self.form, key, into)
        except Damaged:
            self._known[key[0]].discard(key)
            with contextlib.suppress(FileNotFoundError):
                self.file(key).unlink()
                with contextlib.suppress(OSError):  # then it is counted until room is made
                    self._room(-self.form.size)
            raise
        with contextlib.suppress(OSError):  # a disk that became read-only can be read
            self._touch(key, fd)

    def touch(self, key: bytes) -> bool:
        """Make an entry young, if it is there. Raises OSError."""
        try:
            self._touch(key, self.file(key))
        except FileNotFoundError:
            self._known[key[0]].discard(key)
            return False
        return True

    def write(self, key: bytes, rows: Sequence[Bytes], still: Callable[[], bool]) -> bool:
        """Make an entry. False if there is one, or if `still`, which is asked when all is written, says that the rows
        may have changed meanwhile. Raises OSError; then nothing is left of it."""
        if not self._room(self.form.size):
            return False
        target, kept = self.file(key), False
        draft = target.parent / next(self._drafts)
        try:
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                entry.write(fd, self.form, key, rows)
            finally:
                os.close(fd)
            if still() and not target.exists():
                draft.rename(target)
                kept = True
        finally:
            if not kept:
                with contextlib.suppress(OSError):  # what is left is removed as a draft that nobody writes
                    draft.unlink()
                with contextlib.suppress(OSError):
                    self._room(-self.form.size)
        if kept:
            self._known[key[0]].add(key)
            self._young[key] = time.monotonic()
        return kept

    def _touch(self, key: bytes, file: int | Path) -> None:
        now = time.monotonic()
        if now - self._young.get(key, -YOUNG) >= YOUNG:
            os.utime(file)
            self._young[key] = now

    def _room(self, size: int) -> bool:
        """Book `size` bytes, after removing the oldest entries if need be; whether there is room. Raises OSError."""
        with self._ledger() as ledger:
            used = _noted(ledger) + size
            if used > self.most:
                used = self._evict(self.most * LEAVE - size) + size
            if used > self.most:
                return False
            self.used = max(used, 0)
            _note(ledger, self.used)
        return True

    def _evict(self, most: float) -> int:
        """Remove the oldest entries until `most` bytes are left; how many are. What was counted wrong is right then."""
        entries = sorted(self._entries())
        used = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if used <= most:
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            if key := _key(path):
                self._known[key[0]].discard(key)
                self._young.pop(key, None)
            used -= size
            self.n_evicted += 1
        return used

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(mtime, bytes, file) of each entry. Removes what killed processes have left. Only with the ledger's lock."""
        for n in range(_N):
            with os.scandir(self.path / f"{n:02x}") as found:
                for item in found:
                    with contextlib.suppress(FileNotFoundError):
                        about = item.stat(follow_symlinks=False)
                        if item.name.startswith("."):
                            _remove_if_left(Path(item.path))
                        elif stat.S_ISREG(about.st_mode):
                            yield about.st_mtime_ns, about.st_size, Path(item.path)

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[int]:
        """The file that says how much is used, with its lock. Raises OSError."""
        fd = os.open(self.path / "ledger", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            until = time.monotonic() + LOCK_WAIT
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise Unusable(f"{self.path}/ledger has been locked by another process for too long") from None
                    time.sleep(0.01)
            yield fd
        finally:
            os.close(fd)


def _remove_if_left(draft: Path) -> bool:
    """Remove a half-written entry that nobody writes any more; whether it was one. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):  # it has become an entry
        if time.time() - draft.lstat().st_mtime > LEFT_BEHIND:
            draft.unlink()
            return True
    return False


def _noted(ledger: int) -> int:
    return int.from_bytes(os.pread(ledger, 8, 0), "little")


def _note(ledger: int, used: int) -> None:
    os.pwrite(ledger, used.to_bytes(8, "little"), 0)


def _keys(n: int, names: Sequence[str]) -> Iterator[bytes]:
    for name in names:
        with contextlib.suppress(ValueError):
            yield bytes([n]) + bytes.fromhex(name)


def _key(path: Path) -> bytes:
    try:
        return bytes.fromhex(path.parent.name + path.name)
    except ValueError:
        return b""
