"""Properties of the HTTP/2 server's reading: any chopping, any mutation, whatever the frames are."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from lepton_common.http2 import ServerLimits, literal
from lepton_common.http2_frames import PREFACE, Flag, Kind, frame, settings_frame, window_frame

from .http2_peers import HEADERS, Talk

LIMITS = ServerLimits(max_header_bytes=1000, stream_window=70_000, connection_window=100_000)
BLOCK = b"".join(literal(name.encode(), value.encode()) for name, value in HEADERS)
INDEXED = BLOCK + b"\x40\x03x-a\x01b"  # into the table
KNOWN = BLOCK + b"\xbe"  # out of it


def requests(number: int, body: bytes, block: bytes) -> st.SearchStrategy[bytes]:
    """The frames of one request in one of the forms that all mean the same."""
    whole, half = Flag.END_HEADERS, len(block) // 2
    heads = [
        frame(Kind.HEADERS, whole, number, block),
        frame(Kind.HEADERS, whole | Flag.PADDED, number, b"\x03" + block + bytes(3)),
        frame(Kind.HEADERS, whole | Flag.PRIORITY, number, bytes(5) + block),
        frame(Kind.HEADERS, 0, number, block[:half]) + frame(Kind.CONTINUATION, whole, number, block[half:]),
    ]
    bodies = [
        frame(Kind.DATA, Flag.END_STREAM, number, body),
        frame(Kind.DATA, 0, number, body) + frame(Kind.DATA, Flag.END_STREAM, number),
        frame(Kind.DATA, Flag.END_STREAM | Flag.PADDED, number, b"\x02" + body + bytes(2)),
        frame(Kind.DATA, 0, number, body)
        + frame(Kind.HEADERS, whole | Flag.END_STREAM, number, literal(b"x-last", b"1")),
    ]
    between = [
        b"",
        frame(Kind.PING, 0, 0, b"pingpong"),
        window_frame(0, 500),
        frame(Kind.PRIORITY, 0, number, bytes(5)),
    ]
    return st.builds(
        lambda *parts: b"".join(parts), *(st.sampled_from(each) for each in (heads, between, bodies, between))
    )


@st.composite
def talks(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, str, bytes]]]:
    """What a client sends, and what the server's handler must see."""
    bodies = draw(st.lists(st.binary(max_size=40), min_size=1, max_size=5))
    blocks = [INDEXED, *(draw(st.sampled_from([BLOCK, KNOWN])) for _ in bodies[1:])]
    sent = [draw(requests(1 + 2 * i, body, blocks[i])) for i, body in enumerate(bodies)]
    seen = [(1 + 2 * i, "ended", body) for i, body in enumerate(bodies)]
    return PREFACE + settings_frame({}) + b"".join(sent), seen


def chopped(data: bytes, cuts: list[int]) -> list[bytes]:
    return [data[a:b] for a, b in pairwise(sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)}))]


def fed(pieces: list[bytes]) -> Talk:
    talk = Talk(limits=LIMITS)
    for piece in pieces:
        talk.connection.data_received(piece)
        talk.connection.sweep(talk.server.now)
    talk.connection.sender.flush()
    return talk


@given(talks(), st.lists(st.integers(min_value=0), max_size=12))
async def test_any_chopping_of_the_bytes_gives_the_same_requests(
    case: tuple[bytes, list[tuple[int, str, bytes]]], cuts: list[int]
) -> None:
    sent, expected = case
    talk = fed(chopped(sent, cuts))
    assert talk.seen == expected
    assert not talk.transport.ended
    whole = fed([sent])
    assert whole.transport.written == talk.transport.written


MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3), st.integers(0, 12)), min_size=1
)


@given(talks(), MUTATIONS)
async def test_mutated_bytes_raise_nothing_and_no_request_ends_twice(
    case: tuple[bytes, list[tuple[int, str, bytes]]], mutations: list[tuple[float, bytes, int]]
) -> None:
    sent = case[0]
    for where, insert, drop in mutations:
        at = len(PREFACE) + int(where * (len(sent) - len(PREFACE)))
        sent = sent[:at] + insert + sent[at + drop :]
    talk = fed(chopped(sent, list(range(0, len(sent), 11))))
    judge(talk)


@given(
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 255), st.integers(0, 5), st.binary(max_size=60)), max_size=30)
)
async def test_frames_of_any_kind_in_any_order_raise_nothing(frames: list[tuple[int, int, int, bytes]]) -> None:
    start = PREFACE + frame(Kind.HEADERS, Flag.END_HEADERS, 1, BLOCK)
    talk = fed([start, *(frame(*each) for each in frames)])
    judge(talk)


def judge(talk: Talk) -> None:
    """Every request was told its end at most once, and none of what it held is left when the peer is gone."""
    told: list[str] = []
    talk.server.loop.set_exception_handler(lambda loop, context: told.append(context["message"]))
    talk.connection.connection_lost(None)
    assert told == []
    ends = [number for number, _, _ in talk.seen]
    assert len(ends) == len(set(ends))
    assert not talk.connection.receiver.streams
    assert talk.server.unsent_bytes == 0
