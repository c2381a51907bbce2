"""`brigade serve`: starts the engine, then the server. Settings are checked by their own classes, not here.

1. check every setting, so that a mistake shows before anything is loaded
2. load the model with a progress bar; a model that cannot be loaded ends here, before any port opens
3. serve until Ctrl-C or SIGTERM: the server lets running requests finish, then the engine ends, whatever happened
"""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from brigade.cli.fault import Fault, one_line
from brigade.cli.machine import disk_problem, port_problem
from brigade.cli.secret import read_secret
from brigade.cli.units import parse_disk, parse_size
from brigade.engine.config import DEMO_MODEL, JOIN_PORT, Dtype, EngineConfig, HostsConfig, Weights, Wire
from brigade.engine.fleet_config import FleetConfig
from brigade.serve.config import ConfigError, ServeConfig
from brigade.spec.layout import Host, Layout, cut_off

if TYPE_CHECKING:
    from brigade.engine.messages import Loading

DEMO_NAME = "brigade-demo"
LOG_LEVELS = ("debug", "info", "warning", "error")
_ENGINE = EngineConfig()
_SERVE = ServeConfig(served_name=DEMO_NAME)


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Folder with a Hugging Face checkpoint. Default: the bundled demo model.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs a key.")] = _SERVE.host,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = _SERVE.port,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="BRIGADE_API_KEY",
            help="Key that clients must give. Prefer the variable: other users can see command lines.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Model name for clients. Default: the folder's name.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = _ENGINE.dtype,
    weights: Annotated[
        str,
        typer.Option(
            help="auto, bf16, or quantised while loading: int8, or int4 (experts; attention and head are then int8)."
        ),
    ] = _ENGINE.weights,
    max_context: Annotated[
        int, typer.Option(help="Positions a request may have; 0: the model's, or what fits into the cache.")
    ] = _ENGINE.max_context,
    kv_memory: Annotated[
        str, typer.Option(help="Memory of the KV cache, like 512MiB or 2GiB. Default: a quarter of what is free.")
    ] = "auto",
    kv_disk: Annotated[
        str,
        typer.Option(
            help="Keep prompts' KV caches in this folder and find them there after a restart, like /mnt/nvme:200GiB."
        ),
    ] = "",
    max_running: Annotated[int, typer.Option(help="Requests that run in one step.")] = _ENGINE.max_running,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait before new ones get 429.")
    ] = _ENGINE.max_waiting,
    max_step_tokens: Annotated[
        int, typer.Option(help="Tokens a step may compute: the size of a prefill chunk.")
    ] = _ENGINE.max_step_tokens,
    drafts: Annotated[
        int,
        typer.Option(help="Tokens that the model's multi-token-prediction layer guesses in each step: 0 or 1."),
    ] = _ENGINE.drafts,
    depth: Annotated[int, typer.Option(help="Steps in flight; 2 plans one while another runs.")] = _ENGINE.depth,
    ranks: Annotated[
        int, typer.Option(help="Worker processes: experts are spread over them, attention is data-parallel.")
    ] = _ENGINE.ranks,
    redundant_experts: Annotated[
        int, typer.Option(help="Further copies of routed experts in each layer, over all ranks, for the busiest ones.")
    ] = _ENGINE.redundant_experts,
    rebalance: Annotated[
        float,
        typer.Option(help="Seconds between two looks at the experts' loads, to even them over the ranks; 0: never."),
    ] = _ENGINE.rebalance,
    wire: Annotated[
        str, typer.Option(help="How rows travel to experts: auto (exactly), or rounded to bf16, int8 or fp8.")
    ] = _ENGINE.wire,
    micro_batches: Annotated[
        int, typer.Option(help="1, or 2 to exchange rows of one half of a step while the other computes; 0: chosen.")
    ] = _ENGINE.micro_batches,
    threads: Annotated[
        int, typer.Option(help="CPU threads of a rank; 0: all cores, shared by the ranks.")
    ] = _ENGINE.threads,
    hosts: Annotated[
        str,
        typer.Option(
            help="Ranks by host, this machine first, like 10.0.0.1=4,10.0.0.2=4; the others run `brigade join`."
        ),
    ] = "",
    secret_file: Annotated[
        str, typer.Option(help="With --hosts: file with the secret that all hosts share; only its owner may read it.")
    ] = "",
    join_port: Annotated[int, typer.Option(help="With --hosts: the port that the other hosts call.")] = JOIN_PORT,
    rank_deadline: Annotated[
        float, typer.Option(help="Seconds a rank waits for the others before one that is missing is replaced.")
    ] = _ENGINE.rank_deadline,
    step_deadline: Annotated[
        float, typer.Option(help="Seconds without progress after which the worker is replaced.")
    ] = _ENGINE.step_deadline,
    drain_seconds: Annotated[
        float, typer.Option(help="Seconds that running requests may go on after Ctrl-C.")
    ] = _SERVE.drain_seconds,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(LOG_LEVELS)}.")] = "info",
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
) -> None:
    """Serve a model with OpenAI's API. Ctrl-C lets running requests finish, then ends."""
    check_log_level(log_level)
    several = parse_hosts(hosts, secret_file, join_port) if hosts else None
    if several is None and (secret_file or join_port != JOIN_PORT):
        raise Fault("--secret-file and --join-port are for several hosts; name them with --hosts", 2)
    if several and ranks not in (_ENGINE.ranks, several.layouts[0].n_ranks):
        raise Fault(f"--ranks is {ranks}, but --hosts names {several.layouts[0].n_ranks} in all; leave --ranks out", 2)
    if several and join_port == port != 0 and host in (several.here, "0.0.0.0", "::"):
        raise Fault(f"--join-port {join_port} is that of --port; give another one", 2)
    try:
        disk, disk_bytes = parse_disk(kv_disk) if kv_disk else ("", 0)
        engine = EngineConfig(
            model=model or str(DEMO_MODEL),
            dtype=cast(Dtype, dtype),  # EngineConfig checks it
            weights=cast(Weights, weights),
            max_context=max_context,
            kv_bytes=_kv_bytes(kv_memory),
            kv_disk=disk,
            kv_disk_bytes=disk_bytes,
            max_running=max_running,
            max_waiting=max_waiting,
            max_step_tokens=max_step_tokens,
            drafts=drafts,
            depth=depth,
            redundant_experts=redundant_experts,
            rebalance=rebalance,
            ranks=several.layouts[0].n_ranks if several else ranks,
            wire=cast(Wire, wire),
            micro_batches=micro_batches,
            threads=threads,
            rank_deadline=rank_deadline,
            step_deadline=step_deadline,
        )
        web = ServeConfig(
            host=host,
            port=port,
            api_key=api_key,
            served_name=served_name(model) if name is None else name,
            drain_seconds=drain_seconds,
        )
        web.check()
    except ValueError as e:
        raise Fault(str(e), 2) from e
    if problem := disk_problem(engine.kv_disk):
        raise Fault(f"--kv-disk: {problem}", 2)
    start(FleetConfig.alone(engine), web, log_level, several, until_eof)


def check_log_level(log_level: str) -> None:
    if log_level not in LOG_LEVELS:
        raise Fault(f"--log-level must be one of {', '.join(LOG_LEVELS)}, not {log_level}", 2)


def start(
    fleet: FleetConfig,
    web: ServeConfig,
    log_level: str,
    hosts: HostsConfig | None = None,
    until_eof: bool = False,
) -> None:
    """Serve until a signal ends it, if the port is free. `web` has passed its check. Raises Fault."""
    # The server says the same when it binds, but only after a model has been loaded for nothing.
    if problem := port_problem(web.addresses()[0], web.port):
        raise Fault(
            f"cannot listen on {web.host} port {web.port} ({problem}); stop what uses it, or choose another port"
        )
    if web.admin and (problem := port_problem(web.admin.host, web.admin.port)):
        raise Fault(f"admin_listen: cannot listen on {web.admin.host} port {web.admin.port} ({problem})")
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if until_eof:
        threading.Thread(target=_interrupt_at_eof, daemon=True).start()
    run(fleet, web, log_level, hosts)


def parse_hosts(hosts: str, secret_file: str, port: int) -> HostsConfig:
    """What --hosts, --secret-file and --join-port say together. Raises Fault."""
    if not secret_file:
        raise Fault("--hosts needs --secret-file: hosts know each other by the secret in it", 2)
    named = [entry.rpartition("=") for entry in hosts.split(",")]
    if not all(address.strip() and n.isdigit() for address, _, n in named):
        raise Fault(f"--hosts: '{hosts}' must be like 10.0.0.1=4,10.0.0.2=4", 2)
    try:
        layout = Layout(tuple(Host(address.strip(), int(n)) for address, _, n in named))
        several = HostsConfig(layouts=(layout,), secret=read_secret(secret_file), port=port)
    except ValueError as e:
        raise Fault(f"--hosts: {e}", 2) from e
    for address in several.others:
        if why := cut_off(several.here, address):
            raise Fault(f"--hosts: {why}", 2)
    return several


def _kv_bytes(kv_memory: str) -> int:
    """EngineConfig's number, where 0 means "choose": a size of nothing must not come to mean that."""
    if kv_memory == "auto":
        return 0
    if (size := parse_size(kv_memory)) == 0:
        raise ValueError(f"--kv-memory {kv_memory} leaves no room for any request; write auto, or a size like 512MiB")
    return size


def served_name(model: str | None) -> str:
    """The name clients use for a model folder."""
    if model is None or Path(model).resolve() == DEMO_MODEL.resolve():
        return DEMO_NAME
    return Path(model).resolve().name


def run(config: FleetConfig, web: ServeConfig, log_level: str, hosts: HostsConfig | None = None) -> None:
    """Load a model and serve it until a signal comes; over several hosts, wait for them first. Raises Fault."""
    import uvloop

    from brigade.engine.output import LoadError
    from brigade.serve.server import PortInUse

    heard: list[int] = []
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_load_and_serve(config, web, log_level, heard, hosts))
    except (LoadError, ConfigError) as e:  # ConfigError: the checkpoint's chat template or defaults
        raise Fault(str(e), 2) from e
    except PortInUse as e:
        raise Fault(str(e)) from e
    except asyncio.CancelledError:
        raise typer.Exit(128 + heard[0]) from None  # while loading: the server ends by itself


async def _load_and_serve(
    config: FleetConfig, web: ServeConfig, log_level: str, heard: list[int], hosts: HostsConfig | None
) -> None:
    from brigade.engine.fleet import Fleet
    from brigade.serve.metrics import Metrics
    from brigade.serve.server import serve as serve_http
    from brigade.serve.server import spare_collector

    def announce(url: str) -> None:
        sys.stdout.write(f"Brigade is ready at {url}\n")
        sys.stdout.flush()
        if sys.stdout.isatty() and sys.stderr.isatty():
            typer.echo(hint(url, web), err=True)

    metrics = Metrics()
    _cancel_at_signals(heard)
    with _loading(config.model) as progress:
        engine = await Fleet.start(config, progress=progress, observer=metrics, hosts=hosts)
    try:
        if log_level in ("debug", "info"):
            for note in engine.ready.notes:
                typer.echo(f"brigade: {one_line(note)}", err=True)
        spare_collector()
        await serve_http(engine, web, metrics, announce)
    finally:
        await engine.close()


def _cancel_at_signals(heard: list[int]) -> None:
    """SIGINT and SIGTERM cancel the current task, so that a half-started engine is closed, and are noted in `heard`.

    The server replaces these handlers by its own. Python's own one for SIGINT would not do: it is absent where a shell
    started this program in the background.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def cancel(number: int) -> None:
        heard.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, cancel, number)


@contextmanager
def _loading(model: str) -> Iterator[Callable[["Loading"], None]]:
    """Shows bytes, rate and time left on a terminal, one line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        typer.echo(f"brigade: loading {one_line(model)}", err=True)
        yield lambda _: None
        return
    columns = (
        TextColumn(f"loading {one_line(Path(model).name)}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task: Any = progress.add_task("loading", total=None)
        yield lambda m: progress.update(task, completed=m.done, total=m.total)


def hint(url: str, web: ServeConfig) -> str:
    """A command that tries the server, to copy from the terminal. The key itself is not shown."""
    key = ' -H "Authorization: Bearer $BRIGADE_API_KEY"' if web.api_key else ""
    body = json.dumps({"model": web.served_name, "messages": [{"role": "user", "content": "Once upon a time"}]})
    return (
        f"Try it:  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'\n"
        f"or:      brigade chat --url {url}        (Ctrl-C ends the server)"
    )


def _interrupt_at_eof() -> None:
    """End as by Ctrl-C when standard input closes: the program that started this server is gone."""
    # os.read, since a thread inside sys.stdin would hold its lock when the interpreter ends.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGINT)
