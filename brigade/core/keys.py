"""Names for what a KV cache holds that are the same in every process and on every day: a hash chain of tokens. Pure."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence

SIZE = 20
"""Bytes of a key. Equal keys are taken for equal tokens, so it is a cryptographic hash: nobody can choose two alike."""


def keys(identity: bytes, salt: str, tokens: Sequence[int], step: int) -> Iterator[bytes]:
    """The key of each whole group of `step` tokens: it depends on all tokens before it, too.

    `identity`: whatever else decides what rows look like. Tenants with different salts share no key.
    """
    node = _hash(_hash(identity) + salt.encode("utf-8", "surrogatepass"))
    for end in range(step, len(tokens) + 1, step):
        node = _hash(node + array("q", tokens[end - step : end]).tobytes())
        yield node


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=SIZE).digest()
