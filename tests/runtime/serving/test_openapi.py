"""The OpenAPI document is valid, and requests made of it, fitting or not, are answered as it says."""

from __future__ import annotations

from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx", "schemathesis"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from jsonschema_rs import validator_for
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.runtime.serving.live import CHAT, RESPONSES, TEXT, Live

CHECKS = [status_code_conformance, response_schema_conformance]


def document(live: Live) -> dict[str, Any]:
    found: dict[str, Any] = live.client.get("/openapi.json").json()
    return found


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *((path, mode) for path in (CHAT, TEXT, RESPONSES) for mode in ("positive", "negative")),
        ("/v1/models", "positive"),
        ("/v1/models/{model}", "positive"),
    ],
)
def test_no_request_made_of_the_document_finds_a_fault(live: Live, path: str, mode: str) -> None:
    schema = schemathesis.openapi.from_dict(document(live))
    schema.config.update(base_url=live.url)
    operation: Any = schema[path]["GET" if "models" in path else "POST"]

    @settings(max_examples=40, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
    @seed(7)
    @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and mode == "positive":
            # Those that get past the door, and soon end.
            case.body["model"] = live.name
            case.body["max_tokens" if path != RESPONSES else "max_output_tokens"] = 4
            case.body["stream"] = False
        response = case.call()
        assert response.status_code != 500
        case.validate_response(response, checks=CHECKS)

    ask()


def test_the_documents_own_schemas_take_real_answers(live: Live) -> None:
    found = document(live)
    schemas = found["components"]["schemas"]
    hello = [{"role": "user", "content": "Hello"}]
    for name, answer in (
        ("ChatCompletion", live.ask(CHAT, messages=hello, max_tokens=4, logprobs=True)),
        ("Completion", live.ask(TEXT, prompt="Hello", max_tokens=4, logprobs=1)),
        ("Response", live.ask(RESPONSES, input="Hello", max_output_tokens=4)),
        ("ChatChunk", live.events(CHAT, messages=hello, max_tokens=4)[0]),
        ("ErrorAnswer", live.client.post(CHAT, json={}).json()),
        ("ModelList", live.client.get("/v1/models").json()),
    ):
        schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
        validator_for(schema).validate(answer)


def test_what_is_documented_is_what_there_is(live: Live) -> None:
    paths = set(document(live)["paths"])
    routes = {vars(route)["path"].replace("{model:path}", "{model}") for route in live.app.routes}
    assert routes - paths == {"/openapi.json", "/health", "/", "/playground/{version}/{name}"}
    assert paths <= routes
