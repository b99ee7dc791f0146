"""What is noted of callers: everything is counted, and no flood makes it grow."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st
from lepton_common.errors import Denied, Forbidden, Unauthenticated
from lepton_common.journal import Journal, origin

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_equal_refusals_are_told_once_with_their_number() -> None:
    journal = Journal()
    for _ in range(5):
        journal.refused(Forbidden("no scope", tenant="acme", key_id="k1"), "10.0.0.7", "GET /v1/models")
    journal.refused(Unauthenticated("unknown API key"), "10.0.0.7", "GET /v1/keys")
    known, unknown = journal.take_refusals("registry")
    assert (known.tenant, known.key, known.status, known.count, known.subject) == ("acme", "k1", 403, 5, "k1")
    assert (known.what, known.service, known.peer) == ("GET /v1/models", "registry", "10.0.0.7")
    assert (unknown.tenant, unknown.key, unknown.status, unknown.count) == ("default", "", 401, 1)
    assert journal.take_refusals("registry") == []


@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), max_size=2000))
def test_a_flood_is_counted_to_the_last_one_in_bounded_space(flood: list[tuple[int, bool]]) -> None:
    journal = Journal()
    for number, known in flood:
        error: Denied = Forbidden("no", tenant="acme", key_id=f"k{number}") if known else Unauthenticated(f"{number}")
        journal.refused(error, f"10.0.0.{number % 7}", "x" * 5000)
    told = journal.take_refusals("gateway")
    assert sum(each.count for each in told) == len(flood)
    assert len(told) <= 202
    assert all(len(each.what) <= 200 for each in told)


def test_last_uses_are_told_by_tenant_and_only_of_keys_that_are_there() -> None:
    journal = Journal()
    for number in range(2500):
        journal.used[f"k{number}"] = NOW + timedelta(seconds=number)
    journal.used["oidc-1"] = journal.used["other"] = journal.used[""] = NOW
    told = journal.take_uses({**{f"k{number}": "acme" for number in range(2500)}, "other": "other"})
    assert sorted((each.tenant, len(each.keys)) for each in told) == [
        *(("acme", 500), ("acme", 1000), ("acme", 1000)),
        ("other", 1),
    ]
    assert {key: at for each in told for key, at in each.keys.items()}["k7"] == NOW + timedelta(seconds=7)
    assert journal.take_uses({"k1": "acme"}) == []


def test_where_somebody_calls_from_is_what_the_peer_claims_and_who_it_is() -> None:
    assert origin("10.0.0.7", None) == "10.0.0.7"
    assert origin("127.0.0.1", b"1.2.3.4, 10.0.0.7") == "10.0.0.7 by 127.0.0.1"
    assert origin("127.0.0.1", b"<script>\xff") == "127.0.0.1"
