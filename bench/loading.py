"""How much memory loading a model takes beside what it leaves: packed weights and embedding. And how long it takes.

    python -m bench.loading CHECKPOINT --threads 2

Each kind is loaded in a process of its own, which looks at its own resident memory every few milliseconds. Private
memory is what nobody else can use; pages of files that it has mapped can be taken back by the system at any time.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from brigade.engine.machine import read_cpu
from brigade.kernels.cpu.build import Built, find_library
from brigade.kernels.cpu.layers import Kernels
from brigade.kernels.cpu.packed import KINDS, Kind, Packed
from brigade.model.on_cpu_kernels import CpuModel
from brigade.model.weights import Checkpoint
from brigade.spec.config import read_spec

LOOK_EVERY = 0.002
MB = 1e6


@dataclass(frozen=True)
class Resident:
    """Memory of a process, in bytes."""

    private: int
    files: int


@dataclass(frozen=True)
class Loading:
    """What one load took. Memory in bytes."""

    kind: str
    seconds: float
    start: int
    """Private memory before: Python, torch and the library of kernels."""
    peak: int
    """Private."""
    peak_files: int
    kept: int
    """Packed weights and the embedding."""


class Watch(threading.Thread):
    """Remembers the most memory that this process had while `with` lasted."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._end = threading.Event()
        self.private, self.files = 0, 0

    def run(self) -> None:
        while True:
            now = resident()
            self.private, self.files = max(self.private, now.private), max(self.files, now.files)
            if self._end.wait(LOOK_EVERY):
                return

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()


def main() -> int:
    """The command line. Returns the exit status: 1 where the kernels cannot be used."""
    parser = argparse.ArgumentParser(prog="bench.loading", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--cold", action="store_true", help="let the system forget the checkpoint's files first")
    parser.add_argument("--here", choices=tuple(KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    library = find_library(read_cpu().features)
    if not isinstance(library, Built):
        print(library, file=sys.stderr)
        return 1
    if options.here:
        print(json.dumps(asdict(load(options.checkpoint, library.path, options.threads, options.here))))
        return 0
    command = [sys.executable, "-m", "bench.loading", str(options.checkpoint), "--threads", str(options.threads)]
    loads = list[Loading]()
    for kind in options.kinds:
        if options.cold:
            forget(options.checkpoint)
        done = subprocess.run([*command, "--here", kind], check=True, stdout=subprocess.PIPE, text=True)
        loads.append(Loading(**json.loads(done.stdout)))
    Console(width=120).print(table(loads))
    return 0


def load(folder: Path, library: Path, threads: int, kind: Kind) -> Loading:
    """Load a model as a rank does, and watch."""
    torch.set_num_threads(1)
    spec = read_spec(folder)
    kernels = Kernels(library, threads)
    start = resident().private
    with Watch() as watch:
        begin = time.perf_counter()
        checkpoint = Checkpoint(folder, spec)
        model = CpuModel(spec, checkpoint.reader(torch.bfloat16), kernels, kind)
        seconds = time.perf_counter() - begin
    packed = {t.data_ptr(): t.nbytes for o in gc.get_objects() if type(o) is Packed for t in o.memory}
    return Loading(kind, seconds, start, watch.private, watch.files, sum(packed.values()) + model.embed.nbytes)


def resident() -> Resident:
    """Of this process, now. Linux only."""
    status = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in status if line.startswith("Rss")}
    return Resident(sizes["RssAnon"], sizes["RssFile"])


def forget(folder: Path) -> None:
    """Have the system drop what it keeps of a checkpoint's files, so that they come from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(loads: list[Loading]) -> Table:
    """Peak beside what stays: with Python and torch, and without."""
    out = Table(title="loading; MB")
    for name in ("kind", "seconds", "before", "kept", "peak", "peak / kept", "without before", "mapped files"):
        out.add_column(name, justify="left" if name == "kind" else "right")
    for x in loads:
        out.add_row(
            *(x.kind, f"{x.seconds:.1f}", f"{x.start / MB:.0f}", f"{x.kept / MB:.0f}", f"{x.peak / MB:.0f}"),
            *(f"{x.peak / x.kept:.2f}", f"{(x.peak - x.start) / x.kept:.2f}", f"{x.peak_files / MB:.0f}"),
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
