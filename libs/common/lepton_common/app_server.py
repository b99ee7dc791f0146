"""An ASGI app as a server of a service: uvicorn, started and drained by `service.run`, with limits it does not have."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Above the idle time-out of the proxies in front, so that they and not we close idle connections.
_KEEP_ALIVE_S = 75
# What a peer may cost, as in `http11.ServerLimits`. Bodies are limited by `web.Edge`.
_MAX_HEADERS = 128
_MAX_HEADER_BYTES = 128 << 10
_HEADER_TIMEOUT_S = 10.0
_WRITE_TIMEOUT_S = 30.0


class Connection(HttpToolsProtocol):
    """uvicorn's, which by itself takes headers without end, and waits for ever for a request and for a reader."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._count = 0
        self._stalled = 0  # bytes read since the message last got anywhere

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._expect(_KEEP_ALIVE_S)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._stalled += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._stalled > _MAX_HEADER_BYTES:
            self.transport.abort()
        elif self._reading is None and self.timeout_keep_alive_task is None and self._is_idle():
            self._expect(_HEADER_TIMEOUT_S)  # What came was no beginning of a request, but ended uvicorn's own timer.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._count = 0
        self._expect(_HEADER_TIMEOUT_S)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count += 1
        if self._count > _MAX_HEADERS:
            raise ValueError("too many headers")  # uvicorn answers 400 and closes.
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._stalled = 0
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._stalled = 0

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _watch_writing(self, unsent_before: float = inf) -> None:
        """The connection is cut unless the peer goes on reading."""
        unsent = self.transport.get_write_buffer_size()
        if unsent < unsent_before:
            self._writing = self.loop.call_later(_WRITE_TIMEOUT_S, self._watch_writing, unsent)
        else:
            self.transport.abort()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect(self, within_s: float) -> None:
        """The connection is closed unless a whole head comes in time."""
        if self._reading is not None:
            self._reading.cancel()
        self._reading = self.loop.call_later(within_s, self.transport.close)


class AppServer(uvicorn.Server):
    """uvicorn inside our loop: the port is bound before it starts, and signals are ours (`service.Server`)."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        super().__init__(config)
        self._socket: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def address(self) -> tuple[str, int]:
        assert self._socket is not None, "not started"
        host, port, *_ = self._socket.getsockname()
        return host, port

    async def start(self, host: str, port: int) -> None:
        self._socket = socket.create_server((host, port), backlog=2048)
        self._serving = asyncio.create_task(self.serve(sockets=[self._socket]))

    async def drain(self, grace_s: float) -> None:
        if self._serving is not None:
            self.config.timeout_graceful_shutdown = int(grace_s)
            self.should_exit = True
            await self._serving

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
