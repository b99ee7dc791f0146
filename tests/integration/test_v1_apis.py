"""Every `/v1` API through the front door: whatever schemathesis makes of its OpenAPI document is answered as told."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance

from .local_platform import Platform
from .onnx_models import mlp

SERVICES = {
    "registry": {
        "GET /v1/tenants",
        "POST /v1/tenants",
        "GET /v1/keys",
        "POST /v1/keys",
        "DELETE /v1/keys/{key_id}",
        "POST /v1/keys/{key_id}/rotate",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "GET /v1/models/{model}/versions",
        "POST /v1/models/{model}/versions",
        "GET /v1/models/{model}/versions/{version}",
        "GET /v1/models/{model}/timeline",
        "PUT /v1/artifacts/{sha256}",
        "HEAD /v1/artifacts/{sha256}",
        "GET /v1/artifacts/{sha256}",
    },
    "rollout": {
        "POST /v1/rollouts",
        "GET /v1/rollouts",
        "GET /v1/rollouts/{rollout}",
        *(f"POST /v1/rollouts/{{rollout}}/{verb}" for verb in ("pause", "resume", "promote", "approve", "abort")),
        "POST /v1/rollouts/{rollout}/retry",
        "POST /v1/rollouts/{rollout}/replay",
        "GET /v1/rollouts/{rollout}/decisions",
        "GET /v1/rollouts/{rollout}/windows",
        "GET /v1/policies",
        "GET /v1/policies/{model}",
        "PUT /v1/policies/{model}",
        "DELETE /v1/policies/{model}",
        "GET /v1/mesh/{model}",
        "PUT /v1/mesh/{model}",
        "DELETE /v1/mesh/{model}",
        "GET /v1/serving",
        "GET /v1/serving/{model}",
        "POST /v1/serving/{model}/rollback",
        "POST /v1/serving/{model}/load",
        "POST /v1/serving/{model}/unload",
        "PUT /v1/serving/{model}/cache",
        "DELETE /v1/serving/{model}/cache",
        "PUT /v1/serving/{model}/limits",
        "DELETE /v1/serving/{model}/limits",
    },
    "monitor": {"GET /v1/windows", "POST /v1/windows/counters", "GET /v1/labels"},
}
OPERATIONS = [(service, label) for service, labels in SERVICES.items() for label in sorted(labels)]

# Wrong, but no schema can say so: a digest that the body does not have, an expiry in the past, steps that do not grow,
# an Istio feature that is refused, a burst without a rate, a time span that ends before it begins.
WRONG_BEYOND_SCHEMA = {
    "PUT /v1/artifacts/{sha256}",
    "POST /v1/keys",
    "POST /v1/rollouts",
    "POST /v1/rollouts/{rollout}/replay",
    "PUT /v1/policies/{model}",
    "PUT /v1/mesh/{model}",
    "PUT /v1/serving/{model}/limits",
    "GET /v1/windows",
}
# Asking what would have been changes nothing, so a reader may.
ONLY_ASKS = {"POST /v1/rollouts/{rollout}/replay"}
EXAMPLES = 20


@pytest.fixture(scope="module")
def documents(platform: Platform) -> dict[str, dict[str, Any]]:
    """The services' OpenAPI documents, as the front door has them."""
    with platform.http(None) as http:
        return {service: http.get(f"/v1/openapi/{service}.json").raise_for_status().json() for service in SERVICES}


@pytest.fixture(scope="module")
def known(platform: Platform) -> dict[str, str]:
    """Path parameters of things that exist, so that more than 404s are tested."""
    with platform.client() as client:
        client.push(mlp(91), name="schemathesis")
        version = client.push(mlp(92), name="schemathesis")
        [rollout, *_] = client.rollouts("schemathesis")
    return {"model": "schemathesis", "version": "2", "sha256": version.sha256, "rollout": str(rollout.id)}


def test_every_service_behind_the_front_door_is_here(platform: Platform) -> None:
    bootstrap = json.loads((platform.home.folder / "envoy" / "bootstrap.json").read_bytes())
    clusters = {cluster["name"] for cluster in bootstrap["static_resources"]["clusters"]}
    assert clusters == {*SERVICES, "gateway", "gateway-grpc"}


@pytest.mark.parametrize("service", SERVICES)
def test_document_tells_of_every_operation(documents: dict[str, dict[str, Any]], service: str) -> None:
    paths = documents[service]["paths"]
    assert {f"{verb.upper()} {path}" for path, verbs in paths.items() for verb in verbs} == SERVICES[service]


@pytest.mark.parametrize(("service", "label"), OPERATIONS, ids=[label for _, label in OPERATIONS])
def test_operation_answers_as_its_document_says(
    platform: Platform, documents: dict[str, dict[str, Any]], known: dict[str, str], service: str, label: str
) -> None:
    schema = schemathesis.openapi.from_dict(documents[service])
    [operation] = [
        result.ok() for result in schema.get_all_operations() if isinstance(result, Ok) and result.ok().label == label
    ]
    excluded = [positive_data_acceptance] if label in WRONG_BEYOND_SCHEMA else []

    @hypothesis_settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(), exists=st.booleans())
    def check(case: Any, exists: bool) -> None:
        if exists:
            case.path_parameters = {
                name: known.get(name, value) for name, value in (case.path_parameters or {}).items()
            }
        answer = case.call(base_url=platform.url, headers={"Authorization": f"Bearer {platform.key}"}, timeout=60)
        assert answer.status_code < 500, answer.text
        case.validate_response(answer, excluded_checks=excluded)

    check()


def test_schema_tests_need_the_key(platform: Platform, make_key: Callable[..., str]) -> None:
    reader = make_key("read")
    for service, label in OPERATIONS:
        verb, _, path = label.partition(" ")
        path = path.format(model="schemathesis", version=1, sha256="0" * 64, key_id="0" * 16, rollout="0" * 32)
        with platform.http(None) as nobody, platform.http(reader) as only_reads:
            assert nobody.request(verb, path).status_code == 401, (service, label)
            if verb not in {"GET", "HEAD"} and label not in ONLY_ASKS:
                assert only_reads.request(verb, path, json={}).status_code in {400, 403}, (service, label)
