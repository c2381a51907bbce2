"""Reads single experts of a checkpoint again while the model serves. Must not be able to take the process down.

Files are read, not mapped: a mapped file that somebody cuts short kills the process that looks at it. A file that is
not the one the model was loaded from is refused, since its weights would change the text.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from brigade.model.weights import FP8, SCALE, BadCheckpoint, Checkpoint, dequantize

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, FP8: torch.float8_e4m3fn}
PARTS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor's bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class ExpertFiles:
    """Where the routed experts of an opened checkpoint are, and what its files were then. Holds no file open."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """`dtype`: what the checkpoint was read as. Raises BadCheckpoint and OSError."""
        self._dtype, self._block = dtype, checkpoint.spec.block_scale
        self._where: dict[str, Stored] = {}
        self._was: dict[Path, tuple[int, ...]] = {}
        for path in checkpoint.files():
            with path.open("rb") as file:
                self._was[path] = _identity(file.fileno())
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            for name, entry in header.items():
                if ".experts." not in name:
                    continue
                begin, end = (8 + size + at for at in entry["data_offsets"])
                self._where[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), begin, end)

    def read(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """(gate_FD, up_FD, down_DF) of a model layer's expert, as the loader gives them. Raises BadCheckpoint."""
        at = f"model.layers.{layer}.mlp.experts.{expert}"
        gate, up, down = (self._weight(f"{at}.{part}_proj.weight") for part in PARTS)
        return gate, up, down

    def _weight(self, name: str) -> Tensor:
        tensor = self._tensor(self._where[name])
        out = torch.empty(tensor.shape, dtype=self._dtype)
        if self._where[name].dtype != FP8:
            return out.copy_(tensor)
        if self._block is None:
            raise BadCheckpoint(f"{self._where[name].path}: FP8 weights without a block size in config.json")
        dequantize(tensor, self._tensor(self._where[name + SCALE]), self._block, out)
        return out

    def _tensor(self, stored: Stored) -> Tensor:
        n = stored.end - stored.begin
        raw = torch.empty(n, dtype=torch.uint8)
        room = raw.numpy().data
        with self._opened(stored.path) as fd:
            done = 0
            while done < n:
                try:
                    got = os.preadv(fd, [room[done:]], stored.begin + done)
                except OSError as e:
                    raise BadCheckpoint(f"{stored.path}: cannot be read again ({e.strerror})") from e
                if not got:
                    raise BadCheckpoint(f"{stored.path}: was cut short while the model was being served")
                done += got
        return raw.view(DTYPES[stored.dtype]).view(stored.shape)

    @contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise BadCheckpoint(f"{path}: cannot be opened again ({e.strerror})") from e
        try:
            if _identity(fd) != self._was[path]:
                raise BadCheckpoint(f"{path}: is not the file the model was loaded from; restart to use the new one")
            yield fd
        finally:
            os.close(fd)


def _identity(fd: int) -> tuple[int, ...]:
    s = os.fstat(fd)
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns
