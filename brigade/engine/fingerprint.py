"""What tells a checkpoint, and a way of computing it, from others: what was kept on disk is for its like alone."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brigade.engine.terms import header, model_digest
from brigade.spec.config import BadConfig

SAMPLE = 4096
"""Bytes that are read of each tensor."""


def fingerprint(folder: Path) -> bytes:
    """16 bytes that change when a checkpoint does, without reading all of it.

    They cover what `model_digest` does, the time of the last change of each tensor file, and a piece from the middle of
    each tensor: other training changes all of a tensor's numbers, other tools the file's time. Raises BadConfig.
    """
    digest = hashlib.blake2b(model_digest(folder).encode(), digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            for piece in _pieces(path):
                digest.update(piece)
        except OSError as e:
            raise BadConfig(f"{path}: cannot be read ({e}); copy it again") from e
    return digest.digest()


def _pieces(path: Path) -> Iterator[bytes]:
    """The time of a tensor file's last change, and the middle of each tensor."""
    spans: list[Any] = [t["data_offsets"] for name, t in header(path).items() if name != "__metadata__"]
    with path.open("rb") as file:
        yield os.fstat(file.fileno()).st_mtime_ns.to_bytes(8, "little", signed=True)
        start = 8 + int.from_bytes(file.read(8), "little")
        for begin, end in sorted(spans):
            n = min(SAMPLE, end - begin)
            yield os.pread(file.fileno(), n, start + begin + (end - begin - n) // 2)


def identity(checkpoint: bytes, **parts: object) -> bytes:
    """16 bytes of a checkpoint's fingerprint and of everything else that rows depend on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(checkpoint + text.encode(), digest_size=16).digest()
