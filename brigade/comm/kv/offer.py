"""What one rank tells another about rows of its KV cache: plain numbers, in a message."""

import msgspec


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """Where the rows of tokens start..end of a prompt lie in the cache of the rank that computed it."""

    rid: int
    """The number of the request on that rank."""
    pages: list[int]
    """Page table of the whole prompt."""
    page: int
    n_pages: int
    """Pages of that cache."""
    start: int
    end: int
    row_bytes: int
    checks: list[int]
    """Checksum of those rows, by layer."""
    file: int = -1
    """Number of the shared memory that holds the cache; -1: it is not shared."""
    address: str = ""
    """"host:port" where the rows can be fetched; empty: nowhere."""
