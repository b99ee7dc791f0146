"""Connections to an etcd cluster: one endpoint in use, the next one after a failure, gRPC's errors turned into ours."""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc.aio
from aetcd import rpc

from lepton_common.errors import Conflict, Invalid, Unavailable

REQUIRE_LEADER = (("hasleader", "true"),)  # A member cut off from its cluster ends the stream instead of going quiet.
_OPTIONS = (
    # A dead or frozen peer is noticed within 9 s. Pings more often than every 5 s make etcd hang up.
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
    # Without these gRPC waits up to two minutes before it looks again whether etcd is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)


# Of each line the first release that loses no acknowledged write and has the fixes of 2026 to its authorisation
# (CVE-2026-33413, CVE-2026-33343, GHSA-xg4h-6gfc-h4m8); older lines have none.
_SOUND = {(3, 5): 33, (3, 6): 14, (3, 7): 1}


def is_outdated(version: str) -> bool:
    """Whether an etcd of that version, as `3.6.14` or `3.7.0-rc.1`, lacks fixes that Lepton relies on."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)(-?)", version)
    if numbers is None:
        return True
    line, patch = (int(numbers[1]), int(numbers[2])), int(numbers[3])
    if line > max(_SOUND):
        return False
    return line not in _SOUND or patch < _SOUND[line] or (patch == _SOUND[line] and bool(numbers[4]))


class HistoryLost(Unavailable):
    """etcd no longer has the history a reader was at (compacted, or restored from a backup): list again."""


class LeaseLost(Conflict):
    """The lease is over or may be: whatever it protected belongs to someone else."""


class Cluster:
    """The endpoints `host:port[,host:port]`. Needs a running event loop only once it is used."""

    def __init__(self, endpoints: str, timeout_s: float) -> None:
        self._addresses = [address.strip() for address in endpoints.split(",") if address.strip()]
        if not self._addresses:
            raise Invalid("etcd: expected host:port[,host:port], got nothing")
        self._used = 0
        self._open: dict[str, Endpoint] = {}
        self.timeout_s = timeout_s

    async def call(self, method: "Callable[[Endpoint], Callable[..., Awaitable[Any]]]", request: Any) -> Any:
        """The answer of the endpoint in use, within `timeout_s`."""
        endpoint = self.endpoint()
        with self.failing(endpoint):
            return await method(endpoint)(request, timeout=self.timeout_s)

    async def read(self, request: Any) -> Any:
        """As `call`, of a range: it can be repeated, so a failure goes unnoticed while another endpoint answers."""
        for _ in self._addresses[1:]:
            with contextlib.suppress(Unavailable):
                return await self.call(lambda to: to.range, request)
        return await self.call(lambda to: to.range, request)

    async def close(self) -> None:
        """Every connection is closed; calls still running are cancelled."""
        endpoints, self._open = list(self._open.values()), {}
        for endpoint in endpoints:
            await endpoint.channel.close()

    def endpoint(self) -> "Endpoint":
        """The endpoint in use."""
        address = self._addresses[self._used % len(self._addresses)]
        if address not in self._open:
            self._open[address] = Endpoint(address)
        return self._open[address]

    @contextlib.contextmanager
    def failing(self, endpoint: "Endpoint") -> Iterator[None]:
        """gRPC's errors become ours. After one that is the endpoint's fault the next call goes to the next endpoint."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            match error.code():
                case grpc.StatusCode.OUT_OF_RANGE:
                    raise HistoryLost("etcd has compacted this revision") from error
                case grpc.StatusCode.NOT_FOUND:
                    raise LeaseLost("etcd no longer has the lease") from error
            self._leave(endpoint)
            raise Unavailable(f"etcd is not available ({error.code().name.lower()})") from error
        # Of a stream: no answer in time, or written to after it broke.
        except (TimeoutError, asyncio.InvalidStateError) as error:
            self._leave(endpoint)
            raise Unavailable("etcd is not available (no answer)") from error
        except Unavailable as error:
            if not isinstance(error, HistoryLost):
                self._leave(endpoint)
            raise

    def _leave(self, endpoint: "Endpoint") -> None:
        # Only once, however many calls fail together.
        if self._open.get(self._addresses[self._used % len(self._addresses)]) is endpoint:
            self._used += 1


class Endpoint:
    """One member of the cluster: its channel and the calls used here."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        kv, lease = rpc.KVStub(self.channel), rpc.LeaseStub(self.channel)
        self.range, self.put, self.delete, self.txn = kv.Range, kv.Put, kv.DeleteRange, kv.Txn
        self.grant, self.revoke, self.keep_alive = lease.LeaseGrant, lease.LeaseRevoke, lease.LeaseKeepAlive
        self.watch = rpc.WatchStub(self.channel).Watch
        self.status = rpc.MaintenanceStub(self.channel).Status


def heard(answer: Any) -> Any:
    """A stream's message. The end of the stream and a cancelled watch are errors, however politely they are said."""
    if answer is grpc.aio.EOF:
        raise Unavailable("etcd ended the stream")
    if getattr(answer, "canceled", False):
        if answer.compact_revision:
            raise HistoryLost("etcd has compacted this revision")
        raise Unavailable(f"etcd cancelled the watch: {answer.cancel_reason}")
    return answer
