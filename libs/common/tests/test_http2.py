"""The HTTP/2 server against the `h2` library: what it answers, what it bounds, and how it ends."""

import gc
import weakref

import pytest
from h2.settings import SettingCodes
from lepton_common.http2 import Code, ServerLimits, Sink, Stream, literal
from lepton_common.http2_frames import (
    PREFACE,
    Flag,
    Kind,
    frame,
    reset_frame,
    settings_frame,
    window_frame,
)

from .http2_peers import HEADERS, Echo, Talk

BEGUN = [(1, "lost", b"")]


async def test_an_answer_has_a_head_a_body_and_trailers() -> None:
    talk = Talk()
    talk.request(1, b"hello")
    talk.pass_on()
    assert talk.story == [("head", 1), ("trailers", 1), ("end", 1)]
    assert talk.seen == [(1, "ended", b"hello")]
    assert talk.bodies[1] == 5
    assert not talk.connection.receiver.streams


async def test_a_large_body_passes_both_ways_through_small_windows() -> None:
    talk = Talk(limits=ServerLimits(stream_window=70_000, connection_window=100_000))
    talk.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    talk.begin(1)
    body = bytes(1_000_000)
    sent = 0
    while sent < len(body):
        talk.pass_on()
        size = min(talk.client.local_flow_control_window(1), 16_384, len(body) - sent)
        assert size > 0, "the server opens its window again"
        talk.client.send_data(1, body[sent : sent + size])
        sent += size
    talk.client.end_stream(1)
    talk.pass_on()
    assert talk.bodies[1] == 1000
    assert talk.connection.server.unsent_bytes == 999_000
    while talk.bodies[1] < len(body):
        before = talk.bodies[1]
        talk.client.increment_flow_control_window(50_000, 1)
        talk.client.increment_flow_control_window(50_000)
        talk.pass_on()
        assert before < talk.bodies[1] <= before + 50_000
    assert talk.story[-2:] == [("trailers", 1), ("end", 1)]
    assert talk.connection.server.unsent_bytes == 0


async def test_padding_is_given_back_to_the_window() -> None:
    talk = Talk(limits=ServerLimits(stream_window=70_000))
    talk.begin(1)
    for _ in range(2000):
        talk.pass_on()
        talk.client.send_data(1, b"x", pad_length=200)
    talk.client.end_stream(1)
    talk.pass_on()
    assert talk.seen == [(1, "ended", b"x" * 2000)]


async def test_answers_share_the_connection_in_turn() -> None:
    talk = Talk()
    talk.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
    for number in (1, 3):
        talk.begin(number)
        for _ in range(6):
            talk.client.send_data(number, bytes(10_000))
            talk.pass_on()
    for number in (1, 3):
        talk.client.end_stream(number)
    talk.pass_on()
    assert talk.bodies[1] + talk.bodies[3] == 65_535
    assert abs(talk.bodies[1] - talk.bodies[3]) <= 32_768 or talk.bodies[1] == 60_000


async def test_trailers_of_a_request_end_it() -> None:
    talk = Talk()
    talk.begin(1)
    talk.client.send_data(1, b"body")
    talk.client.send_headers(1, [("x-last", "1")], end_stream=True)
    talk.pass_on()
    assert talk.seen == [(1, "ended", b"body")]


@pytest.mark.parametrize("late", ["data", "trailers", "window", "reset"])
async def test_what_was_on_its_way_when_a_stream_was_given_up_is_no_mistake(late: str) -> None:
    talk = Talk()
    talk.begin(1)
    talk.pass_on()
    talk.connection.receiver.streams[1].reply(b"\x88", b"", literal(b"grpc-status", b"8"))
    late_frames = {
        "data": frame(Kind.DATA, 0, 1, b"late"),
        "trailers": frame(Kind.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, 1, literal(b"x", b"y")),
        "window": window_frame(1, 5000),
        "reset": reset_frame(1, Code.CANCEL),
    }
    talk.pass_on(late_frames[late])
    talk.request(3, b"next")
    talk.pass_on()
    assert talk.seen == [(3, "ended", b"next")]
    assert not talk.transport.ended
    assert ("reset 0", 1) in talk.story


async def test_data_after_the_end_costs_the_stream_and_not_the_connection() -> None:
    talk = Talk()
    talk.request(1, b"x")
    talk.pass_on()
    talk.pass_on(frame(Kind.DATA, 0, 1, b"more"))
    talk.request(3, b"next")
    talk.pass_on()
    assert talk.seen[-1] == (3, "ended", b"next")


async def test_more_streams_than_allowed_are_refused_for_a_retry() -> None:
    talk = Talk(limits=ServerLimits(max_streams=2))
    talk.pass_on()
    head = b"".join(literal(name.encode(), value.encode()) for name, value in HEADERS)
    talk.connection.data_received(b"".join(frame(Kind.HEADERS, Flag.END_HEADERS, each, head) for each in (1, 3, 5)))
    talk.connection.sender.flush()
    assert reset_frame(5, Code.REFUSED_STREAM) in talk.transport.written


async def test_headers_that_are_too_large_cost_their_stream_only() -> None:
    talk = Talk(limits=ServerLimits(max_header_bytes=4000))
    talk.begin(1, ends=True, more=[("x-large", "a" * 3000), ("x-larger", "b" * 3000)])
    talk.request(3, b"next")
    talk.pass_on()
    assert ("reset 11", 1) in talk.story
    assert talk.seen == [(3, "ended", b"next")]


@pytest.mark.parametrize(
    "block",
    [
        literal(b":method", b"POST"),
        literal(b"x", b"y") + literal(b":method", b"POST"),
        b"".join(literal(n.encode(), v.encode()) for n, v in HEADERS) + literal(b"X-Upper", b"1"),
        b"".join(literal(n.encode(), v.encode()) for n, v in HEADERS) + literal(b"connection", b"close"),
        b"".join(literal(n.encode(), v.encode()) for n, v in HEADERS) + literal(b"x", b"a\r\nb: c"),
        b"".join(literal(n.encode(), v.encode()) for n, v in HEADERS) + literal(b"content-length", b"5"),
    ],
)
async def test_a_head_that_is_no_requests_is_refused(block: bytes) -> None:
    talk = Talk()
    talk.begin(1)  # So that the client knows of it.
    talk.client.data_to_send()
    start = PREFACE + settings_frame({})
    talk.pass_on(start + frame(Kind.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, 1, block))
    assert talk.story == [("reset 1", 1)]
    assert not any(what == "ended" for _, what, _ in talk.seen)


FLOODS = {
    "pings": frame(Kind.PING, 0, 0, bytes(8)),
    "settings": settings_frame({}),
    "acknowledgements": frame(Kind.SETTINGS, Flag.ACK, 0),
    "priorities": frame(Kind.PRIORITY, 0, 1, bytes(5)),
    "unknown frames": frame(0xBE, 0, 0, b""),
    "empty data": frame(Kind.DATA, 0, 1, b""),
    "window dribble": window_frame(0, 1),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_of_frames_that_carry_nothing_ends_the_connection(flood: str) -> None:
    talk = Talk()
    talk.begin(1)
    talk.pass_on()
    talk.connection.data_received(FLOODS[flood] * 10_001)
    assert talk.transport.ended
    assert talk.seen == BEGUN
    assert b"too many frames" in talk.transport.written


async def test_beginning_and_giving_up_over_and_over_ends_the_connection() -> None:
    talk = Talk()
    talk.pass_on()
    begun = 0
    while not talk.transport.ended and begun < 5000:
        number = 1 + 2 * begun
        talk.begin(number)
        talk.client.reset_stream(number, 8)
        talk.connection.data_received(talk.client.data_to_send())
        begun += 1
    assert 1024 < begun < 2000  # All that a proxy's callers may have open, at once; not much more.


async def test_continuations_without_end_are_cut_off() -> None:
    talk = Talk()
    talk.pass_on()
    talk.connection.data_received(frame(Kind.HEADERS, 0, 1, b""))
    talk.connection.data_received(frame(Kind.CONTINUATION, 0, 1, bytes(16_000)) * 5)
    assert talk.transport.ended
    assert not talk.seen


async def test_a_header_bomb_is_not_unpacked() -> None:
    talk = Talk()
    talk.pass_on()
    bomb = b"\x40\x01x\x7f\x81\x1e" + b"y" * 4096 + b"\xbe" * 10_000  # one entry of 4 KB, ten thousand times
    talk.connection.data_received(frame(Kind.HEADERS, Flag.END_HEADERS, 1, bomb[:16_384]))
    assert talk.transport.ended
    assert not talk.seen


async def test_a_settings_frame_of_many_windows_counts_once_and_one_too_large_ends_all() -> None:
    talk = Talk()
    talk.begin(1)
    talk.pass_on()
    windows = b"".join(b"\x00\x04" + size.to_bytes(4, "big") for size in range(1, 2001))
    talk.connection.data_received(frame(Kind.SETTINGS, 0, 0, windows))
    assert talk.connection.receiver.streams[1].send_window == 2000
    talk.connection.data_received(frame(Kind.SETTINGS, 0, 0, b"\x00\x04\xff\xff\xff\xff"))
    assert talk.transport.ended


@pytest.mark.parametrize("number", [0, 1])
async def test_a_window_cannot_grow_past_its_limit(number: int) -> None:
    talk = Talk()
    talk.begin(1)
    talk.pass_on()
    talk.connection.data_received(window_frame(number, 2**31 - 1))
    assert talk.transport.ended is (number == 0)
    assert talk.seen == BEGUN


async def test_a_peer_that_sends_more_than_its_window_loses_the_stream() -> None:
    talk = Talk(limits=ServerLimits(stream_window=100_000))
    talk.server.handler = lambda stream: None
    talk.begin(1)
    talk.pass_on()
    talk.pass_on(frame(Kind.DATA, 0, 1, bytes(16_384)) * 7)
    assert ("reset 3", 1) in talk.story
    assert not talk.transport.ended


async def test_a_handlers_mistake_costs_its_own_request() -> None:
    talk = Talk()
    told: list[str] = []
    talk.server.loop.set_exception_handler(lambda loop, context: told.append(context["message"]))
    plain = talk.server.handler

    def handler(stream: Stream) -> Sink | None:
        if stream.id == 1:
            raise ValueError("a mistake")
        return plain(stream)

    talk.server.handler = handler
    talk.request(1, b"")
    talk.request(3, b"fine")
    talk.pass_on()
    assert told == ["handler of /echo failed"]
    assert ("reset 2", 1) in talk.story
    assert talk.seen == [(3, "ended", b"fine")]


async def test_an_answered_request_is_gone_without_the_garbage_collector() -> None:
    talk = Talk()
    sinks: list[weakref.ref[Sink]] = []

    def handler(stream: Stream) -> Sink:
        sink = Echo(stream, talk.seen)
        sinks.append(weakref.ref(sink))
        return sink

    talk.server.handler = handler
    gc.disable()
    try:
        talk.request(1, b"large")
        talk.pass_on()
        assert sinks[0]() is None
    finally:
        gc.enable()
