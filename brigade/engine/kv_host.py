"""What the ranks of all units on one host have in common, so that they can hand prompts over. Moves nothing.

Two ranks of one host share memory: a file without a name for each rank's cache, which the processes inherit. Two ranks
of different hosts meet over TCP, on the address that the layout has, and know each other by a secret that each host
derives from the one its owner copied there: neither crosses the network.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from brigade.comm.kv.shared import create
from brigade.engine.config import KvConfig
from brigade.engine.output import LoadError
from brigade.spec.layout import Layout, n_sharing

_LABEL = b"brigade: KV rows between units, 1"


def kv_secret(hosts_secret: bytes) -> bytes:
    """What ranks of a fleet know each other by, from what its hosts know each other by."""
    return hmac.digest(hosts_secret, _LABEL, hashlib.sha256)


class KvHost:
    """One host of a fleet. Make it with `create`; `close` when no process is left that was started with it."""

    def __init__(self, address: str, layouts: Sequence[Layout], secret: bytes) -> None:
        self._address, self._layouts, self._secret = address, layouts, secret
        self._files: list[int] = []

    @classmethod
    def create(cls, address: str, layouts: Sequence[Layout], hosts_secret: bytes = b"") -> "KvHost":
        """The host with this address, of all units of a fleet. `hosts_secret`: empty where there is only one host.

        Raises LoadError.
        """
        made = cls(address, layouts, kv_secret(hosts_secret) if hosts_secret else secrets.token_bytes(32))
        try:
            for host in (host for layout in layouts for host in layout.hosts):
                for _ in range(host.n_ranks):
                    made._files.append(create() if host.address == address else -1)
        except OSError as e:
            made.close()
            raise LoadError(f"no memory can be shared between units: {e}") from e
        return made

    def of(self, unit: int, kv: KvConfig) -> KvConfig:
        """What a unit says of its ranks, completed for those that run here."""
        first = list(accumulate((layout.n_ranks for layout in self._layouts), initial=0))[unit]
        return replace(
            kv,
            n_here=n_sharing(self._layouts, self._address),
            files=tuple(self._files) if kv.link == "shared" else (),
            first=first,
            address=self._address,
            secret=self._secret,
        )

    def close(self) -> None:
        for file in self._files:
            if file >= 0:
                os.close(file)
        self._files = []
