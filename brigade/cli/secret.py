"""Reads the secret that the hosts of a unit share: from a file that its owner alone can read, and from nowhere else."""

import os
import stat
from pathlib import Path

from brigade.cli.fault import Fault

MIN_BYTES = 16
MAX_BYTES = 4096
HOW = "make one with:  (umask 077; head -c 32 /dev/urandom | base64 > FILE)  and copy it to every host"


def read_secret(path: str) -> bytes:
    """The file's bytes without the last line's end. Raises Fault for a file that others can read, or that is no secret.

    A command line or an environment shows in the process list; a file does not.
    """
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise Fault(f"{path}: is not a regular file; {HOW}", 2)
            if mode & 0o077:
                raise Fault(
                    f"{path}: others than its owner may use it (mode {stat.S_IMODE(mode):03o}); run: chmod 600 {path}",
                    2,
                )
            secret = file.read(MAX_BYTES + 1).rstrip(b"\r\n")
    except OSError as e:
        raise Fault(f"{path}: the secret cannot be read ({e.strerror}); {HOW}", 2) from e
    if not MIN_BYTES <= len(secret) <= MAX_BYTES:
        raise Fault(f"{path}: a secret has {MIN_BYTES} to {MAX_BYTES} bytes, not {len(secret)}; {HOW}", 2)
    return secret
