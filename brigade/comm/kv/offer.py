"""What one rank tells another about rows of its KV cache: plain numbers, in a message."""

import msgspec


class Registered(msgspec.Struct, frozen=True, array_like=True):
    """A cache that others may read over NIXL."""

    agent: bytes
    """What NIXL needs to reach that rank."""
    base: int
    """Where the cache begins in its memory."""


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """Rows of tokens start..end of a prompt can be had from the rank that computes it, as soon as they are finished.

    Which are, and in which pages, is told on the link.
    """

    rid: int
    """The number of the request on that rank."""
    start: int
    end: int
    page: int
    n_pages: int
    """Pages of that rank's cache."""
    n_layers: int
    row_bytes: int
    address: str
    """"host:port" where the rank tells what is finished."""
    file: int = -1
    """Number of the shared memory that holds the cache; -1: it is not shared."""
    registered: Registered | None = None
    """Where NIXL finds the cache; None: it does not."""
