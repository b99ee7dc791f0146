"""The response cache: what is kept, for whom, for how long, and what is never answered from it."""

from collections import OrderedDict
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.http11 import JSON, Request
from lepton_common.records import Cache, KeyLimits, Scope, Serving, Shadow, Share, Sticky, VersionMatch
from lepton_gateway.answers import Answer
from lepton_gateway.answers import request as request_of
from lepton_gateway.cache import Answers, Kept, Memory, key_of, sole_version
from lepton_gateway.flights import CacheCounts, ResponseCache

from .lab import Lab, counted, error_of

INFER = "/v2/models/m/infer"
ON = Cache(ttl_s=60, max_bytes=10_000)


# --- the pure part ----------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("keep"), st.integers(0, 5), st.integers(0, 900)),
        st.tuples(st.just("find"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("wait"), st.integers(1, 7), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_it_keeps_what_was_used_last_for_its_time_and_never_more_than_its_bytes(
    steps: Sequence[tuple[str, int, int]],
) -> None:
    clock, memory = Clock(), Memory(10**6)
    answers = Answers(Cache(ttl_s=10, max_bytes=3000), memory, clock)
    model: OrderedDict[int, tuple[float, Kept]] = OrderedDict()
    for what, number, size in steps:
        if what == "wait":
            clock.now += number
        elif what == "keep":
            kept = Kept(b"", bytes(size))
            answers.keep(b"%d" % number, kept)
            model.pop(number, None)
            model[number] = (clock.now, kept)
            while sum(each.size_bytes for _, each in model.values()) > 3000:
                model.popitem(last=False)
        else:
            kept_at, expected = model.get(number, (-1e9, None))
            if clock.now - kept_at >= 10:
                model.pop(number, None)
                expected = None
            else:
                model.move_to_end(number)
            assert answers.find(b"%d" % number) is expected
        assert answers.used_bytes == memory.used_bytes == sum(each.size_bytes for _, each in model.values())
    answers.close()
    assert memory.used_bytes == 0


def test_models_share_one_memory_and_give_it_back() -> None:
    memory = Memory(1000)
    one, other = Answers(ON, memory), Answers(ON, memory)
    one.keep(b"a", Kept(b"", bytes(500)))
    other.keep(b"b", Kept(b"", bytes(500)))
    assert (one.find(b"a") is not None, other.find(b"b")) == (True, None)
    one.close()
    one.keep(b"a", Kept(b"", bytes(1)))
    other.keep(b"b", Kept(b"", bytes(500)))
    assert (one.find(b"a"), other.find(b"b") is not None) == (None, True)


parts = st.tuples(st.sampled_from([1, 2, 12]), st.binary(max_size=3), st.binary(max_size=3), st.binary(max_size=3))


@given(parts, parts)
def test_equal_keys_are_of_equal_requests(
    one: tuple[int, bytes, bytes, bytes], other: tuple[int, bytes, bytes, bytes]
) -> None:
    def key(version: int, kind: bytes, length: bytes, body: bytes) -> bytes:
        headers = {b"content-type": kind, b"inference-header-content-length": length, b"x-request-id": body}
        return key_of(version, request_of("POST", b"/", headers, body, lambda answer: None))

    assert (key(*one) == key(*other)) == (one == other)


ALL = Serving(tenant="acme", model="m", generation=1, stable=1, split=(Share(version=1, percent=100),))


@pytest.mark.parametrize(
    "moved",
    [
        {"split": ()},
        {"split": (Share(version=1, percent=99), Share(version=2, percent=1))},
        {"split": (Share(version=2, percent=100),)},  # judged until it is the stable one
        {"shadow": Shadow(version=2, percent=1)},
        {"sticky": Sticky(by="key")},
        {"matches": (VersionMatch(header="x", value="y", version=2),)},
        {"forwarded": ("x",)},
    ],
)
def test_while_a_rollout_moves_traffic_no_version_is_known_before_it_answers(moved: dict[str, object]) -> None:
    assert sole_version(ALL) == 1
    assert sole_version(ALL.model_copy(update=moved)) is None


# --- callers who ask at once ------------------------------------------------------------------------------------------


class Callers:
    """Callers of a model whose cache is on; `asked` are the questions to the model."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.answers: dict[int, Answer] = {}
        self.counts = CacheCounts()
        self.cache = ResponseCache(ALL.model_copy(update={"cache": ON}), Memory(10_000), self.counts)

    def call(self, number: int, headers: dict[bytes, bytes] | None = None) -> Request:
        def then(answer: Answer) -> None:
            self.answers[number] = answer

        request = request_of("POST", b"/v2/models/m/infer", headers or {}, b"{}", then)
        assert self.cache.answer(request, None, self.asked.append)
        return request

    def told(self) -> dict[int, tuple[int, bytes]]:
        return {number: (each.status, each.headers[b"x-lepton-cache"]) for number, each in self.answers.items()}


def leave(request: Request) -> None:
    assert request.on_disconnect is not None
    request.on_disconnect()


ANSWERED = JSON + b"x-lepton-version: 1\r\n"


def test_who_asks_the_same_at_once_waits_for_one_answer_though_the_first_leaves() -> None:
    callers = Callers()
    first, *_ = (callers.call(number) for number in range(3))
    leave(first)
    (question,) = callers.asked
    question.respond(200, ANSWERED, b"{}")
    callers.call(3)
    assert callers.told() == {1: (200, b"miss"), 2: (200, b"hit"), 3: (200, b"hit")}
    assert len(callers.asked) == 1
    lookups = callers.counts.by_version[1]
    assert (lookups.hits, lookups.misses) == (2, 1)


def test_when_all_have_left_the_model_is_told_and_the_next_asks_anew() -> None:
    callers, told = Callers(), list[bool]()
    one, other = callers.call(0), callers.call(1)
    callers.asked[0].on_disconnect = lambda: told.append(True)
    leave(one)
    assert not told
    leave(other)
    assert told == [True]
    callers.call(2)
    assert len(callers.asked) == 2
    callers.asked[0].respond(200, ANSWERED, b"{}")  # Too late: nobody waits for this one.
    assert callers.answers == {}


def test_a_failure_is_one_callers_own_and_the_others_ask_in_the_time_they_have_left() -> None:
    callers = Callers()
    for number in range(3):
        callers.call(number, {b"x-request-timeout-ms": b"20000"})
    callers.asked[0].respond(503, JSON, b'{"error":"full"}')
    assert callers.told() == {0: (503, b"miss")}
    assert [question.headers.keys() for question in callers.asked[1:]] == [{b"x-request-timeout-ms"}] * 2
    assert all(0 < int(question.headers[b"x-request-timeout-ms"]) <= 20_000 for question in callers.asked[1:])
    for question in callers.asked[1:]:
        question.respond(200, ANSWERED, b"{}")
    assert callers.told() == {0: (503, b"miss"), 1: (200, b"miss"), 2: (200, b"miss")}


def test_who_has_another_deadline_asks_for_themselves() -> None:
    callers = Callers()
    callers.call(0, {b"x-request-timeout-ms": b"1"})
    callers.call(1)
    assert len(callers.asked) == 2


def test_an_answer_that_comes_after_the_record_changed_is_passed_on_and_not_kept() -> None:
    callers = Callers()
    callers.call(0)
    callers.cache.close()
    callers.asked[0].respond(200, ANSWERED, b"{}")
    callers.call(1)
    assert (list(callers.answers), len(callers.asked)) == ([0], 2)


# --- the gateway ------------------------------------------------------------------------------------------------------


async def test_equal_requests_ask_once_and_a_changed_record_asks_again(lab: Lab) -> None:
    await cached(lab, 7)
    answers = [await lab.client.post(INFER, content=b"{}") for _ in range(2)]
    assert [each.headers["x-lepton-cache"] for each in answers] == ["miss", "hit"]
    assert answers[0].content == answers[1].content
    assert answers[1].headers["x-lepton-version"] == "1"
    asked = len(lab.mesh.requests)
    named = await lab.client.post("/v2/models/m/versions/1/infer", content=b"{}")
    assert (named.headers["x-lepton-cache"], len(lab.mesh.requests)) == ("hit", asked)
    assert (await lab.client.post(INFER, content=b"{ }")).headers["x-lepton-cache"] == "miss"
    # What the model was not asked says nothing about it.
    assert counted(lab.windows.told("m"))[1, False, "ok"] == 2
    metrics = await lab.metrics()
    assert 'lepton_gateway_cache_hits_total{model="m",tenant="acme",version="1"} 2.0' in metrics
    assert 'lepton_gateway_cache_misses_total{model="m",tenant="acme",version="1"} 2.0' in metrics
    await cached(lab, 8)
    assert (await lab.client.post(INFER, content=b"{}")).headers["x-lepton-cache"] == "miss"


async def test_a_key_with_limits_of_its_own_asks_the_model_where_they_are_counted(lab: Lab) -> None:
    await cached(lab, 7)
    key = await lab.new_key(Scope.INFER, limits=KeyLimits(per_day=2))
    await lab.until("/v2/models/m/ready", 200, key=key)
    answers = [await lab.client.post(INFER, headers={"authorization": f"Bearer {key}"}) for _ in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    assert "x-lepton-cache" not in answers[1].headers


async def test_only_the_expected_versions_200_is_kept(lab: Lab) -> None:
    await cached(lab, 7)
    lab.mesh.handler = lambda request: request.respond(400, JSON, b'{"error":"no"}')
    assert error_of(await lab.client.post(INFER)) == "no"
    # The mesh moves before the record does.
    lab.mesh.handler = lambda request: request.respond(200, JSON + b"x-lepton-version: 2\r\n", b"{}")
    answer = await lab.client.post(INFER)
    assert (answer.headers["x-lepton-version"], answer.headers["x-lepton-cache"]) == ("2", "miss")
    asked = len(lab.mesh.requests)
    await lab.client.post(INFER)
    assert len(lab.mesh.requests) == asked + 1


async def cached(lab: Lab, other: int) -> None:
    """The model's cache is on, and the gateway knows: it has heard of the other version in the same record."""
    await lab.serve("m", 1, other, cache=ON)
    await lab.until(f"/v2/models/m/versions/{other}/ready", 503)
