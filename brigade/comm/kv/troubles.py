"""What does not work with the disk store now, and when it is tried again. Tries nothing itself."""

import logging
import threading
import time

log = logging.getLogger("brigade.kv")

PAUSE = 30.0
"""Seconds without the disk after an error."""


class Troubles:
    """What does not work now: "read", "write", or "open", without which nothing does. One line in the log when there is
    the first, and one when there is none any more. From any thread."""

    def __init__(self, path: object) -> None:
        self._path = path
        self._why: dict[str, str] = {}
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def none(self) -> bool:
        return not self._why

    def has(self, what: str) -> bool:
        """Whether it did not work when it was last tried."""
        return what in self._why

    def may(self, what: str) -> bool:
        """Whether it works, or can be tried again."""
        return time.monotonic() >= self._until.get(what, 0.0)

    def failed(self, what: str, why: str) -> None:
        with self._lock:
            if not self._why:
                log.warning("KV disk store %s (%s): %s; serving goes on without", self._path, what, why)
            self._why[what], self._until[what] = why, time.monotonic() + PAUSE

    def worked(self, what: str) -> None:
        with self._lock:
            if self._why.pop(what, None) is not None and not self._why:
                log.warning("KV disk store %s works again", self._path)
