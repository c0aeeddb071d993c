"""The OpenAPI document: made of the same types that requests are decoded to and answers are made of."""

from __future__ import annotations

from typing import Any

import msgspec

from runtime.serving import replies, requests, response_calls, response_events
from runtime.serving.errors import ErrorAnswer

VERSION = "1"
REFUSALS = {
    400: "The request does not fit: the message says what, what is allowed, and what to do.",
    401: "No API key, or one that is not known.",
    404: "No such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    429: "There is no room in the queue, or for one more stream; see Retry-After.",
    500: "A fault of the server.",
    503: "The server takes no requests: it starts, shuts down, or its engine has failed.",
    504: "The deadline passed before the request ran.",
}
EVENTS: tuple[type, ...] = (
    response_events.ResponseEvent,
    response_events.ItemEvent,
    response_events.PartEvent,
    response_events.DeltaEvent,
    response_events.TextEvent,
    response_calls.ArgumentsDelta,
    response_calls.ArgumentsDone,
)


def document(*, keys: bool) -> dict[str, Any]:
    """Return the document of a server that asks for API `keys`, or does not."""
    kinds: list[Any] = [
        requests.ChatRequest,
        requests.CompletionRequest,
        requests.ResponseRequest,
        replies.ChatCompletion,
        replies.ChatChunk,
        replies.Completion,
        replies.Response,
        replies.ModelList,
        replies.Model,
        ErrorAnswer,
        *EVENTS,
    ]
    found, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schemas = {kind.__name__: schema for kind, schema in zip(kinds, found, strict=True)}
    events = [schemas[kind.__name__] for kind in EVENTS]

    def post(summary: str, asked: str, whole: str, streamed: Any) -> dict[str, Any]:
        content = {
            "application/json": {"schema": schemas[whole]},
            "text/event-stream": {"itemSchema": streamed, "schema": {"type": "string"}},
        }
        return {
            "post": {
                "summary": summary,
                "operationId": asked[0].lower() + asked[1:].removesuffix("Request"),
                "requestBody": {"required": True, "content": {"application/json": {"schema": schemas[asked]}}},
                "responses": {"200": {"description": "The answer.", "content": content}, **_refusals(schemas)},
                **_secured(keys),
            }
        }

    def get(summary: str, schema: Any, *others: int, secured: bool = False, media: str = "application/json") -> Any:
        answers = {"200": {"description": summary, "content": {media: {"schema": schema}}}}
        answers |= {str(status): _refusal(status, schemas) for status in others}
        return {"get": {"summary": summary, "responses": answers, **_secured(keys and secured)}}

    status = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
    one = get("One of the names that the engine is served under.", schemas["Model"], 401, 404, secured=True)
    one["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    health = get("Whether requests should be sent here.", status)
    health["get"]["responses"]["503"] = {
        "description": "They should not.",
        "content": {"application/json": {"schema": status}},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ht-serve",
            "version": VERSION,
            "description": "OpenAI's API on hidden-transfer decoding. Unknown fields are refused, and what cannot be "
            "honoured is too.",
        },
        "paths": {
            "/v1/models": get("The names that the engine is served under.", schemas["ModelList"], 401, secured=True),
            "/v1/models/{model}": one,
            "/v1/chat/completions": post(
                "Answer a conversation.", "ChatRequest", "ChatCompletion", schemas["ChatChunk"]
            ),
            "/v1/completions": post("Continue a text.", "CompletionRequest", "Completion", schemas["Completion"]),
            "/v1/responses": post("Answer a conversation.", "ResponseRequest", "Response", {"anyOf": events}),
            "/health/live": health,
            "/health/ready": health,
            "/metrics": get("Metrics for Prometheus.", {"type": "string"}, media="text/plain"),
        },
        "components": {
            "schemas": components,
            **({"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keys else {}),
        },
    }


def _refusals(schemas: dict[str, Any]) -> dict[str, Any]:
    return {str(status): _refusal(status, schemas) for status in REFUSALS}


def _refusal(status: int, schemas: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schemas["ErrorAnswer"]}}
    return {"description": REFUSALS[status], "content": content}


def _secured(keys: bool) -> dict[str, Any]:
    return {"security": [{"key": []}]} if keys else {}
