"""The HTTP application: lets requests in, finds their route, sends what its handler gives. Opens no socket."""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from brigade.engine.output import EngineError
from brigade.serve.chat_template import load_template
from brigade.serve.config import ServeConfig
from brigade.serve.door import Door
from brigade.serve.errors import ApiError, ClientGone, api_error, error_response
from brigade.serve.life import Life
from brigade.serve.metrics import Metrics
from brigade.serve.openapi import document
from brigade.serve.routes import Routes
from brigade.serve.sampling import Sampling, defaults_of

if TYPE_CHECKING:
    from brigade.engine.fleet import Fleet

Handler = Callable[[Request], Awaitable[ASGIApp]]
"""Gives what sends the response; either may raise ApiError, EngineError or ClientGone before anything is sent."""
MODELS = "/v1/models/"
"""The rest of a path that begins so is a model's name, slashes included."""


class App:
    """An ASGI application with a table of routes. Every failed answer is an OpenAI error.

    Not a framework's, because each layer that a framework puts around a handler is gone through again by every event of
    every stream.
    """

    def __init__(self, config: ServeConfig, table: Mapping[str, Mapping[str, Handler]]) -> None:
        """`table`: path -> method -> handler; the path "/v1/models/{model}" stands for all below it."""
        self.table = {**table, "/openapi.json": {"GET": self._describe}}
        self._config, self._door = config, Door(config)
        self._description: bytes | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            raise ValueError(f"this server speaks HTTP only, not {scope['type']}")
        response: ASGIApp | None = None
        try:
            self._door.check(scope)
            response = await self._handler(scope["path"], scope["method"])(Request(scope, receive))
            await response(scope, receive, send)
        except ClientGone:
            await Response(status_code=499)(scope, receive, send)  # nobody reads this; 499 is what nginx calls it
        except ApiError as e:
            await error_response(e)(scope, receive, send)
        except EngineError as e:
            await error_response(api_error(e))(scope, receive, send)
        except Exception:
            # The exception goes on to the server's log; clients learn no more than that it is not their fault.
            if response is None:
                failed = ApiError(500, "the server failed on this request; its log says why")
                await error_response(failed)(scope, receive, send)
            raise

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        return document(self._config)

    def _handler(self, path: str, method: str) -> Handler:
        methods = self.table.get(MODELS + "{model}" if path.startswith(MODELS) else path)
        if methods is None:
            raise ApiError(404, f"there is nothing at {path}; the API is under /v1 (see /openapi.json)")
        if method not in methods:
            raise ApiError(405, f"{path} does not take {method} requests", headers={"Allow": ", ".join(methods)})
        return methods[method]

    async def _describe(self, _: Request) -> Response:
        """GET /openapi.json, made when first asked for."""
        self._description = self._description or msgspec.json.encode(self.openapi())
        return Response(self._description, media_type="application/json")


def make_app(engine: "Fleet", config: ServeConfig, metrics: Metrics, life: Life | None = None) -> App:
    """The application over a started engine. Raises ConfigError for bad settings and for a checkpoint whose chat
    template or generation defaults cannot be used."""
    config.check()
    folder = Path(engine.config.model)
    defaults = defaults_of(engine.generation, str(folder / "generation_config.json"))
    template = load_template(folder, engine.tokenizer, engine.ready.max_context)
    sampling = Sampling(defaults, engine.spec.vocab)
    metrics.watch(engine)
    routes = Routes(engine, config, metrics, life or Life(), sampling, template)
    return App(
        config,
        {
            "/v1/chat/completions": {"POST": routes.chat},
            "/v1/completions": {"POST": routes.completion},
            "/v1/models": {"GET": routes.models},
            MODELS + "{model}": {"GET": routes.model},
            "/health": {"GET": routes.health},
            "/ready": {"GET": routes.ready},
            "/metrics": {"GET": routes.metrics},
            "/debug/experts": {"GET": routes.experts},
            "/debug/units": {"GET": routes.units},
            "/debug/trace": {"POST": routes.trace},
        },
    )
