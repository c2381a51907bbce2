"""One file of the disk store: rows of a few tokens, all layers, behind a header that says what they are.

    magic, version, layers, tokens, row bytes, identity, key, checksum of the rows, checksum of all this
    rows, layer by layer

Nothing of it is believed: a reader knows what it wants, and whatever differs makes the file none.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from brigade.comm.kv.rows import Bytes

MAGIC = b"BRGD-KV\n"
VERSION = 1
_HEAD = struct.Struct("<8sIIII16s20sQ")
_CHECK = struct.Struct("<Q")
HEADER = _HEAD.size + _CHECK.size
_MOST = 512
"""Pieces that one system call writes; the system's limit is 1,024."""


class Damaged(ValueError):
    """The file is not the entry that its name promises."""


@dataclass(frozen=True)
class Form:
    """What all entries of one store have in common."""

    n_layers: int
    tokens: int
    row_bytes: int
    identity: bytes
    """16 bytes."""

    @property
    def payload(self) -> int:
        return self.n_layers * self.tokens * self.row_bytes

    @property
    def size(self) -> int:
        """Bytes of a file."""
        return HEADER + self.payload

    def header(self, key: bytes, check: int) -> bytes:
        head = _HEAD.pack(MAGIC, VERSION, self.n_layers, self.tokens, self.row_bytes, self.identity, key, check)
        return head + _CHECK.pack(xxhash.xxh3_64_intdigest(head))


def write(fd: int, form: Form, key: bytes, rows: Sequence[Bytes]) -> None:
    """Write a whole entry from pieces of memory. Raises OSError."""
    hashed = xxhash.xxh3_64()
    for piece in rows:
        hashed.update(piece.data)
    left = [memoryview(form.header(key, hashed.intdigest())), *(piece.data for piece in rows)]
    while left:
        n = os.writev(fd, left[:_MOST])
        while left and n >= left[0].nbytes:
            n -= left.pop(0).nbytes
        if n:
            left[0] = left[0][n:]


def read(fd: int, form: Form, key: bytes, into: Bytes) -> None:
    """Read an entry's rows, [layers, tokens, row bytes], into memory of form.payload bytes. Raises Damaged, OSError."""
    size = os.fstat(fd).st_size
    if size != form.size:
        raise Damaged(f"it has {size} bytes instead of {form.size}")
    header = bytearray(HEADER)
    left = [memoryview(header), into.data]
    while left:
        n = os.readv(fd, left)
        if not n:
            raise Damaged("it became shorter")
        while left and n >= left[0].nbytes:
            n -= left.pop(0).nbytes
        if n:
            left[0] = left[0][n:]
    check: int = _HEAD.unpack_from(header)[-1]
    if header != form.header(key, check):
        raise Damaged(_what_differs(bytes(header), form))
    if xxhash.xxh3_64_intdigest(into.data) != check:
        raise Damaged("its checksum is wrong")


def _what_differs(header: bytes, form: Form) -> str:
    magic, version, *_ = _HEAD.unpack_from(header)
    if magic != MAGIC:
        return "it is no entry"
    if version != VERSION:
        return f"it is of version {version}, this is {VERSION}"
    return "its header is damaged, or that of another entry"
