"""The process that workers are forked from: everything that a worker needs is imported here, once, and nothing is run.

`python -m brigade.engine.template FD` answers on an inherited socket. A request is one packet: the numbers under which
the worker is to have the files that come with it, its channel first. The answer is the worker's process id, or an
error number. Importing torch takes over a second of one core; a fork takes a few hundredths, and shares the memory of
what was imported.

The worker is a grandchild whose parent ends at once, so that it becomes a child of whoever asked (`engine.forks`).
"""

import array
import ctypes
import fcntl
import gc
import os
import socket
import struct
import sys
import time
import warnings
from collections.abc import Sequence

from brigade.engine import loop

MOST_FILES = 250
"""That one packet can carry (SCM_MAX_FD is 253)."""
ANSWER = struct.Struct("ii")
"""Process id, error number; one of them is 0."""
_PR_SET_NAME = 15


def serve(asker: socket.socket) -> int | None:
    """Answer requests until the other side is gone: None. In each worker this returns, too: the number of its channel.
    Never from two threads: a fork copies only the one that makes it."""
    while True:
        packet, ancillary, _, _ = asker.recvmsg(4 * MOST_FILES, socket.CMSG_SPACE(4 * MOST_FILES))
        if not packet:
            return None
        files = array.array("i")
        for _level, _kind, data in ancillary:
            files.frombytes(data[: len(data) - len(data) % files.itemsize])
        numbers = array.array("i", packet)
        answer = _fork()
        if answer is None:
            asker.close()
            _place(files, numbers)
            return numbers[0]
        for file in files:
            os.close(file)
        asker.send(ANSWER.pack(*answer))


def _fork() -> tuple[int, int] | None:
    """Process id and error number for the answer; None: this is the worker."""
    ear, mouth = os.pipe()
    try:
        between = os.fork()
    except OSError as e:
        os.close(ear)
        os.close(mouth)
        return 0, e.errno or 1
    if between:
        os.close(mouth)
        with open(ear, "rb") as f:
            told = f.read(ANSWER.size)
        os.waitpid(between, 0)
        pid, error = ANSWER.unpack(told) if len(told) == ANSWER.size else (0, 1)
        return pid, error
    os.close(ear)
    between = os.getpid()
    os.setsid()  # Ctrl-C in a terminal reaches the parent alone; the worker ends when its channel closes
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"brigade-rank", 0, 0, 0)
    try:
        pid, error = os.fork(), 0
    except OSError as e:
        pid, error = 0, e.errno or 1
    if pid or error:
        os.write(mouth, ANSWER.pack(pid, error))
        os._exit(0)
    os.close(mouth)
    while os.getppid() == between:  # so that nobody ever sees a worker below another parent
        time.sleep(0.001)
    return None


def _place(files: Sequence[int], numbers: Sequence[int]) -> None:
    """Give each file its number. None of them may be in the way of another."""
    above = max((*numbers, *files)) + 1
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def main(fd: int) -> int:
    """Exit code of the template, or of a worker."""
    gc.freeze()  # what is shared stays shared: no worker's collector writes into it
    # numpy's OpenBLAS has a thread, ends it before a fork by itself, and starts it again when it is needed.
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    channel = serve(socket.socket(fileno=fd))
    if channel is None:
        return 0
    return loop.main(channel)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
