"""HTTP as no well-behaved client would send it."""

import socket
import time
from collections.abc import Iterable

_PATIENCE_S = 20.0


def exchange(port: int, parts: bytes | Iterable[bytes], *, patience_s: float = _PATIENCE_S) -> tuple[int, bytes]:
    """Status and body of the one answer to these bytes, sent part by part until an answer comes.

    (0, b"") when the server closes the connection without one. Raises TimeoutError when it does neither in time.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=patience_s) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in [parts] if isinstance(parts, bytes) else parts:
            try:
                connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break  # Refused before it was all sent: the answer is there to be read.
        return _answer(connection, time.monotonic() + patience_s)


def _answer(connection: socket.socket, deadline: float) -> tuple[int, bytes]:
    data = b""
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        if end:
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            if len(body) >= length:
                return int(head.split(b" ", 2)[1]), body[:length]
        if time.monotonic() > deadline:
            raise TimeoutError(f"no whole answer in time: {data[:200]!r}")
        try:
            received = connection.recv(65536)
        except ConnectionResetError:
            received = b""
        if not received:
            return 0, b""
        data += received


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A whole POST with its Content-Length, unless the headers say otherwise."""
    framed = any(each.lower().startswith(("content-length", "transfer-encoding")) for each in headers)
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        *headers,
        *([] if framed else [f"Content-Length: {len(body)}"]),
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chunked(path: str, body: bytes, size: int) -> Iterable[bytes]:
    """A POST whose body comes in chunks of that size, each sent by itself."""
    yield post(path, b"", "Transfer-Encoding: chunked")
    for start in range(0, len(body), size):
        chunk = body[start : start + size]
        yield b"%x\r\n%b\r\n" % (len(chunk), chunk)
    yield b"0\r\n\r\n"
