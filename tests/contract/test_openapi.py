"""The OpenAPI page: complete, valid, and true under schemathesis."""

from __future__ import annotations

import pytest


def test_the_page_names_every_route_and_every_field(live):
    page = live.get("/openapi.json").json()
    routes = {
        (path, method)
        for path, operations in page["paths"].items()
        for method in operations
        if method != "head"
    }
    for path in ("chat/completions", "completions", "fim/completions", "embeddings", "responses", "messages"):
        assert (f"/v1/{path}", "post") in routes
    assert {("/v1/models", "get"), ("/health", "get"), ("/v1/models/{model_id}", "delete")} <= routes
    chat = page["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"random_seed", "safe_prompt", "prediction", "tool_choice", "logit_bias", "min_tokens"} <= set(
        chat
    )
    for operations in page["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            assert "400" in operation["responses"]


def test_the_page_is_valid_openapi(live):
    from jsonschema import Draft202012Validator

    page = live.get("/openapi.json").json()
    assert page["openapi"].startswith("3.1")
    for schema in page["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(live):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    live.engine.text = "ok"
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    checked = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        def probe(case) -> None:
            response = case.call()
            assert response.status_code < 500 or response.status_code == 501, response.text

        probe()
        checked += 1
    assert checked >= 15
