"""Reads single experts of a checkpoint again while the model serves. Must not be able to take the process down.

Files are read, not mapped: a mapped file that somebody cuts short kills the process that looks at it. A file that is
not the one the model was loaded from is refused, since its weights would change the text.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from brigade.model.stored import FP8, BadCheckpoint, Stored, stored_in
from brigade.model.weights import SCALE, Checkpoint, dequantize

PARTS = ("gate", "up", "down")


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
                stored = stored_in(path, file.fileno())
            self._where |= {name: at for name, at in stored.items() if ".experts." in name}

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
        with self._opened(stored.path) as fd:
            return stored.read(fd)

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
