"""Which addresses are called, and that it is those that were checked."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.errors import Forbidden, Invalid, LeptonError, Unavailable
from lepton_common.outbound import Outbound, all_public

PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1",
    "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:5ef5:79fd::80ff:fffe",
    "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "100::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_not_called(address: str) -> None:
    assert not all_public([address])


@given(st.lists(st.sampled_from(PUBLIC)), st.sampled_from(PRIVATE), st.lists(st.sampled_from(PUBLIC)))
def test_one_private_address_among_many_is_enough(before: list[str], private: str, after: list[str]) -> None:
    assert not all_public([*before, private, *after])
    assert all_public([*before, *after]) == bool(before or after)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0"])
async def test_a_host_that_means_this_machine_is_refused_however_it_is_written(host: str) -> None:
    # A resolver may know no such name, which is as good.
    with pytest.raises((Forbidden, Unavailable)) as refused:
        async with Outbound().get(host, 443, "/"):
            pass
    assert "127.0.0.1" not in refused.value.message


class Host:
    """An HTTPS server that says one thing, and remembers what it was asked."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.heads: list[bytes] = []
        self.names: list[str | None] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.answer)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def host(ca: trustme.CA, status: str, *headers: str, body: bytes = b"") -> AsyncIterator[Host]:
    head = "\r\n".join([f"HTTP/1.1 {status}", *headers, f"content-length: {len(body)}", "", ""])
    answering = Host(head.encode() + body)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    context.sni_callback = lambda _socket, name, _context: answering.names.append(name)
    server = await asyncio.start_server(answering.serve, "127.0.0.1", ssl=context)
    answering.port = server.sockets[0].getsockname()[1]
    async with server:
        yield answering


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(ca: trustme.CA) -> Outbound:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return Outbound(private=True, tls=context)


async def test_the_host_is_asked_by_its_name_at_the_address_that_was_checked(
    ca: trustme.CA, trusting: Outbound
) -> None:
    async with host(ca, "200 OK", body=b"bytes") as server:
        async with trusting.get("localhost", server.port, "/m.onnx?sig=a%2Fb") as answer:
            assert b"".join([chunk async for chunk in answer.aiter_raw()]) == b"bytes"
        assert server.names == ["localhost"]
        (head,) = server.heads
        assert head.startswith(b"GET /m.onnx?sig=a%2Fb HTTP/1.1\r\n")
        assert f"host: localhost:{server.port}\r\n".encode() in head.lower()


@pytest.mark.parametrize(
    ("status", "header", "kind", "message"),
    [
        ("302 Found", "location: https://10.0.0.1/", Invalid, "answered 302: redirects are not followed"),
        ("404 Not Found", "x: y", Invalid, "answered 404"),
        ("429 Too Many Requests", "x: y", Unavailable, "answered 429"),
        ("503 Service Unavailable", "x: y", Unavailable, "answered 503"),
        ("200 OK", "content-encoding: gzip", Invalid, "sent encoded bytes"),
    ],
)
async def test_any_other_answer_is_an_error(
    ca: trustme.CA, trusting: Outbound, status: str, header: str, kind: type[LeptonError], message: str
) -> None:
    async with host(ca, status, header) as server:
        with pytest.raises(kind, match=message):
            async with trusting.get("localhost", server.port, "/"):
                pass
        assert len(server.heads) == 1


async def test_a_host_whose_certificate_nobody_vouches_for_is_not_asked(ca: trustme.CA) -> None:
    async with host(ca, "200 OK") as server:
        with pytest.raises(Unavailable, match="does not answer, or not over TLS"):
            async with Outbound(private=True).get("localhost", server.port, "/"):
                pass
        assert server.heads == []
