"""Requests that schemathesis makes from the server's own description of itself."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pshare_jax.serve.openapi import ENDPOINTS, document
from tests.attack.bounds import SEEDS
from tests.serve.server import eventually

SCHEMA = schemathesis.openapi.from_dict(document())
CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
EXAMPLES = 4 * len(SEEDS)


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_valid_requests_are_answered_or_refused(victim, method, path):
    """What the description allows may be more than is served, but then the answer says so."""
    statuses = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=SCHEMA[path][method].as_strategy())
    def attack(case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "planner"  # others get no further than 404
        response = case.call(base_url=victim.url, timeout=20)
        statuses.add(response.status_code)
        assert response.status_code < 500, (case.body, response.content)
        case.validate_response(response, checks=CHECKS)

    attack()
    assert statuses
    eventually(lambda: victim.engine.running_ids == [])
