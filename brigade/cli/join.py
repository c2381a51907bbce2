"""`brigade join`: this machine runs its ranks of units whose head is elsewhere, until the head ends it."""

import asyncio
import errno
import ipaddress
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brigade.cli.fault import Fault
from brigade.cli.secret import read_secret
from brigade.engine.config import JOIN_PORT

if TYPE_CHECKING:
    from brigade.engine.supervisor import JoinConfig

LOG_LEVELS = ("debug", "info", "warning", "error")


def join(
    head: Annotated[
        str,
        typer.Argument(help="Address of the head, HOST or HOST:PORT (an IPv6 host in brackets), or a deployment file."),
    ],
    address: Annotated[
        str, typer.Option("--address", "--host", help="This machine's address, as the head's layout has it.")
    ],
    secret_file: Annotated[
        str,
        typer.Option(
            help="File with the secret that all hosts share; only its owner may read it. A file as HEAD names its own."
        ),
    ] = "",
    model: Annotated[str, typer.Option(help="This machine's copy of the model. Default: the head's folder.")] = "",
    wait: Annotated[
        float, typer.Option(help="Seconds to call a head that does not answer, also after it was lost; 0: for ever.")
    ] = 600.0,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(LOG_LEVELS)}.")] = "info",
) -> None:
    """Run this machine's ranks, of all units that have some here; the head says which. Ctrl-C ends them."""
    if log_level not in LOG_LEVELS:
        raise Fault(f"--log-level must be one of {', '.join(LOG_LEVELS)}, not {log_level}", 2)
    config = _from_file(Path(head), address, wait) if is_file(head) else None
    if config is not None and (secret_file or model):
        raise Fault(f"{head} says which model and which secret; leave --model and --secret-file out", 2)
    config = config or _from_options(head, address, secret_file, model, wait)
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run(config)


def is_file(head: str) -> bool:
    """Whether the argument names a deployment file."""
    return head.endswith((".yaml", ".yml"))


def _from_file(file: Path, address: str, wait: float) -> "JoinConfig":
    from brigade.cli.launch import read_launch

    return read_launch(file).join(address, wait)


def _from_options(head: str, address: str, secret_file: str, model: str, wait: float) -> "JoinConfig":
    from brigade.engine.supervisor import JoinConfig

    if not secret_file:
        raise Fault("--secret-file is missing: hosts know each other by the secret in it", 2)
    try:
        return JoinConfig(
            head=parse_address(head), address=address, secret=read_secret(secret_file), model=model, wait=wait
        )
    except ValueError as e:
        raise Fault(str(e), 2) from e


def run(config: "JoinConfig") -> None:
    """Supervise until the head ends it or a signal comes. Raises Fault: code 2 if the hosts do not agree."""
    from brigade.engine.supervisor import HeadMissing, HostRefused

    _check_own(config.address)
    try:
        end = asyncio.run(_supervise(config))
    except HostRefused as e:
        raise Fault(str(e), 2) from e
    except HeadMissing as e:
        raise Fault(str(e)) from e
    if end:
        raise Fault(end)


def _check_own(address: str) -> None:
    """Ranks listen on it. The head would lend this machine the place of the right one, and only the head would hear of
    it. Raises Fault; not for a name, which may mean this machine only later, as that of a pod that was moved."""
    from brigade.comm.meeting import listen

    try:
        ipaddress.ip_address(address)
    except ValueError:
        return
    try:
        listen(address).close()
    except OSError as e:
        if e.errno == errno.EADDRNOTAVAIL:
            raise Fault(
                f"{address} is not an address of this machine; give the one that other hosts reach it by", 2
            ) from e


async def _supervise(config: "JoinConfig") -> str:
    """Why the head failed; empty after a good end."""
    from brigade.engine.supervisor import supervise

    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(supervise(config))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        goodbye = await task
    except asyncio.CancelledError:
        return ""
    return goodbye.text if goodbye.failed else ""


def parse_address(text: str) -> tuple[str, int]:
    """HOST, HOST:PORT, [IPv6] or [IPv6]:PORT. Raises Fault."""
    host, port = text, str(JOIN_PORT)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or not port.isdigit() or not 0 < int(port) <= 65535:
        raise Fault(f"'{text}' is no address; write it like 10.0.0.1, 10.0.0.1:{JOIN_PORT} or [fe80::1]", 2)
    return host, int(port)
