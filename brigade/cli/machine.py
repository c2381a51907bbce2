"""What a measurement and a start need to know of this machine, beyond what engine reads."""

import os
import platform
import socket
from typing import Any

from brigade.engine.machine import read_cpu, read_limits, usable_cores


def port_problem(host: str, port: int) -> str | None:
    """Why nothing can listen at an IP address and port, or None. Binds for a moment and never listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections do not keep a port taken
            probe.bind((host, port))
    except OSError as e:
        return os.strerror(e.errno) if e.errno else str(e)
    return None


def disk_problem(folder: str) -> str | None:
    """Why KV caches cannot be kept under a folder of this machine, or None; also for none at all."""
    if folder and not os.path.isdir(folder):
        return f"{folder} is not a folder; make it, or mount what belongs there"
    if folder and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return f"this user may not write in {folder}"
    return None


def describe() -> dict[str, Any]:
    """The machine in a few plain values, to stand beside measurements."""
    limits = read_limits()
    return {
        "cpu": read_cpu().model,
        "cores": usable_cores(),
        "core_quota": limits.cores,
        "load_average": list(os.getloadavg()),
        "system": f"{platform.system()} {platform.machine()}",
    }
