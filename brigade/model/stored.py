"""Where a safetensors file keeps a tensor, and reading it from there. Must not map files.

A mapped file that somebody cuts short kills the process that looks at it, and its pages count as memory of the process.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from brigade.spec.config import BadConfig

FP8 = "F8_E4M3"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, FP8: torch.float8_e4m3fn}


class BadCheckpoint(BadConfig):
    """Tensor files that cannot be served. The message names the file and says what to do."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor's bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self, fd: int) -> Tensor:
        """The tensor from its opened file, in memory of its own. Raises BadCheckpoint."""
        n = self.end - self.begin
        raw = torch.empty(n, dtype=torch.uint8)
        self._fill(fd, raw)
        return raw.view(DTYPES[self.dtype]).view(self.shape)

    def read_into(self, fd: int, out: Tensor) -> None:
        """The same as numbers of another tensor's type; straight into it where that is the stored one."""
        if out.dtype == DTYPES[self.dtype] and out.is_contiguous():
            self._fill(fd, out.flatten().view(torch.uint8))
        else:
            out.copy_(self.read(fd))

    def _fill(self, fd: int, raw: Tensor) -> None:
        n, done = self.end - self.begin, 0
        room = raw.numpy().data
        while done < n:
            try:
                got = os.preadv(fd, [room[done:]], self.begin + done)
            except OSError as e:
                raise BadCheckpoint(f"{self.path}: cannot be read ({e.strerror}); copy it again") from e
            if not got:
                raise BadCheckpoint(f"{self.path}: was cut short while it was in use; copy it again")
            done += got


def stored_in(path: Path, fd: int) -> dict[str, Stored]:
    """Every tensor of an opened safetensors file, whose header is known to be sound."""
    size = int.from_bytes(os.pread(fd, 8, 0), "little")
    header = json.loads(os.pread(fd, size, 8))
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), *(8 + size + at for at in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }
