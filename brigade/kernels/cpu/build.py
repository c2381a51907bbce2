"""Where is the shared library of the C++ kernels? Finds it or builds it. Must not raise for what a machine lacks.

1. the CPU must have every feature that the code is compiled for
2. a prebuilt library in the package is taken if it was built from the present sources and flags
3. otherwise sources, flags, features and the C++ compiler's identity make the key of a cache entry
4. the first cache folder that holds the entry gives it; an entry's name ends in the digest of its bytes, so one that
   was half written or damaged is never loaded
5. otherwise one process takes the key's lock, compiles in a folder of its own beside the entry, and renames the result

`python -m brigade.kernels.cpu.build FOLDER` builds the library of step 2. A wheel built with BRIGADE_PREBUILD=1 carries
one (hatch_build.py) and needs no compiler where it is installed.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from brigade.kernels.cpu.compiler import Compiler, Unavailable, find_compiler, first_error, run_all

COMPILE_DEADLINE = 300.0
LOCK_DEADLINE = 330.0
"""Seconds to wait for another process that builds the same library: a little longer than it may compile."""
LOCK_POLL = 0.05
PREFIX = "brigade-cpu-"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is built, how, and for which CPUs."""

    folder: Path
    """Holds the sources: its *.cpp are compiled and linked together, its *.h are there to be included."""
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """CPU features as Linux names them."""
    link_flags: tuple[str, ...] = ()

    @property
    def prebuilt(self) -> Path:
        return self.folder / "prebuilt"


KERNELS = Recipe(
    folder=Path(__file__).parent,
    flags=(
        *("-O3", "-std=c++17", "-fPIC", "-pthread"),
        # x86-64-v4 is AVX-512 F, BW, CD, DQ and VL. GCC 12 does not know -march=znver4.
        *("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"),
    ),
    needs=(
        *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
        *("avx512_bf16", "avx512_vnni", "avx512vbmi"),
    ),
    link_flags=("-Wl,-z,defs",),  # a name that is missing is the compiler's error, not the loader's
)


@dataclass(frozen=True, slots=True)
class Built:
    """A library that was loaded once to see that it can be: `ctypes.CDLL(built.path)` works."""

    path: Path
    origin: Literal["prebuilt", "cache", "compiled"]
    seconds: float = 0.0
    """How long the compiler took."""
    notes: tuple[str, ...] = ()
    """What went wrong on the way: for the log."""


@dataclass(frozen=True, slots=True)
class Buildable:
    """No library yet, and nothing known that keeps it from being built."""

    compiler: Compiler
    folder: Path
    key: str
    sources: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


def find_library(
    features: frozenset[str],
    recipe: Recipe = KERNELS,
    env: Mapping[str, str] = os.environ,
    *,
    compile_deadline: float = COMPILE_DEADLINE,
    lock_deadline: float = LOCK_DEADLINE,
) -> Built | Unavailable:
    """The library for a CPU with these features, compiled now if need be. Deadlines in seconds. Raises nothing.

    Any number of processes may ask at once: one compiles, the others wait and get the same file.
    """
    folders = cache_folders(env)
    notes: tuple[str, ...] = ()
    while True:
        found = _look_in(folders, features, recipe, env, notes)
        if not isinstance(found, Buildable):
            return found
        try:
            return _build_cached(found, recipe, env, compile_deadline, lock_deadline)
        except OSError as e:
            notes = (*found.notes, _cannot_be_used(found.folder, e))
            folders = folders[folders.index(found.folder) + 1 :]


def look_up(
    features: frozenset[str], recipe: Recipe = KERNELS, env: Mapping[str, str] = os.environ
) -> Built | Buildable | Unavailable:
    """What `find_library` would find, without building or writing anything. Raises nothing."""
    return _look_in(cache_folders(env), features, recipe, env, ())


def cache_folders(env: Mapping[str, str]) -> list[Path]:
    """Where built libraries are kept, best first; the last is for machines whose homes cannot be written."""
    spare = Path(tempfile.gettempdir() if "TMPDIR" not in env else env["TMPDIR"]) / f"brigade-{os.geteuid()}"
    if env.get("BRIGADE_CACHE"):
        return [Path(env["BRIGADE_CACHE"]).absolute(), spare]
    caches = Path(env.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():  # the XDG rules say that a relative path is to be ignored
        caches = Path(env.get("HOME") or os.path.expanduser("~")) / ".cache"
    return [caches / "brigade", spare] if caches.is_absolute() else [spare]


def _look_in(
    folders: Sequence[Path],
    features: frozenset[str],
    recipe: Recipe,
    env: Mapping[str, str],
    notes: tuple[str, ...],
) -> Built | Buildable | Unavailable:
    missing = [f for f in recipe.needs if f not in features]
    if missing:
        return Unavailable(
            f"this CPU has no {', '.join(missing)}: the C++ kernels need AMD Zen 4, Intel Sapphire Rapids or newer"
        )
    try:
        sources = read_sources(recipe.folder)
    except OSError as e:
        return Unavailable(f"the kernel sources cannot be read ({e})", "reinstall Brigade")
    if not any(name.endswith(".cpp") for name in sources):
        return Unavailable(f"there are no kernel sources in {recipe.folder}", "reinstall Brigade")
    try:
        prebuilt = _entry(recipe.prebuilt, key_of(sources, recipe))
    except OSError as e:
        prebuilt, notes = None, (*notes, _cannot_be_used(recipe.prebuilt, e))
    if prebuilt is not None:
        return Built(prebuilt, "prebuilt", notes=notes)
    compiler = find_compiler(env)
    if isinstance(compiler, Unavailable):
        return compiler
    key = key_of(sources, recipe, compiler)
    for folder in folders:
        try:
            if problem := unsafe(folder):
                return problem
            entry = _entry(folder, key)
            if entry is not None:
                return Built(entry, "cache", notes=notes)
            _require_writable(folder)
        except OSError as e:
            notes = (*notes, _cannot_be_used(folder, e))
        else:
            return Buildable(compiler, folder, key, sources, notes)
    return Unavailable(
        f"no folder can keep the built C++ kernels ({', '.join(notes)})",
        "set BRIGADE_CACHE to a folder that can be written and run from",
    )


def read_sources(folder: Path) -> dict[str, bytes]:
    """File name -> bytes of every source and header. Raises OSError."""
    paths = [p for p in folder.iterdir() if p.suffix in (".cpp", ".h")]
    return {p.name: p.read_bytes() for p in sorted(paths)}


def key_of(sources: Mapping[str, bytes], recipe: Recipe, compiler: Compiler | None = None) -> str:
    """Names what a build depends on. A prebuilt library's key has no compiler: it comes from another machine."""
    parts = {
        "sources": {name: hashlib.sha256(data).hexdigest() for name, data in sources.items()},
        "flags": [recipe.flags, recipe.link_flags],
        "needs": recipe.needs,
        "machine": [platform.system(), platform.machine()],
        "compiler": None if compiler is None else [compiler.command, compiler.path, compiler.version],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def unsafe(folder: Path) -> Unavailable | None:
    """Why code in a folder must not be run: others could have put it there. Raises OSError if that cannot be read."""
    try:
        about = folder.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(about.st_mode):
        return Unavailable(f"the cache {folder} is not a folder", "remove it, or set BRIGADE_CACHE to another place")
    if about.st_uid not in (0, os.geteuid()):  # root can replace anything anyway
        return Unavailable(
            f"the cache {folder} belongs to another user, whose code must not run here",
            "set BRIGADE_CACHE to a folder of your own",
        )
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return Unavailable(
            f"the cache {folder} can be written by other users", f"chmod go-w {shlex.quote(str(folder))}"
        )
    return None


def _entry(folder: Path, key: str) -> Path | None:
    """The whole library of this key in a folder. Raises OSError if it is whole and yet cannot be loaded."""
    for path in sorted(folder.glob(f"{PREFIX}{key}-*.so")):
        if _is_whole(path):
            ctypes.CDLL(str(path))
            return path
    return None


def _is_whole(path: Path) -> bool:
    try:
        return path.stem.rpartition("-")[2] == _digest(path)
    except OSError:  # removed since it was listed, or not readable: not an entry
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _require_writable(folder: Path) -> None:
    """Raises PermissionError if the folder, or the first one above it that exists, cannot be written."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(0, "cannot be written", str(there))


def _cannot_be_used(folder: Path, error: OSError) -> str:
    return f"{folder}: {error.strerror or error}"


def _build_cached(
    plan: Buildable, recipe: Recipe, env: Mapping[str, str], compile_deadline: float, lock_deadline: float
) -> Built | Unavailable:
    """Compile into the cache, or wait for the process that does so. Raises OSError if the folder cannot be used."""
    plan.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if problem := unsafe(plan.folder):
        return problem
    with _locked(plan.folder / f"{PREFIX}{plan.key}.lock", lock_deadline) as (lock, waited):
        entry = _entry(plan.folder, plan.key)
        if entry is not None:
            return Built(entry, "cache", notes=plan.notes)
        if waited and (failure := os.pread(lock, 1 << 16, 0)):
            # The process that we waited for has tried it for us.
            reason, _, advice = failure.decode(errors="replace").partition("\n")
            return Unavailable(reason, advice)
        os.ftruncate(lock, 0)
        _sweep(plan.folder, plan.key)
        result = _build(plan.sources, plan.compiler, plan.key, plan.folder, recipe, env, compile_deadline)
        if isinstance(result, Unavailable):
            os.pwrite(lock, f"{result.reason}\n{result.advice}".encode(), 0)
            return result
        return replace(result, notes=plan.notes)


@contextmanager
def _locked(path: Path, deadline: float) -> Iterator[tuple[int, bool]]:
    """The open lock file, and whether somebody else held it. The kernel lets go of it when its holder dies.

    Raises TimeoutError after `deadline` seconds, OSError where files cannot be written or locked.
    """
    end, waited = time.monotonic() + deadline, False
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = True
            if time.monotonic() >= end:
                raise TimeoutError(0, f"another process has been building for {deadline:g} s", str(path))
            time.sleep(LOCK_POLL)
        yield lock, waited
    finally:
        os.close(lock)


def _sweep(folder: Path, key: str) -> None:
    """Remove damaged entries of a key and what killed processes have left. Only while its lock is held."""
    for path in folder.glob(f"{PREFIX}{key}-*.so"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"{PREFIX}{key}.*.work"):
        shutil.rmtree(path, ignore_errors=True)


def _build(
    sources: Mapping[str, bytes],
    compiler: Compiler,
    key: str,
    folder: Path,
    recipe: Recipe,
    env: Mapping[str, str],
    deadline: float,
) -> Built | Unavailable:
    """Compile and link `sources` and rename the library to its place. Raises OSError if the folder cannot be used."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{key}.", suffix=".work", dir=folder) as name:
        work = Path(name)
        for file, data in sources.items():  # the bytes that the key names, whatever happens to the files meanwhile
            (work / file).write_bytes(data)
        units = [Path(file).stem for file in sources if file.endswith(".cpp")]
        compiles = [(*compiler.command, *recipe.flags, "-c", f"{unit}.cpp", "-o", f"{unit}.o") for unit in units]
        objects = [f"{unit}.o" for unit in units]
        link = (*compiler.command, *recipe.flags, "-shared", *objects, "-o", "library.so", *recipe.link_flags)
        try:
            run_all(compiles, work, {**env, "LC_ALL": "C", "TMPDIR": name}, deadline)
            run_all([link], work, {**env, "LC_ALL": "C", "TMPDIR": name}, start + deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            return Unavailable(
                f"the C++ compiler {compiler.command[0]} did not finish within {deadline:g} s",
                "start again when the machine is less busy, or set CXX to another C++ compiler",
            )
        except subprocess.CalledProcessError as e:
            return Unavailable(
                f"the C++ compiler {compiler.command[0]} failed ({first_error(e.output)})",
                "use g++ 12 or clang++ 14 or newer; CXX can name it",
            )
        library = work / "library.so"
        path = folder / f"{PREFIX}{key}-{_digest(library)}.so"
        os.replace(library, path)
    ctypes.CDLL(str(path))
    return Built(path, "compiled", time.monotonic() - start)


def prebuild(
    folder: Path,
    recipe: Recipe = KERNELS,
    env: Mapping[str, str] = os.environ,
    *,
    compile_deadline: float = COMPILE_DEADLINE,
) -> Built | Unavailable:
    """Build the library that a wheel carries and put it in `folder`. This machine's CPU need not be able to run it.

    Raises OSError if the folder cannot be written.
    """
    compiler = find_compiler(env)
    if isinstance(compiler, Unavailable):
        return compiler
    sources = read_sources(recipe.folder)
    folder.mkdir(parents=True, exist_ok=True)
    return _build(sources, compiler, key_of(sources, recipe), folder.absolute(), recipe, env, compile_deadline)


def main(arguments: Sequence[str]) -> int:
    """`python -m brigade.kernels.cpu.build FOLDER`: prints the library's path; exit code 1 and why if there is none."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m brigade.kernels.cpu.build FOLDER", file=sys.stderr)
        return 2
    try:
        result = prebuild(Path(arguments[0]))
    except OSError as e:
        result = Unavailable(f"{arguments[0]} cannot be written ({e})")
    if isinstance(result, Unavailable):
        print(result, file=sys.stderr)
        return 1
    print(result.path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
