from lepton_common.types import ModelRef
from lepton_rollout.domain import TOTAL_WEIGHT, unserved
from lepton_rollout.mesh import HeaderMatch, virtual_service

from .stand_ins import serving

MODEL = ModelRef("acme", "digits")


def test_a_forced_version_comes_before_the_split_and_an_unknown_one_between() -> None:
    service = virtual_service(serving(MODEL, 4, {2: 90, 3: 10}, 1))

    assert (service.name, service.host) == ("acme/digits", "digits.acme.models.lepton")
    assert [route.name for route in service.http] == ["version-1", "version-2", "version-3", "unknown-version", "split"]
    assert [route.match for route in service.http] == [
        HeaderMatch("x-lepton-version", exact="1"),
        HeaderMatch("x-lepton-version", exact="2"),
        HeaderMatch("x-lepton-version", exact="3"),
        HeaderMatch("x-lepton-version"),
        None,
    ]


def test_weights_are_ten_thousandths_and_every_destination_sets_its_version() -> None:
    split = virtual_service(serving(MODEL, 1, {2: 99.9, 3: 0.1})).http[-1]

    assert [(each.headers, each.weight) for each in split.route] == [
        ((("x-lepton-version", "2"),), 9990),
        ((("x-lepton-version", "3"),), 10),
    ]
    assert sum(each.weight for each in split.route) == TOTAL_WEIGHT


def test_a_model_without_traffic_is_answered_by_the_mesh() -> None:
    service = virtual_service(unserved(MODEL))

    assert service.live_pools == frozenset()
    assert service.http[-1].direct_response is not None
    assert service.http[-1].direct_response.status == 503
