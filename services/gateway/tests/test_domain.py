"""Paths, states and sums."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.errors import Invalid, NotFound
from lepton_common.records import Assigned, Loaded, LoadState, Serving, Share, WorkerState
from lepton_gateway.domain import Page, Target, index_of, json_object, summed, target_of, unready_reason

SHA256 = "ab" * 32


@pytest.mark.parametrize(
    ("raw", "target"),
    [
        (b"/v2", Target(Page.SERVER)),
        (b"/v2/", Target(Page.SERVER)),
        (b"/v2/models/m/infer", Target(Page.INFER, "m")),
        (b"/v2/models/m/infer?a=b", Target(Page.INFER, "m")),
        (b"http://host:1/v2/models/m/infer", Target(Page.INFER, "m")),
        (b"/v2/models/a%2Fb%20c/infer", Target(Page.INFER, "a/b c")),
        (b"/v2/models/m/versions/12/infer", Target(Page.INFER, "m", 12)),
        (b"/v2/models/m/versions/12", Target(Page.MODEL, "m", 12)),
        (b"/v2/models/stats", Target(Page.STATS)),
        (b"/v2/models/stats/infer", Target(Page.INFER, "stats")),
        (b"/v2/models/m/trace/setting", Target(Page.TRACE, "m")),
        (b"/v2/repository/models/m/unload", Target(Page.UNLOAD, "m")),
    ],
)
def test_paths_are_understood(raw: bytes, target: Target) -> None:
    assert target_of(raw) == target


@given(st.binary(max_size=60))
def test_any_path_is_understood_or_not_found(raw: bytes) -> None:
    for path in (raw, b"/v2/models/" + raw, b"/v2/models/m/versions/" + raw):
        with suppress(NotFound):
            assert target_of(path).page in Page


def serving(*versions: int) -> Serving:
    return Serving(
        tenant="t",
        model="m",
        generation=1,
        split=tuple(Share(version=version, percent=50) for version in versions[:2]),
        versions=tuple(Assigned(version=version, sha256=SHA256, size_bytes=1) for version in versions),
    )


def worker(name: str, **states: LoadState) -> WorkerState:
    versions = tuple(
        Loaded(tenant="t", model="m", version=int(key[1:]), sha256=SHA256, state=state, reason="why")
        for key, state in states.items()
    )
    return WorkerState(id=name, pool="cpu", address="h:1", device="cpu", versions=versions)


def test_a_model_is_ready_when_all_versions_with_traffic_are() -> None:
    one, two = worker("a", v1=LoadState.READY), worker("b", v2=LoadState.READY, v1=LoadState.FAILED)
    assert unready_reason(serving(1, 2, 3), None, [one, two]) is None
    assert unready_reason(serving(1, 2, 3), None, [one]) is not None
    assert unready_reason(serving(1, 2, 3), 1, [one]) is None
    assert "loading" in str(unready_reason(serving(1, 2, 3), 3, [one, two]))
    assert "why" in str(unready_reason(serving(1), None, [two]))
    assert "not loaded" in str(unready_reason(serving(), None, [one]))
    assert "not loaded" in str(unready_reason(serving(1), 7, [one]))


def test_the_index_shows_the_best_state_of_each_version() -> None:
    workers = [worker("a", v1=LoadState.READY, v2=LoadState.FAILED), worker("b", v1=LoadState.FAILED)]
    assert index_of(serving(2, 1, 3), workers) == [
        {"name": "m", "version": "1", "state": "READY", "reason": ""},
        {"name": "m", "version": "2", "state": "UNAVAILABLE", "reason": "why"},
        {"name": "m", "version": "3", "state": "LOADING", "reason": "no worker has it yet"},
    ]
    assert index_of(serving(), workers) == [{"name": "m", "state": "UNAVAILABLE", "reason": "unloaded"}]


def test_statistics_add_up() -> None:
    def entry(version: str, count: int, sizes: dict[int, int], last: int) -> dict[str, object]:
        return {
            "name": "m",
            "version": version,
            "last_inference": last,
            "inference_count": count,
            "inference_stats": {"success": {"count": count, "ns": 10 * count}},
            "response_stats": {},
            "batch_stats": [{"batch_size": size, "compute_infer": {"count": n, "ns": n}} for size, n in sizes.items()],
            "memory_usage": [],
        }

    total = summed([entry("2", 1, {1: 1}, 5), entry("1", 2, {1: 1, 4: 2}, 9), entry("1", 3, {4: 5, 2: 1}, 7)])
    assert total == [entry("1", 5, {1: 1, 2: 1, 4: 7}, 9), entry("2", 1, {1: 1}, 5)]


def test_documents_are_objects_or_nothing() -> None:
    assert json_object(b"") == json_object(b" {}\n") == {}
    for body in (b"[1]", b"1", b"{", b"\xff", b"null"):
        with pytest.raises(Invalid):
            json_object(body)
