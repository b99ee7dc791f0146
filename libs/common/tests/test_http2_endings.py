"""What the HTTP/2 server gives its time to, and how it ends."""

from h2.settings import SettingCodes
from lepton_common.http2 import Code, ServerLimits, literal
from lepton_common.http2_frames import (
    Flag,
    Kind,
    frame,
    goaway_frame,
)

from .http2_peers import Talk

BEGUN = [(1, "lost", b"")]


# --- time ---


async def test_a_preface_and_headers_have_their_time() -> None:
    silent, slow = Talk(), Talk()
    slow.pass_on()
    slow.connection.data_received(frame(Kind.HEADERS, 0, 1, b""))
    for _ in range(12):
        silent.at(1)
        slow.at(1)
        if not slow.transport.ended:
            slow.connection.data_received(frame(Kind.CONTINUATION, 0, 1, b"\x00"))
    assert silent.transport.aborted
    assert slow.transport.aborted


async def test_a_body_has_its_time_where_one_is_awaited() -> None:
    talk = Talk()
    for number in (1, 3):
        talk.begin(number)
    talk.pass_on()
    talk.connection.receiver.streams[1].await_body()
    for _ in range(59):
        talk.client.send_data(1, b"x")
        talk.client.send_data(3, b"x")
        talk.pass_on()
        talk.at(1)
    assert talk.seen == []
    talk.at(2)
    talk.pass_on()
    assert talk.seen == [(1, "lost", b"x" * 59)]
    assert ("reset 8", 1) in talk.story
    assert list(talk.connection.receiver.streams) == [3]


async def test_an_answer_that_is_not_taken_is_dropped_and_one_that_is_taken_slowly_is_not() -> None:
    talk = Talk()
    talk.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
    for number in (1, 3):
        talk.request(number, bytes(1000))
    talk.pass_on()
    for _ in range(4):
        talk.at(20)
        talk.client.increment_flow_control_window(10, 3)
        talk.pass_on()
    assert list(talk.connection.receiver.streams) == [3]
    assert talk.bodies == {1: 10, 3: 50}
    assert talk.server.unsent_bytes == 950


async def test_a_peer_that_is_gone_without_a_word_is_found_out() -> None:
    here, gone = Talk(), Talk()
    for talk in (here, gone):
        talk.begin(1)
        talk.pass_on()
        talk.at(0.1)
    for _ in range(100):
        here.at(1)
        here.pass_on()
        gone.at(1)
    assert gone.transport.aborted
    gone.connection.connection_lost(None)
    assert gone.seen == BEGUN
    assert list(here.connection.receiver.streams) == [1]


async def test_a_peer_that_does_not_read_is_cut_off() -> None:
    talk = Talk()
    talk.request(1, b"x")
    talk.pass_on()
    talk.transport.unread = 100_000
    talk.connection.pause_writing()
    for _ in range(35):
        talk.at(1)
    assert talk.transport.aborted


async def test_those_who_take_nothing_lose_first_when_too_much_is_held_for_all() -> None:
    talk = Talk(limits=ServerLimits(max_unsent_bytes=1500))
    talk.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    for number in (1, 3):
        talk.request(number, bytes(1000))
        talk.pass_on()
        talk.server.now += 1
    talk.server._shed()
    assert list(talk.connection.receiver.streams) == [3]
    assert talk.server.unsent_bytes == 1000


# --- the end ---


async def test_leaving_answers_what_was_on_its_way_and_closes() -> None:
    talk = Talk()
    talk.begin(1)
    talk.pass_on()
    talk.connection.leave()
    talk.connection.sender.flush()
    ping = frame(Kind.PING, 0, 0, b"leaving\0")
    assert talk.transport.written == goaway_frame(2**31 - 1, Code.NO_ERROR, "") + ping
    talk.request(
        3, b"on its way"
    )  # Sent before the farewell is read, so the client, which does not wait, never reads it.
    talk.connection.data_received(talk.client.data_to_send() + frame(Kind.PING, Flag.ACK, 0, b"leaving\0"))
    talk.connection.sender.flush()
    assert talk.seen == [(3, "ended", b"on its way")]
    assert goaway_frame(3, Code.NO_ERROR, "") in talk.transport.written
    assert not talk.is_over()
    talk.begin(5, ends=True)  # It knew.
    talk.client.send_data(1, b"the last", end_stream=True)
    talk.connection.data_received(talk.client.data_to_send())
    assert talk.is_over()
    assert talk.seen[1:] == [(1, "ended", b"the last")]


async def test_a_peer_that_does_not_answer_the_farewell_is_left_behind() -> None:
    talk = Talk()
    talk.pass_on()
    talk.connection.leave()
    for _ in range(30):
        talk.at(0.2)
    assert talk.transport.aborted


async def test_a_half_closed_peer_gets_its_answer() -> None:
    talk = Talk()
    talk.server.handler = lambda stream: None
    talk.begin(1, ends=True)
    talk.begin(3)
    talk.pass_on()
    first = talk.connection.receiver.streams[1]
    assert talk.connection.eof_received()
    assert list(talk.connection.receiver.streams) == [1]
    first.reply(b"\x88", b"answer", literal(b"grpc-status", b"0"))
    assert talk.transport.ended
    assert b"answer" in talk.transport.written
