"""The machine's C++ compiler: which it is, and running it. Must not know what is compiled or where the result goes."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
VERSION_DEADLINE = 20.0
_ERROR = re.compile(r"\b(error|undefined reference)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Compiler:
    command: tuple[str, ...]
    """As it is called: its own path, and what $CXX says after it."""
    path: str
    """Without symbolic links: another compiler behind the same name is another compiler."""
    version: str
    """First line of what it says about itself."""

    @property
    def name(self) -> str:
        """Short, for people: "g++ 12.2.0"."""
        number = re.search(r"\d+(\.\d+)+", re.sub(r"\([^)]*\)", "", self.version))
        return f"{Path(self.command[0]).name} {number[0]}" if number else Path(self.command[0]).name


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why there is no library, and what to do about it; no advice: nothing can be done on this machine."""

    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; {self.advice}" if self.advice else self.reason


def find_compiler(env: Mapping[str, str] = os.environ) -> Compiler | Unavailable:
    """$CXX, or the first of COMPILERS on the path; it is run once, to ask for its version. Raises nothing."""
    named = env.get("CXX", "")
    try:
        words = shlex.split(named)
    except ValueError as e:
        return Unavailable(f"CXX={named!r} is not understood ({e})", "set CXX to a C++ compiler, or unset it")
    names = words[:1] or list(COMPILERS)
    found = next((p for name in names if (p := shutil.which(name, path=env.get("PATH")))), None)
    if found is None and words:
        return Unavailable(f"CXX names {words[0]}, which is not there", "set CXX to a C++ compiler, or unset it")
    if found is None:
        return Unavailable(
            "there is no C++ compiler", "install g++ (12 or newer) or clang++ for the faster CPU kernels"
        )
    command = (os.path.abspath(found), *words[1:])
    advice = "reinstall it, or set CXX to another C++ compiler"
    try:
        (said,) = run_all([(*command, "--version")], None, env, VERSION_DEADLINE)
    except subprocess.TimeoutExpired:
        return Unavailable(f"{command[0]}: no answer within {VERSION_DEADLINE:.0f} s", advice)
    except subprocess.CalledProcessError as e:
        return Unavailable(f"{command[0]}: exit status {e.returncode} ({first_error(e.output)})", advice)
    except OSError as e:
        return Unavailable(f"{command[0]}: {e.strerror}", advice)
    return Compiler(command, os.path.realpath(command[0]), next(iter(said.splitlines()), "says no version"))


def run_all(commands: Iterable[Sequence[str]], cwd: Path | None, env: Mapping[str, str], deadline: float) -> list[str]:
    """Run commands, one a core at a time, and return what each has written; they all end with this call.

    Raises CalledProcessError for the first that fails, TimeoutExpired after `deadline` seconds, and OSError.
    """
    end = time.monotonic() + deadline
    todo, running = deque(commands), deque[subprocess.Popen[str]]()
    said = []
    try:
        while todo or running:
            while todo and len(running) < (os.cpu_count() or 1):
                running.append(_start(todo.popleft(), cwd, env))
            output, _ = running[0].communicate(timeout=max(0.0, end - time.monotonic()))
            done = running.popleft()
            if done.returncode:
                raise subprocess.CalledProcessError(done.returncode, done.args, output)
            said.append(output)
        return said
    finally:
        for process in running:
            _kill(process)


def _start(command: Sequence[str], cwd: Path | None, env: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # so that one signal reaches all that the compiler has started
    )


def _kill(process: subprocess.Popen[str]) -> None:
    if process.returncode is None:  # not waited for, so its number cannot be another process's by now
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def first_error(output: str) -> str:
    """The line that says most about why a compiler failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    line = next((line for line in lines if _ERROR.search(line)), next(iter(lines), "it says nothing"))
    return line[:300]
