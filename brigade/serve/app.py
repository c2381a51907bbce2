"""Puts the HTTP application together: routes, door, errors, description. Opens no socket."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from brigade.serve import errors
from brigade.serve.answer import Life
from brigade.serve.chat_template import load_template
from brigade.serve.config import ServeConfig
from brigade.serve.door import Door
from brigade.serve.metrics import Metrics
from brigade.serve.openapi import document
from brigade.serve.routes import Routes
from brigade.serve.sampling import Sampling, defaults_of

if TYPE_CHECKING:
    from brigade.engine.fleet import Fleet


class App(FastAPI):
    """FastAPI with our own description of the API."""

    def __init__(self, config: ServeConfig) -> None:
        # No /docs pages: they would load scripts from elsewhere.
        super().__init__(docs_url=None, redoc_url=None, redirect_slashes=False)
        self._config = config

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, made when first asked for."""
        if self.openapi_schema is None:
            self.openapi_schema = document(self._config)
        return self.openapi_schema


def make_app(engine: "Fleet", config: ServeConfig, metrics: Metrics, life: Life | None = None) -> FastAPI:
    """The application over a started engine. Raises ConfigError for bad settings and for a checkpoint whose chat
    template or generation defaults cannot be used."""
    config.check()
    folder = Path(engine.config.model)
    defaults = defaults_of(engine.generation, str(folder / "generation_config.json"))
    template = load_template(folder, engine.tokenizer, engine.ready.max_context)
    sampling = Sampling(defaults, engine.spec.vocab)
    metrics.watch(engine)
    app = App(config)
    routes = Routes(engine, config, metrics, life or Life(), sampling, template)
    for path, method, handler in (
        ("/v1/chat/completions", "POST", routes.chat),
        ("/v1/completions", "POST", routes.completion),
        ("/v1/models", "GET", routes.models),
        ("/v1/models/{model:path}", "GET", routes.model),
        ("/health", "GET", routes.health),
        ("/ready", "GET", routes.ready),
        ("/metrics", "GET", routes.metrics),
        ("/debug/experts", "GET", routes.experts),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    errors.install(app)
    app.add_middleware(Door, config=config)
    return app
