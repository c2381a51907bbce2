"""Worker processes as forks of one that has imported what they need (`engine.template`). Linux only.

The template is started with the first worker and stays, idle, as long as this process lives. It is a copy of this
process's surroundings: when those have changed, another one is started.
"""

import array
import atexit
import ctypes
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

FIRST_DEADLINE = 120.0
"""Seconds for the first answer, which waits for the imports: a cold disk makes them slow."""
ANSWER_DEADLINE = 10.0
"""Seconds for each later one: a template that has imported everything answers in a few hundredths of one."""
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37

_lock = threading.Lock()
_template: "Template | None" = None


class Forked:
    """A child that was forked elsewhere; what Popen is to one that was started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that killed it; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Template:
    """A running template."""

    def __init__(self) -> None:
        """Raises OSError if the system cannot start it."""
        self.surroundings = _surroundings()
        self._answered = False
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    # -P: -m alone would put the current directory first, and a stray module there would be run.
                    [sys.executable, "-P", "-m", "brigade.engine.template", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone
                    env=environment(),
                )
            except BaseException:
                self._sock.close()
                raise

    def fork(self, files: Sequence[int]) -> Forked:
        """A worker that inherits these files under the same numbers; the first is its channel. Its standard output
        and error are those of this process now. Raises OSError: no process can be made, or the template is gone."""
        numbers = array.array("i", [*files, *(fd for fd in (1, 2) if _is_open(fd))])
        with _adopting():
            try:
                pid, error = self._ask(numbers.tobytes())
            except ConnectionError as e:
                raise ConnectionError(
                    "the process that workers are forked from has ended; what it said is above"
                ) from e
        if error:
            raise OSError(error, os.strerror(error))
        return Forked(pid)

    def _ask(self, numbers: bytes) -> tuple[int, int]:
        """Process id and error number. Raises OSError; ConnectionError if the template is gone."""
        self._sock.sendmsg([numbers], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        deadline = ANSWER_DEADLINE if self._answered else FIRST_DEADLINE
        if not select.select([self._sock], [], [], deadline)[0]:
            raise TimeoutError(f"the process that workers are forked from has not answered for {deadline:g} s")
        self._answered = True
        answer = array.array("i", self._sock.recv(64))
        if len(answer) != 2:
            raise ConnectionResetError("no answer")
        return answer[0], answer[1]

    def end(self) -> None:
        self._sock.close()
        self._process.kill()
        self._process.wait()


def fork(files: Sequence[int]) -> Forked:
    """A new worker process (see Template.fork). A template that is gone is started anew, once; one that does not answer
    is ended, so that the next call starts another. Blocks for as long as the imports take, the first time. Raises
    OSError."""
    global _template
    with _lock:
        if _template is not None and _template.surroundings != _surroundings():
            _end()
        if _template is None:
            _template = Template()
            return _first(_template, files)
        try:
            return _template.fork(files)
        except ConnectionError:
            _end()
            _template = Template()
            return _first(_template, files)
        except TimeoutError:  # it has these files by now, and may yet make a worker of them: they are not used again
            _end()
            raise


def environment() -> dict[str, str]:
    """Of a process that computes."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        # OpenMP's default is to spin while waiting: two threads then take turns on a core that anything else also
        # wants, and decoding was measured 30 times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _first(template: Template, files: Sequence[int]) -> Forked:
    """One that cannot make its first worker is of no use."""
    try:
        return template.fork(files)
    except OSError:
        _end()
        raise


@atexit.register  # with this process, so that none outlives it, not even for a moment
def _end() -> None:
    global _template
    template, _template = _template, None
    if template is not None:
        template.end()


def _surroundings() -> list[object]:
    """What a process inherits and can change later."""
    limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    return [environment(), os.sched_getaffinity(0), limits, _folder()]


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return ""


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@contextmanager
def _adopting() -> Iterator[None]:
    """Orphans below this process become its children meanwhile: so a worker does, whose parent ends at once."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this process cannot become the parent of its workers")
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
