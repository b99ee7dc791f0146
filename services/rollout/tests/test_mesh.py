from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from lepton_common.records import Hand, Serving, Share, Sticky, VersionMatch
from lepton_common.types import ModelRef
from lepton_rollout.mesh import (
    RETRIES,
    HeaderEdits,
    HeaderMatch,
    HTTPRouteDestination,
    Mirror,
    Retries,
    virtual_service,
)
from lepton_rollout.record import TOTAL_WEIGHT, unserved

from .stand_ins import assigned, serving

MODEL = ModelRef("acme", "digits")
HOST = "digits.acme.models.lepton"


def test_a_forced_version_comes_before_the_split_and_an_unknown_one_between() -> None:
    service = virtual_service(serving(MODEL, 4, {2: 90, 3: 10}, 1))

    assert (service.name, service.host, service.generation) == ("acme/digits", HOST, 4)
    assert [route.name for route in service.http] == ["version-1", "version-2", "version-3", "unknown-version", "split"]
    assert [route.match for route in service.http] == [
        ((HeaderMatch("x-lepton-version", exact="1"),),),
        ((HeaderMatch("x-lepton-version", exact="2"),),),
        ((HeaderMatch("x-lepton-version", exact="3"),),),
        ((HeaderMatch("x-lepton-version"),),),
        (),
    ]


def test_weights_are_ten_thousandths() -> None:
    split = virtual_service(serving(MODEL, 1, {2: 99.9, 3: 0.1})).http[-1]

    assert split.route == (HTTPRouteDestination("cpu", 2, 9990), HTTPRouteDestination("cpu", 3, 10))


def test_a_model_without_traffic_is_answered_by_the_mesh() -> None:
    service = virtual_service(unserved(MODEL))

    assert service.live_pools == frozenset()
    assert service.http[-1].direct_response is not None
    assert service.http[-1].direct_response.status == 503


def test_a_version_that_moves_to_another_pool_is_led_to_its_last_place() -> None:
    record = serving(MODEL, 1, {1: 100}).model_copy(update={"versions": (assigned(1, "cpu"), assigned(1, "gpu"))})

    service = virtual_service(record)

    assert service.pools == {"gpu"}
    assert [route.name for route in service.http] == ["version-1", "unknown-version", "split"]


def test_requests_with_a_matching_header_come_before_the_split() -> None:
    matches = (
        VersionMatch(header="X-Beta", value="yes", version=2),
        VersionMatch(header="x-beta", value="no", version=9),
    )
    record = serving(MODEL, 1, {1: 100}, 2).model_copy(update={"matches": matches})

    routes = virtual_service(record).http[3:]

    assert [route.name for route in routes] == ["match-0", "split"]  # Version 9 is not loaded.
    assert routes[0].match == ((HeaderMatch("x-beta", exact="yes"),),)
    assert routes[0].route == (HTTPRouteDestination("cpu", 2),)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5, unique=True), st.data())
def test_weights_total_ten_thousand_with_the_stable_version_first(versions: list[int], data: st.DataObject) -> None:
    points = [data.draw(st.integers(1, TOTAL_WEIGHT)) for _ in versions]
    split = {version: 100 * each / sum(points) for version, each in zip(versions, points, strict=True)}
    stable = data.draw(st.sampled_from(versions))
    record = serving(MODEL, 1, split).model_copy(update={"stable": stable, "sticky": Sticky(by="x-user")})

    route = virtual_service(record).http[-1]

    assert sum(each.weight for each in route.route) == TOTAL_WEIGHT
    assert min(each.weight for each in route.route) > 0
    assert route.route[0].version == stable
    assert route.sticky is (len(versions) > 1)


@given(st.integers(0, TOTAL_WEIGHT), st.integers(0, TOTAL_WEIGHT))
def test_a_candidate_that_grows_takes_buckets_from_the_stable_version_alone(one: int, other: int) -> None:
    smaller, larger = (_buckets(weight) for weight in sorted((one, other)))

    assert smaller[2] <= larger[2]
    assert larger[1] <= smaller[1]


def test_a_persons_routes_take_the_splits_place_and_versions_can_still_be_forced() -> None:
    spec: dict[str, Any] = {
        "hosts": [HOST],
        "http": [
            {
                "match": [
                    {"headers": {"x-user": {"prefix": "vip-"}, "x-beta": {}}},
                    {"withoutHeaders": {"x-region": {"regex": "eu-.*"}}},
                ],
                "route": [
                    {
                        "destination": {"host": HOST, "subset": "v2"},
                        "weight": 10_000,
                        "headers": {
                            "request": {"set": {"x-tier": "1"}},
                            "response": {"add": {"x-a": "b"}, "remove": ["x-c"]},
                        },
                    }
                ],
                "timeout": "1.5s",
                "retries": {"attempts": 3, "retryOn": "5xx, 429", "perTryTimeout": "250ms", "backoff": "10ms"},
                "mirrors": [{"destination": {"host": HOST, "subset": "v3"}, "percentage": {"value": 12.5}}],
            },
            {
                "route": [
                    {"destination": {"host": HOST, "subset": "v1"}, "weight": 7_000},
                    {"destination": {"host": HOST, "subset": "v2"}, "weight": 3_000},
                    {"destination": {"host": HOST, "subset": "v3"}, "weight": 0},
                ],
            },
        ],
    }
    matches = (VersionMatch(header="x-lab", value="1", version=2),)

    routes = virtual_service(
        _taken(serving(MODEL, 1, {1: 100}, 2, 3), spec).model_copy(update={"matches": matches})
    ).http

    assert [route.name for route in routes[:4]] == ["version-1", "version-2", "version-3", "unknown-version"]
    special, split = routes[4:]
    assert special.match == (
        (HeaderMatch("x-user", prefix="vip-"), HeaderMatch("x-beta")),
        (HeaderMatch("x-region", regex="eu-.*", inverted=True),),
    )
    edits = (HeaderEdits(set=(("x-tier", "1"),)), HeaderEdits(add=(("x-a", "b"),), remove=("x-c",)))
    assert special.route == (HTTPRouteDestination("cpu", 2, TOTAL_WEIGHT, *edits),)
    assert special.timeout_ms == 1_500
    assert special.retries == Retries(3, ("5xx", "429"), per_try_timeout_ms=250, backoff_ms=10)
    assert special.mirrors == (Mirror("cpu", 3, 12.5),)
    assert split.route == (HTTPRouteDestination("cpu", 1, 7_000), HTTPRouteDestination("cpu", 2, 3_000))
    assert (split.match, split.timeout_ms, split.retries) == ((), None, RETRIES)


def test_a_persons_route_to_a_version_that_was_let_go_since_answers_that_it_is_not_loaded() -> None:
    spec = {"hosts": [HOST], "http": [{"route": [{"destination": {"host": HOST, "subset": "v7"}, "weight": 10_000}]}]}

    service = virtual_service(_taken(serving(MODEL, 1, {1: 100}), spec))

    assert service.live_pools == frozenset()
    assert service.http[-1].direct_response is not None


def _taken(record: Serving, spec: dict[str, Any]) -> Serving:
    hand = Hand(by="ann", at=datetime(2026, 11, 27, tzinfo=UTC), spec=spec)
    return record.model_copy(update={"hand": hand})


def _buckets(weight: int) -> dict[int, set[int]]:
    """The buckets of the stable version 1 and of the candidate 2, which has this weight."""
    shares = {1: (TOTAL_WEIGHT - weight) / 100, 2: weight / 100}
    split = tuple(Share(version=version, percent=percent) for version, percent in shares.items())
    record = serving(MODEL, 1, {1: 100}, 2).model_copy(update={"split": split, "sticky": Sticky(by="key")})
    buckets: dict[int, set[int]] = {1: set(), 2: set()}
    total = 0
    for destination in virtual_service(record).http[-1].route:
        buckets[destination.version] = set(range(total, total + destination.weight))
        total += destination.weight
    return buckets
