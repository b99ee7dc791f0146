import re
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lepton_common.errors import Invalid
from lepton_common.records import Hand, Serving, Share, Sticky, VersionMatch
from lepton_common.types import ModelRef
from lepton_rollout.istio import checked, documents, header_names, shares, versions
from lepton_rollout.mesh import virtual_service
from lepton_rollout.ranges import range_regex
from lepton_rollout.record import TOTAL_WEIGHT

from .kubernetes import assert_known
from .stand_ins import assigned, serving

MODEL = ModelRef("acme", "digits")
HOST = "digits.acme.models.lepton"
# However busy the machine is.
PATIENT = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
READY = (1, 2, 3)
RECORD = serving(MODEL, 4, {1: 90, 2: 10}, 3)
# As somebody writes it who knows Istio and not Lepton.
DOCUMENT = f"""
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: by-hand, namespace: models}}
spec:
  hosts: [{HOST}]
  http:
  - name: testers
    match:
    - uri: {{prefix: /}}
      headers:
        X-Tester: {{exact: "yes"}}
        user-agent: {{regex: ".*Mobile.*"}}
    - withoutHeaders: {{x-region: {{prefix: eu-}}}}
    route:
    - destination: {{host: {HOST}, subset: v3, port: {{number: 8080}}}}
      headers:
        request: {{set: {{x-tier: gold}}, add: {{x-seen: mesh}}, remove: [x-debug]}}
        response: {{set: {{X-Lepton-Version: "3"}}}}
    mirror: {{host: {HOST}, subset: v2}}
    mirrorPercentage: {{value: 12.5}}
    timeout: 1.5s
    retries: {{attempts: 3, perTryTimeout: 250ms, retryOn: "5xx,503", backoff: 10ms}}
  - route:
    - {{destination: {{host: {HOST}, subset: v1}}, weight: 70}}
    - {{destination: {{host: {HOST}, subset: v2}}, weight: 30}}
"""


def test_the_objects_are_those_one_would_write_by_hand() -> None:
    routes, rule = documents(virtual_service(RECORD))

    assert (routes["apiVersion"], routes["kind"]) == ("networking.istio.io/v1", "VirtualService")
    assert routes["metadata"]["name"] == rule["metadata"]["name"] == "digits.acme"
    assert routes["metadata"]["annotations"] == {"lepton.ai/generation": "4"}
    assert routes["spec"]["hosts"] == [HOST]
    assert routes["spec"]["http"][0]["match"] == [{"headers": {"x-lepton-version": {"exact": "1"}}}]
    assert routes["spec"]["http"][3]["match"] == [{"headers": {"x-lepton-version": {}}}]
    assert routes["spec"]["http"][-1] == {
        "name": "split",
        "route": [
            {
                "destination": {"host": HOST, "subset": f"v{version}"},
                "weight": weight,
                "headers": {
                    "request": {"set": {"x-lepton-version": str(version)}},
                    "response": {"set": {"x-lepton-version": str(version)}},
                },
            }
            for version, weight in ((1, 9_000), (2, 1_000))
        ],
        "timeout": "30s",
        "retries": {"attempts": 2, "retryOn": "connect-failure,refused-stream,reset,503"},
    }
    assert rule["kind"] == "DestinationRule"
    assert rule["spec"]["host"] == HOST
    assert rule["spec"]["subsets"] == [{"name": f"v{each}", "labels": {"lepton.ai/pool": "cpu"}} for each in READY]


@PATIENT
@given(st.data())
def test_the_outside_schema_takes_every_field_of_both_objects_as_it_is(data: st.DataObject) -> None:
    routes, rule = documents(virtual_service(data.draw(_RECORDS)))

    assert_known("VirtualService", routes)
    assert_known("DestinationRule", rule)


@PATIENT
@given(st.data())
def test_weights_total_ten_thousand_and_every_subset_named_is_in_the_rule(data: st.DataObject) -> None:
    routes, rule = documents(virtual_service(data.draw(_RECORDS)))

    subsets = {each["name"] for each in rule["spec"]["subsets"]}
    for route in routes["spec"]["http"]:
        if "route" in route:
            assert sum(each["weight"] for each in route["route"]) == TOTAL_WEIGHT
            assert {each["destination"]["subset"] for each in route["route"]} <= subsets
    assert "match" not in routes["spec"]["http"][-1]


@PATIENT
@given(st.integers(0, 9999), st.integers(0, 9999))
def test_a_range_of_buckets_as_a_regular_expression_matches_its_numbers_and_no_others(one: int, other: int) -> None:
    low, high = sorted((one, other))
    expression = re.compile(range_regex(low, high))

    matched = [number for number in range(10_000) if expression.fullmatch(str(number))]

    assert matched == list(range(low, high + 1))
    assert not any(expression.fullmatch(text) for text in ("", "x", "-1", "00", "10000", f"0{low}", f"{high} "))


def test_istio_which_knows_no_sticky_split_gets_a_route_for_each_versions_buckets() -> None:
    record = serving(MODEL, 1, {1: 87.5, 2: 12.5}).model_copy(update={"sticky": Sticky(by="key")})

    routes = documents(virtual_service(record))[0]["spec"]["http"][-3:]

    assert [route["name"] for route in routes] == ["sticky-split-v1", "sticky-split-v2", "split"]
    for bucket in range(TOTAL_WEIGHT):
        (version,) = (
            route["route"][0]["destination"]["subset"]
            for route in routes[:2]
            if re.fullmatch(route["match"][0]["headers"]["x-lepton-bucket"]["regex"], str(bucket))
        )
        assert version == ("v1" if bucket < 8_750 else "v2")
    assert [each["weight"] for each in routes[2]["route"]] == [8_750, 1_250]


def test_a_persons_virtual_service_is_taken_in_normal_form() -> None:
    spec = checked(yaml.safe_load(DOCUMENT), RECORD, READY)

    assert spec == {
        "hosts": [HOST],
        "http": [
            {
                "name": "testers",
                "match": [
                    {"headers": {"x-tester": {"exact": "yes"}, "user-agent": {"regex": ".*Mobile.*"}}},
                    {"withoutHeaders": {"x-region": {"prefix": "eu-"}}},
                ],
                "route": [
                    {
                        "destination": {"host": HOST, "subset": "v3"},
                        "weight": 10_000,
                        "headers": {
                            "request": {"set": {"x-tier": "gold"}, "add": {"x-seen": "mesh"}, "remove": ["x-debug"]}
                        },
                    }
                ],
                "timeout": "1.5s",
                "retries": {"attempts": 3, "perTryTimeout": "250ms", "retryOn": "5xx,503", "backoff": "10ms"},
                "mirrors": [{"destination": {"host": HOST, "subset": "v2"}, "percentage": {"value": 12.5}}],
            },
            {
                "route": [
                    {"destination": {"host": HOST, "subset": "v1"}, "weight": 7_000},
                    {"destination": {"host": HOST, "subset": "v2"}, "weight": 3_000},
                ]
            },
        ],
    }
    assert shares(spec) == (Share(version=1, percent=70), Share(version=2, percent=30))
    assert header_names(spec) == ("user-agent", "x-region", "x-tester")
    assert versions(spec) == {1, 2, 3}


def test_a_normal_form_is_its_own() -> None:
    spec = checked(yaml.safe_load(DOCUMENT), RECORD, READY)

    assert checked(_document(spec), RECORD, READY) == spec


@PATIENT
@given(st.data())
def test_what_lepton_prints_can_be_applied_and_leads_to_the_same_split(data: st.DataObject) -> None:
    record = data.draw(_RECORDS.filter(lambda record: record.split))
    printed = documents(virtual_service(record))[0]

    spec = checked(printed, record, READY)
    # By way of etcd.
    taken = Serving.model_validate_json(record.model_copy(update={"hand": _hand(spec)}).model_dump_json())

    assert documents(virtual_service(taken))[0]["spec"] == printed["spec"]
    # Edited once more, now that a person's routes are what is printed.
    assert checked(documents(virtual_service(taken))[0], taken, READY) == spec


def test_printed_routes_of_a_version_that_was_let_go_since_do_not_stand_in_the_way() -> None:
    printed = documents(virtual_service(RECORD))[0]

    spec = checked(printed, serving(MODEL, 5, {1: 50, 2: 50}), (1, 2))

    assert versions(spec) == {1, 2}


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
        checked(_document(spec), record, READY)

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


@PATIENT
@given(_JSON)
def test_no_document_does_more_harm_than_being_refused(value: Any) -> None:
    spec = value if isinstance(value, dict) and "http" in value else {"hosts": [HOST], "http": value}

    with pytest.raises(Invalid):
        checked(_document(spec), RECORD, READY)


def _document(spec: Any) -> dict[str, Any]:
    return {"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "spec": spec}


def _hand(spec: dict[str, Any]) -> Hand:
    return Hand(by="ann", at=datetime(2026, 11, 27, tzinfo=UTC), spec=spec)


def _record(
    split: dict[int, int], sticky: bool, matches: list[tuple[str, str, int]], hand: dict[str, Any] | None
) -> Serving:
    total = sum(split.values())
    percents = {version: 100 * points / total for version, points in split.items()}
    record = serving(MODEL, 7, percents, *(each for each in READY if each not in split))
    pools = tuple(assigned(each, "gpu" if each == 3 else "cpu") for each in READY)
    changes: dict[str, Any] = {
        "versions": pools,
        "sticky": Sticky(by="x-user") if sticky else None,
        "matches": tuple(VersionMatch(header=name, value=value, version=version) for name, value, version in matches),
        "hand": _hand(hand) if hand else None,
    }
    return record.model_copy(update=changes)


_RECORDS = st.builds(
    _record,
    st.dictionaries(st.sampled_from(READY), st.integers(1, 10_000), max_size=3),
    st.booleans(),
    st.lists(
        st.tuples(st.sampled_from(["x-a", "x-b"]), st.sampled_from(["1", "two"]), st.sampled_from(READY)), max_size=2
    ),
    st.sampled_from([None, checked(yaml.safe_load(DOCUMENT), RECORD, READY)]),
)
