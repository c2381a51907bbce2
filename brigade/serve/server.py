"""The server's life: bind, announce, serve, drain, exit. Makes no engine and closes none.

1. The port is bound, so that a taken one is an error before anything else happens.
2. The address is announced once connections are accepted.
3. First SIGINT or SIGTERM: the engine takes nothing new (503), /ready says so, running requests go on; the port stays
   open, so that load balancers learn it from answers and not from refused connections.
4. When nothing runs any more, or after drain_seconds, the rest is ended with an error, and the server exits.
5. A second signal ends everything at once.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from brigade.serve.admin import AdminApp
from brigade.serve.app import make_app
from brigade.serve.config import AdminConfig, Limits, ServeConfig, resolve
from brigade.serve.life import Life
from brigade.serve.metrics import Metrics
from brigade.serve.protocol import bounded

if TYPE_CHECKING:
    from brigade.engine.fleet import Fleet

log = logging.getLogger("brigade.serve")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class PortInUse(OSError):
    """The address cannot be listened on. The message says which and what to do."""


def bind(config: ServeConfig | AdminConfig) -> socket.socket:
    """A listening socket. Raises ConfigError for an unsafe host, PortInUse if the port is not to be had."""
    address = (config.addresses() if isinstance(config, ServeConfig) else resolve(config.host))[0]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Lets a restarted server take its port back while old connections linger; another listener still blocks it.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, config.port))
        # Only listening makes the port ours: sockets that merely bind it may share it.
        sock.listen(2048)
    except OSError as e:
        sock.close()
        another = "choose another with --port, or take any free one with --port 0"
        if isinstance(config, AdminConfig):
            another = "or choose another with 'admin_listen'"
        raise PortInUse(
            f"cannot listen on {config.host} port {config.port} ({e.strerror}); stop what uses it, {another}"
        ) from e
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket) -> str:
    """The address people can open, with the real port. An unspecified host is named as this machine."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Quiet(uvicorn.Server):
    """uvicorn's server without its handlers of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: whoever started it ends it."""
        yield


class Server(Quiet):
    """The clients' server with our own end: `stop` is called by the handlers that `serve` installs."""

    def __init__(
        self,
        uvicorn_config: uvicorn.Config,
        engine: "Fleet",
        life: Life,
        drain_seconds: float,
        on_up: Callable[[], None],
    ) -> None:
        super().__init__(uvicorn_config)
        self._engine, self._life, self._drain_seconds, self._on_up = engine, life, drain_seconds, on_up
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, then announce it."""
        await super().startup(sockets)
        self._on_up()

    def stop(self) -> None:
        """End the server: the first call drains, the second one exits at once. Call it on the event loop."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
            return
        self._life.close()
        self.should_exit = self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def _drain(self) -> None:
        self._life.draining = True
        self._engine.drain()
        if not await self._engine.idle(self._drain_seconds):
            self._life.close()
        self.should_exit = True


def spare_collector() -> None:
    """Have the garbage collector leave alone what there is now, which stays: each look at all of it would stop all
    streams for tens of milliseconds. It also looks at new objects less often: a request makes hundreds, and hardly any
    of them in cycles. For a process that only serves."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


async def serve(engine: "Fleet", config: ServeConfig, metrics: Metrics, announce: Callable[[str], None]) -> None:
    """Serve until a signal ends it; `announce` is called once with the address, when it answers.

    Raises ConfigError and PortInUse before anything is announced. The caller closes the engine.
    """
    life = Life()
    app = make_app(engine, config, metrics, life)
    sock = bind(config)
    address = url_of(sock)
    uvicorn_config = _uvicorn_config(app, config.limits)
    server = Server(uvicorn_config, engine, life, config.drain_seconds, on_up=lambda: announce(address))
    try:
        async with _taking_orders(engine, config):
            with _stopped_by_signals(server):
                await server.serve([sock])
    finally:
        sock.close()


@contextlib.asynccontextmanager
async def _taking_orders(engine: "Fleet", config: ServeConfig) -> AsyncIterator[None]:
    """The admin address, if there is one, is open meanwhile. Raises PortInUse."""
    if config.admin is None:
        yield
        return
    sock = bind(config.admin)
    server = Quiet(_uvicorn_config(AdminApp(engine.crew, config.admin), config.limits))
    serving = asyncio.create_task(server.serve([sock]))
    log.info("orders to units are taken at %s", url_of(sock))
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await serving
        sock.close()


def _uvicorn_config(app: ASGIApp, limits: Limits) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=2048,
        timeout_keep_alive=max(1, int(limits.head_seconds)),
        timeout_graceful_shutdown=max(1, int(limits.exit_seconds)),
    )


@contextlib.contextmanager
def _stopped_by_signals(server: Server) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, server.stop)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
