"""`/openapi.json` describes the server that publishes it."""

import re

from openapi_spec_validator import validate

from pshare_jax.frontend.requests import CompletionRequest
from pshare_jax.serve.app import build_app
from pshare_jax.serve.openapi import document
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import running_server


async def test_every_route_is_described_and_nothing_else(tokenizer):
    app = build_app(fake_engine(tokenizer, fake_config(ui=False)))  # a page is no API
    app.freeze()
    served = set()
    for resource in app.router.resources():
        path = re.sub(r"\{(\w+):[^}]*\}", r"{\1}", resource.get_info().get("formatter", ""))
        path = path or resource.canonical
        served |= {(route.method.lower(), path.rstrip("/")) for route in resource}
    described = {
        (method, path) for path, methods in document()["paths"].items() for method in methods
    }
    assert {pair for pair in served if pair[0] != "head"} == described
    await app.cleanup()


def test_it_is_openapi_and_needs_no_key(tokenizer):
    with running_server(fake_engine(tokenizer, fake_config(api_key="x"))) as client:
        published = client.get("/openapi.json").json
    assert published == document()
    validate(published)


def test_bodies_have_the_fields_that_are_read():
    schema = document()["components"]["schemas"]["CompletionRequest"]
    assert set(schema["properties"]) == set(CompletionRequest.__struct_fields__)
    assert set(schema["required"]) == {"model", "prompt"}
