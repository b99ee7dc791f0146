"""VirtualServices that Lepton would not do exactly so, and what is none."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.errors import Invalid
from lepton_rollout.istio import checked

from .istio_cases import FEWER, HOST, MODEL, READY, RECORD, written
from .stand_ins import serving

_ROUTE: dict[str, Any] = {"route": [{"destination": {"host": HOST, "subset": "v1"}}]}
_SPLIT = [{"destination": {"host": HOST, "subset": f"v{version}"}, "weight": 50} for version in (1, 2)]
_REFUSED: list[tuple[str, Any, str]] = [
    ("hosts", ["other.acme.models.lepton"], "spec.hosts: expected [digits.acme.models.lepton]"),
    ("hosts", [HOST, "other"], "spec.hosts: expected"),
    ("http", [], "spec.http: List should have at least 1 item"),
    ("http", None, "spec.http: Input should be a valid list"),
    ("tcp", [], "spec.tcp: Istio has this, Lepton refuses it: models answer HTTP"),
    ("tls", [], "spec.tls: Istio has this"),
    ("gateways", ["mesh"], "spec.gateways: Istio has this"),
    ("htpp", [], "spec.htpp: there is no such field"),
    ("http", [_ROUTE | {"fault": {"delay": {}}}], "spec.http[0].fault: Istio has this, Lepton refuses it"),
    ("http", [_ROUTE | {"rewrite": {"uri": "/"}}], "spec.http[0].rewrite: Istio has this"),
    ("http", [_ROUTE | {"delegate": {"name": "x"}}], "spec.http[0].delegate: Istio has this"),
    ("http", [_ROUTE | {"corsPolicy": {}}], "spec.http[0].corsPolicy: Istio has this"),
    ("http", [_ROUTE | {"redirect": {}}], "spec.http[0].redirect: Istio has this"),
    ("http", [{"directResponse": {"status": 200}}], "spec.http[0].directResponse: Istio has this"),
    ("http", [_ROUTE | {"headers": {}}], "spec.http[0].headers: Istio has this"),
    ("http", [_ROUTE | {"weight": 3}], "spec.http[0].weight: there is no such field"),
    ("http", [_ROUTE | {"timeout": "60s"}], "spec.http[0].timeout: 60s is longer than the model's own limit of 30s"),
    ("http", [_ROUTE | {"timeout": "0s"}], "spec.http[0].timeout: '0s' is not a duration"),
    ("http", [_ROUTE | {"timeout": 5}], "spec.http[0].timeout: Input should be a valid string"),
    ("http", [_ROUTE | {"retries": {"attempts": 99}}], "spec.http[0].retries.attempts: Input should be less than"),
    ("http", [_ROUTE | {"retries": {"attempts": 1, "retryOn": "5xx,sometimes"}}], "'sometimes' is neither a status"),
    ("http", [_ROUTE | {"retries": {"attempts": 1, "perTryTimeout": "1m"}}], "spec.http[0].retries.perTryTimeout: 1m"),
    ("http", [_ROUTE | {"mirrorPercentage": {"value": 5}}], "spec.http[0].mirrorPercentage: it is the percentage of"),
    (
        "http",
        [_ROUTE | {"mirror": {"host": HOST, "subset": "v9"}}],
        f"spec.http[0].mirror.subset: v9 of {HOST} is not loaded; loaded: v1, v2, v3",
    ),
    (
        "http",
        [
            _ROUTE
            | {"mirror": {"host": HOST, "subset": "v2"}, "mirrors": [{"destination": {"host": HOST, "subset": "v3"}}]}
        ],
        "spec.http[0].mirror: it excludes mirrors",
    ),
    (
        "http",
        [_ROUTE | {"mirrors": [{"destination": {"host": HOST, "subset": "v2"}, "percentage": {"value": 101}}]}],
        "spec.http[0].mirrors[0].percentage.value: Input should be less than or equal to 100",
    ),
    ("http", [{"route": [_SPLIT[0], _SPLIT[1] | {"weight": 40}]}], "spec.http[0].route: the weights add up to 90"),
    ("http", [{"route": [_SPLIT[0], _SPLIT[1] | {"weight": -1}]}], "spec.http[0].route[1].weight: Input should be"),
    ("http", [{"route": [_SPLIT[0], _SPLIT[1] | {"weight": 0.5}]}], "spec.http[0].route[1].weight: Input should be"),
    ("http", [{"route": [_SPLIT[0] | {"weight": 0}]}], "spec.http[0].route[0].weight: the weights add up to 0"),
    ("http", [{"route": [_SPLIT[0], _SPLIT[0]]}], "spec.http[0].route[0].destination: version 1 is there more than"),
    (
        "http",
        [{"route": [_SPLIT[0], {"destination": {"host": HOST, "subset": "v9"}, "weight": 50}]}],
        f"spec.http[0].route[1].destination.subset: v9 of {HOST} is not loaded; loaded: v1, v2, v3",
    ),
    (
        "http",
        [{"route": [{"destination": {"host": HOST, "subset": "v4"}}]}],
        f"spec.http[0].route[0].destination.subset: v4 of {HOST} is not ready on any worker yet",
    ),
    (
        "http",
        [{"route": [{"destination": {"host": "example.com", "subset": "v1"}}]}],
        "spec.http[0].route[0].destination.host: 'example.com' is not this model's",
    ),
    (
        "http",
        [{"route": [{"destination": {"host": HOST}}]}],
        "spec.http[0].route[0].destination.subset: Field required",
    ),
    (
        "http",
        [{"route": [{"destination": {"host": HOST, "subset": "latest"}}]}],
        "spec.http[0].route[0].destination.subset: String should match pattern",
    ),
    (
        "http",
        [{"route": [_SPLIT[0] | {"headers": {"request": {"set": {"x-lepton-version": "2"}}}}, _SPLIT[1]]}],
        "spec.http[0].route[0].headers.request: x-lepton-version is always the number of the version",
    ),
    (
        "http",
        [{"route": [_SPLIT[0] | {"headers": {"response": {"remove": ["x-lepton-version"]}}}, _SPLIT[1]]}],
        "spec.http[0].route[0].headers.response: x-lepton-version is always",
    ),
    (
        "http",
        [{"route": [_SPLIT[0] | {"headers": {"request": {"set": {"host": "x"}}}}, _SPLIT[1]]}],
        "spec.http[0].route[0].headers.request.set.host: host is not for a VirtualService to change",
    ),
    (
        "http",
        [{"route": [_SPLIT[0] | {"headers": {"request": {"set": {"x-a": "%REQ(x)%"}}}}, _SPLIT[1]]}],
        "spec.http[0].route[0].headers.request.set.x-a: '%REQ(x)%' has a %",
    ),
    ("http", [_ROUTE, _ROUTE], "spec.http[0].match: it matches every request, so spec.http[1] would never get one"),
    ("http", [_ROUTE | {"match": [{}]}], "spec.http[0].match[0]: it matches every request"),
    ("http", [_ROUTE | {"match": [{"headers": {"x-a": {}}}]}], "spec.http[0].match: the last route must match every"),
    (
        "http",
        [_ROUTE | {"match": [{"uri": {"exact": "/"}}]}, _ROUTE],
        "spec.http[0].match[0].uri.exact: Istio has this",
    ),
    ("http", [_ROUTE | {"match": [{"uri": {"prefix": "/v2"}}]}, _ROUTE], "spec.http[0].match[0].uri.prefix: String"),
    ("http", [_ROUTE | {"match": [{"method": {"exact": "POST"}}]}, _ROUTE], "spec.http[0].match[0].method: Istio has"),
    (
        "http",
        [_ROUTE | {"match": [{"headers": {"x-a": {"exact": "1", "prefix": "2"}}}]}, _ROUTE],
        "spec.http[0].match[0].headers.x-a: expected one of exact, prefix and regex",
    ),
    (
        "http",
        [_ROUTE | {"match": [{"headers": {"x-a": {"regex": "("}}}]}, _ROUTE],
        "spec.http[0].match[0].headers.x-a.regex: '(' is not a regular expression",
    ),
    (
        "http",
        [_ROUTE | {"match": [{"headers": {"x-a": {"regex": "(?=a)b"}}}]}, _ROUTE],
        "spec.http[0].match[0].headers.x-a.regex: '(?=a)b' has '(?='",
    ),
    (
        "http",
        [_ROUTE | {"match": [{"headers": {"x-a": {"regex": "a{2000}"}}}]}, _ROUTE],
        "spec.http[0].match[0].headers.x-a.regex: 'a{2000}' has '{2000'",
    ),
    (
        "http",
        [_ROUTE | {"match": [{"headers": {"x-a": {"exact": "1"}, "X-A": {"exact": "2"}}}]}, _ROUTE],
        "spec.http[0].match[0].headers: one name is there twice",
    ),
    (
        "http",
        [_ROUTE | {"match": [{"headers": {"x-lepton-version": {"exact": "1"}}}]}, _ROUTE],
        "spec.http[0].match[0].headers.x-lepton-version: x-lepton-version is between Lepton's gateway",
    ),
    (
        "http",
        [_ROUTE | {"match": [{"headers": {"Authorization": {"prefix": "Bearer"}}}]}, _ROUTE],
        "spec.http[0].match[0].headers.Authorization: the gateway does not pass authorization on",
    ),
    ("http", [_ROUTE | {"name": f"r{n}", "match": [{"headers": {"x": {}}}]} for n in range(51)], "at most 50 items"),
]


@pytest.mark.parametrize(("field", "value", "told"), _REFUSED, ids=[told for _, _, told in _REFUSED])
def test_what_lepton_would_not_do_exactly_so_is_refused_by_name(field: str, value: Any, told: str) -> None:
    record = serving(MODEL, 4, {1: 90, 2: 10}, 3, 4) if "v4" in told else RECORD
    spec = {"hosts": [HOST], "http": [_ROUTE], field: value}

    with pytest.raises(Invalid) as refused:
        checked(written(spec), record, READY)

    assert told in refused.value.message


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({}, "apiVersion: Field required"),
        ({"apiVersion": "v1", "kind": "VirtualService", "spec": {}}, "apiVersion: String should match pattern"),
        ({"apiVersion": "networking.istio.io/v1", "kind": "Gateway", "spec": {}}, "kind: String should match pattern"),
        ({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService"}, "spec: Field required"),
        ({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "spec": []}, "spec: Input should be"),
        (
            {"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "spec": {}, "more": 1},
            "more: there is no",
        ),
    ],
)
def test_what_is_no_virtual_service_is_refused(document: dict[str, Any], told: str) -> None:
    with pytest.raises(Invalid, match=re.escape(told)):
        checked(document, RECORD, READY)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["spec", "hosts", "http", "route", "match", "headers", "destination", "name", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@FEWER
@given(_JSON)
def test_no_document_does_more_harm_than_being_refused(value: Any) -> None:
    spec = value if isinstance(value, dict) and "http" in value else {"hosts": [HOST], "http": value}

    with pytest.raises(Invalid):
        checked(written(spec), RECORD, READY)
