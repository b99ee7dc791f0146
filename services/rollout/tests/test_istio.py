import re
from datetime import UTC, datetime
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.records import Hand, Serving, Share, Sticky, VersionMatch
from lepton_rollout.istio import checked, documents, header_names, shares, versions
from lepton_rollout.mesh import virtual_service
from lepton_rollout.ranges import range_regex
from lepton_rollout.record import TOTAL_WEIGHT

from .istio_cases import FEWER, HOST, MODEL, READY, RECORD, written
from .kubernetes import assert_known
from .stand_ins import assigned, serving

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


@FEWER
@given(st.data())
def test_the_outside_schema_takes_every_field_of_both_objects_as_it_is(data: st.DataObject) -> None:
    routes, rule = documents(virtual_service(data.draw(_RECORDS)))

    assert_known("VirtualService", routes)
    assert_known("DestinationRule", rule)


@FEWER
@given(st.data())
def test_weights_total_ten_thousand_and_every_subset_named_is_in_the_rule(data: st.DataObject) -> None:
    routes, rule = documents(virtual_service(data.draw(_RECORDS)))

    subsets = {each["name"] for each in rule["spec"]["subsets"]}
    for route in routes["spec"]["http"]:
        if "route" in route:
            assert sum(each["weight"] for each in route["route"]) == TOTAL_WEIGHT
            assert {each["destination"]["subset"] for each in route["route"]} <= subsets
    assert "match" not in routes["spec"]["http"][-1]


@FEWER
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

    assert checked(written(spec), RECORD, READY) == spec


@FEWER
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
