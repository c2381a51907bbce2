"""Takes the readings that `brigade doctor` judges. Imports torch, late and only to ask what it is."""

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from brigade.cli.machine import port_problem
from brigade.engine.machine import Cpu, Limits, read_cpu, read_limits, usable_cores
from brigade.kernels.cpu.build import Buildable, Built, look_up
from brigade.kernels.cpu.compiler import Compiler, Unavailable, find_compiler

DEMO_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)\s*\(?(?:(==|>=)\s*([0-9][^,;)\s]*))?")


@dataclass(frozen=True, slots=True)
class TorchReading:
    version: str = ""
    threads: int = 0
    capability: str = ""
    """Widest vector instructions that torch uses on this CPU."""
    mkldnn: bool = False
    fast_bf16: bool = False
    gpus: tuple[str, ...] = ()
    problem: str = ""
    """Why torch cannot be imported; empty if it can."""


@dataclass(frozen=True, slots=True)
class PackageReading:
    """A package that Brigade asks for: `operator` and `wanted` are empty where any version will do."""

    name: str
    operator: str
    wanted: str
    installed: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Everything the checks look at. Sizes in bytes; None: this system has no such thing, or no limit."""

    python: tuple[int, int, int]
    machine: str
    cpu: Cpu
    cores: int
    limits: Limits
    memory_total: int
    memory_available: int
    shm_size: int | None
    open_files: int | None
    compiler: Compiler | Unavailable
    kernels: Built | Buildable | Unavailable
    torch: TorchReading
    packages: list[PackageReading] | None
    """None: Brigade itself is not installed, so nothing says what it needs."""
    port: int
    port_problem: str | None
    demo_folder: str
    demo_problem: str | None


def take_readings(port: int) -> Readings:
    """Read this machine. Takes a few seconds, since torch is imported."""
    import psutil

    from brigade.engine.config import DEMO_MODEL

    memory, cpu = psutil.virtual_memory(), read_cpu()
    return Readings(
        python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        machine=platform.machine(),
        cpu=cpu,
        cores=usable_cores(),
        limits=read_limits(),
        memory_total=memory.total,
        memory_available=memory.available,
        shm_size=read_shm(),
        open_files=read_open_files(),
        compiler=find_compiler(),
        kernels=look_up(cpu.features),
        torch=read_torch(),
        packages=read_packages(),
        port=port,
        port_problem=port_problem("127.0.0.1", port),
        demo_folder=str(DEMO_MODEL),
        demo_problem=demo_problem(DEMO_MODEL),
    )


def read_shm(path: Path = Path("/dev/shm")) -> int | None:
    """Size of the shared-memory file system, or None where there is none."""
    try:
        return shutil.disk_usage(path).total
    except OSError:
        return None


def read_open_files() -> int | None:
    """Files this process may have open, or None for no limit."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def read_torch() -> TorchReading:
    """What torch is and can do here."""
    try:
        import torch
    except (ImportError, OSError) as e:  # OSError: a shared library is missing or was built for another machine
        return TorchReading(problem=f"cannot be imported ({e})")
    mkldnn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    if torch.backends.mps.is_available():
        gpus.append("Apple GPU")
    return TorchReading(
        version=torch.__version__,
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        mkldnn=mkldnn,
        fast_bf16=mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        gpus=tuple(gpus),
    )


def read_packages(requirements: Sequence[str] | None = None) -> list[PackageReading] | None:
    """The packages of Brigade's own metadata (or of `requirements`) and what is installed of them."""
    if requirements is None:
        try:
            requirements = metadata.requires("brigade") or []
        except metadata.PackageNotFoundError:
            return None
    return [parse_requirement(line) for line in requirements if "extra ==" not in line]


def parse_requirement(line: str) -> PackageReading:
    """One line of metadata, such as "torch==2.13.0". Raises ValueError for one that is not understood."""
    match = _REQUIREMENT.match(line)
    if match is None:
        raise ValueError(f"the requirement {line!r} is not understood")
    name, operator, wanted = match.groups(default="")
    try:
        installed: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        installed = None
    return PackageReading(name, operator, wanted, installed)


def demo_problem(folder: Path) -> str | None:
    """Why the bundled model cannot be whole, or None. Reads the weights' header only."""
    for name in DEMO_FILES:
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    weights = folder / "model.safetensors"
    try:
        with weights.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(n_header, 1 << 24)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as e:
        return f"{weights} cannot be read ({os.strerror(e.errno) if e.errno else e})"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return f"{weights} is not a safetensors file; if git-lfs is in use: git lfs pull"
    size, whole = weights.stat().st_size, 8 + n_header + max(ends, default=0)
    return None if size == whole else f"{weights} has {size} bytes instead of {whole}"
