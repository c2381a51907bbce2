"""Hosts as network namespaces: each has its own loopback and one cable to a switch, which tests cut and heal.

Nothing of this machine's own network is touched, and nothing outside can be reached. Needs root and iproute2.
"""

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

_PREFIX = "brgd"
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


def why_not() -> str:
    """Why namespaces cannot be made here; empty if they can."""
    if shutil.which("ip") is None:
        return "there is no `ip` command; install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"{_PREFIX}{os.getpid()}probe"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "a0", "type", "veth", "peer", "name", "a1")
    except subprocess.CalledProcessError as e:
        return f"network namespaces cannot be made here: {e.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=20)
    return ""


class Network:
    """Hosts 0 to n - 1 on one switch, with addresses 10.77.0.1 and up. Made by `network`."""

    def __init__(self, n: int) -> None:
        self.addresses = [f"10.77.0.{i + 1}" for i in range(n)]
        own = f"{_PREFIX}{os.getpid()}x{next(_numbers)}x"
        self._switch, self._names = f"{own}s", [f"{own}{i}" for i in range(n)]
        self._threads: dict[int, ThreadPoolExecutor] = {}

    def make(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for i, name in enumerate(self._names):
            _ip("netns", "add", name)
            cable = ("link", "add", "eth0", "type", "veth", "peer", "name", f"p{i}", "netns", self._switch)
            _ip("-n", name, *cable)
            _ip("-n", name, "addr", "add", f"{self.addresses[i]}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", name, "link", "set", link, "up")
            self._port(i, "master", "br0")
            self._port(i, "up")

    def close(self) -> None:
        """End whatever runs in the namespaces and remove them."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        for name in (*self._names, self._switch):
            _remove(name)

    def command(self, host: int, *command: str) -> list[str]:
        """A command line that runs on a host."""
        return ["ip", "netns", "exec", self._names[host], *command]

    def on(self, host: int, call: Callable[..., T], *arguments: Any) -> T:
        """Call a function in a thread whose sockets are those of a host."""
        if host not in self._threads:
            name = self._names[host]
            self._threads[host] = ThreadPoolExecutor(8, initializer=_enter, initargs=(name,))
        return self._threads[host].submit(call, *arguments).result(120)

    def cut(self, host: int) -> None:
        """The switch's port goes down: the host's cable has no carrier."""
        self._port(host, "down")

    def heal(self, host: int) -> None:
        self._port(host, "master", "br0")
        self._port(host, "up")

    def black_hole(self, host: int) -> None:
        """The carrier stays, and packets vanish: a dead switch."""
        self._port(host, "nomaster")

    def part(self, one: int, other: int) -> None:
        """Packets from one host to another vanish; both still reach the rest."""
        _ip("-n", self._names[one], "route", "add", "blackhole", f"{self.addresses[other]}/32")

    def join(self, one: int, other: int) -> None:
        _ip("-n", self._names[one], "route", "del", "blackhole", f"{self.addresses[other]}/32")

    def _port(self, host: int, *what: str) -> None:
        _ip("-n", self._switch, "link", "set", f"p{host}", *what)


@contextmanager
def network(n: int) -> Iterator[Network]:
    """`n` hosts for as long as the context lasts, whatever happens in it."""
    _remove_left_behind()
    made = Network(n)
    try:
        made.make()
        yield made
    finally:
        made.close()


def _enter(name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")
    finally:
        os.close(fd)


def _remove(name: str) -> None:
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False, timeout=20)
    for pid in map(int, pids.stdout.split()):
        if pid != os.getpid():  # a thread of ours may be in there
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=20)


def _remove_left_behind() -> None:
    """Namespaces of test runs that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False, timeout=20).stdout
    for line in listed.splitlines():
        name = line.split()[0]
        pid = name.removeprefix(_PREFIX).partition("x")[0]
        if name.startswith(_PREFIX) and pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=20)
