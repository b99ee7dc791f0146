"""An ASGI app as a server of a service: uvicorn, started and drained by `service.run`."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

# Above the idle time-out of the proxies in front, so that they and not we close idle connections.
_KEEP_ALIVE_S = 75


class AppServer(uvicorn.Server):
    """uvicorn inside our loop: the port is bound before it starts, and signals are ours (`service.Server`)."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
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
