"""The /openapi.json document: every route, what it takes and everything it may answer. Describes, never handles.

Made from the types of requests and replies, and from this table of what each route may answer.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from brigade.engine.loads import Experts
from brigade.serve.config import ServeConfig
from brigade.serve.replies import ChatChunk, ChatCompletion, Completion, ErrorReply, Model, ModelList, Status
from brigade.serve.schema import ChatRequest, CompletionRequest
from brigade.serve.tracer import Recording, TraceRequest
from brigade.serve.units import ServerReport

_REF = "#/components/schemas/"
_SAID = {
    400: "The request cannot be served: a wrong value, an unsupported field, a prompt longer than the context.",
    401: "Missing or wrong API key.",
    403: "The Host header does not name this machine.",
    404: "No such model, or a model without routed experts.",
    408: "The body took too long to arrive.",
    409: "Another recording runs.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The queue is full.",
    500: "The server failed on this request.",
    503: "Not ready, restarting or shutting down.",
}
_POST_ERRORS = (400, 404, 408, 413, 415, 429, 500, 503)


def document(config: ServeConfig) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server with these settings."""
    paths = {
        "/v1/chat/completions": {
            "post": _post(config, "Answer a chat", ChatRequest, _streamed("ChatCompletion", "ChatChunk"))
        },
        "/v1/completions": {
            "post": _post(config, "Continue a text", CompletionRequest, _streamed("Completion", "Completion"))
        },
        "/v1/models": {"get": _operation(config, "List the models", _json("ModelList"))},
        "/v1/models/{model}": {
            "get": {
                **_operation(config, "Describe a model", _json("Model"), (404,)),
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
            }
        },
        "/health": {"get": _operation(config, "Whether the process is alive", _json("Status"), (503,), guarded=False)},
        "/ready": {"get": _operation(config, "Whether requests are answered now", _json("Status"), (503,))},
        "/metrics": {
            "get": _operation(config, "Prometheus metrics", {"text/plain": {"schema": {"type": "string"}}}),
        },
        "/debug/experts": {
            "get": _operation(config, "How busy routed experts are, and where", _json("Experts"), (404, 503)),
        },
        "/debug/trace": {
            "post": {
                **_operation(
                    config, "Record what all processes do", _json("Recording"), (400, 408, 409, 413, 415, 503)
                ),
                "requestBody": {"required": True, "content": _json("TraceRequest")},
            }
        },
        "/debug/units": {"get": _operation(config, "What runs where, and how well", _json("ServerReport"))},
    }
    components: dict[str, Any] = {"schemas": _schemas(config)}
    if config.api_key is not None:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Brigade", "version": "v1"},
        "paths": paths,
        "components": components,
    }


def _operation(
    config: ServeConfig, summary: str, content: dict[str, Any], errors: Iterable[int] = (), *, guarded: bool = True
) -> dict[str, Any]:
    door = [status for status, on in ((401, config.api_key is not None), (403, config.checks_host)) if on and guarded]
    responses: dict[str, Any] = {"200": {"description": "Success.", "content": content}}
    for status in sorted({*errors, *door}):
        responses[str(status)] = {"description": _SAID[status], "content": _json("ErrorReply")}
        if status in (429, 503):
            seconds = {"description": "Seconds to wait before trying again.", "schema": {"type": "integer"}}
            responses[str(status)]["headers"] = {"Retry-After": seconds}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if config.api_key is not None:
        operation["security"] = [{"bearer": []}] if guarded else []
    return operation


def _post(config: ServeConfig, summary: str, body: type, content: dict[str, Any]) -> dict[str, Any]:
    return {
        **_operation(config, summary, content, _POST_ERRORS),
        "requestBody": {"required": True, "content": _json(body.__name__)},
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF + name}}}


def _streamed(whole: str, chunk: str) -> dict[str, Any]:
    said = f'Events "data: {{...}}", each a {chunk} or, last, an ErrorReply; then "data: [DONE]" unless it failed.'
    return {**_json(whole), "text/event-stream": {"schema": {"type": "string", "description": said}}}


def _schemas(config: ServeConfig) -> dict[str, Any]:
    _, asked = models_json_schema(
        [(kind, "validation") for kind in (ChatRequest, CompletionRequest, TraceRequest)], ref_template=_REF + "{model}"
    )
    replies = (
        ChatCompletion,
        ChatChunk,
        Completion,
        ErrorReply,
        Experts,
        Model,
        ModelList,
        Recording,
        ServerReport,
        Status,
    )
    _, given = msgspec.json.schema_components(replies, ref_template=_REF + "{name}")
    schemas: dict[str, Any] = {**asked["$defs"], **given}
    for name in ("ChatRequest", "CompletionRequest"):
        schemas[name]["properties"]["model"]["enum"] = [config.served_name]
    return schemas
