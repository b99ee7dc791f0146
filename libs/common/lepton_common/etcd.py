"""etcd, the small live state that many watch: calls with deadlines, watch streams that end loudly, leases that fence.

`mirror.py` keeps a prefix in memory on top of this. When etcd cannot be reached or does not answer, every call raises
Unavailable in bounded time and the next one goes to the next endpoint.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import structlog
from aetcd import rpc

from lepton_common.errors import Conflict, LeptonError, TooLarge, Unavailable
from lepton_common.etcd_cluster import REQUIRE_LEADER, Cluster, HistoryLost, LeaseLost, heard, is_outdated

MAX_VALUE_BYTES = 64 * 1024

_KEYS_A_PAGE = 500
_ASK_VERSION_EVERY_S = 1.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Versioned:
    """A key's value. `create_revision` is that of the key's present life, 0 < create_revision <= mod_revision."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int


@dataclass(frozen=True, slots=True)
class Position:
    """How far a reader has followed etcd's history, and whose: `cluster` and `term` are 0 when not yet known."""

    revision: int
    cluster: int = 0
    term: int = 0

    def is_in(self, header: Any) -> bool:
        """Whether the server that sent this header has this history. A restored backup goes back in one of these."""
        same_cluster = self.cluster in (0, header.cluster_id)
        return same_cluster and header.revision >= self.revision and header.raft_term >= self.term


@dataclass(frozen=True, slots=True)
class Changes:
    """What a watch heard at once: whole revisions, in order; None is a deletion. Empty when only the position moved."""

    position: Position
    changes: Sequence[tuple[str, Versioned | None]]


class EtcdClient:
    """A cluster. Needs a running event loop only once it is used."""

    def __init__(self, endpoints: str, *, timeout_s: float = 3.0) -> None:
        """`endpoints` is host:port[,host:port]; every call has `timeout_s` for each endpoint it tries."""
        self._cluster = Cluster(endpoints, timeout_s)

    async def get(self, key: str) -> Versioned | None:
        """The key's latest value (linearizable), or None."""
        page = await self._cluster.read(rpc.RangeRequest(key=key.encode()))
        return _versioned(page.kvs[0]) if page.kvs else None

    async def list(self, prefix: str) -> tuple[Sequence[Versioned], int]:
        """Every key under the prefix, in order, as of one revision, and that revision. Long lists are read in pages."""
        start, end = prefix.encode(), _end_of(prefix)
        found: list[Versioned] = []
        revision = 0
        while True:
            request = rpc.RangeRequest(key=start, range_end=end, limit=_KEYS_A_PAGE, revision=revision)
            page = await self._cluster.read(request)
            revision = revision or page.header.revision
            found.extend(map(_versioned, page.kvs))
            if not page.more:
                return found, revision
            start = page.kvs[-1].key + b"\0"

    async def put(self, key: str, value: bytes, *, lease: "Lease | None" = None) -> int:
        """The key has the value, and lives no longer than the lease. Returns its mod_revision.

        After Unavailable the write, as every write here, may or may not have happened.
        """
        answer = await self._cluster.call(lambda to: to.put, _put(key, value, lease))
        return int(answer.header.revision)

    async def put_if_unchanged(
        self,
        key: str,
        value: bytes,
        mod_revision: int,
        *,
        lease: "Lease | None" = None,
        fence: Versioned | None = None,
    ) -> int:
        """As `put`, only if the key is still at `mod_revision` (0: does not exist); else Conflict and nothing changed.

        With `fence`, the key that its writer holds under a lease, only if that key still lives the same life: a holder
        that was frozen and has lost it cannot write over its successor's work.
        """
        compare = [_equal(key, rpc.Compare.MOD, mod_revision=mod_revision)]
        if fence:
            compare.append(_equal(fence.key, rpc.Compare.CREATE, create_revision=fence.create_revision))
        return await self._only_if(compare, [rpc.RequestOp(request_put=_put(key, value, lease))])

    async def put_together(self, values: Mapping[str, bytes], unchanged: Versioned) -> int:
        """Every key has its value, only if `unchanged` still is; else Conflict and nothing changed."""
        compare = [_equal(unchanged.key, rpc.Compare.MOD, mod_revision=unchanged.mod_revision)]
        puts = [rpc.RequestOp(request_put=_put(key, value, None)) for key, value in values.items()]
        return await self._only_if(compare, puts)

    async def delete(self, key: str) -> bool:
        """The key does not exist; True when it did."""
        answer = await self._cluster.call(lambda to: to.delete, rpc.DeleteRangeRequest(key=key.encode()))
        return bool(answer.deleted)

    async def delete_if_unchanged(self, found: Versioned) -> None:
        """The key does not exist, only if it still was as found; else Conflict and nothing changed."""
        compare = [_equal(found.key, rpc.Compare.MOD, mod_revision=found.mod_revision)]
        delete = rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=found.key.encode()))
        await self._only_if(compare, [delete])

    def lease(self, ttl_s: int = 10) -> "Lease":
        """A lease for `async with`; see Lease."""
        return Lease(self, ttl_s)

    async def watch(self, prefix: str, after: Position) -> AsyncGenerator[Changes, None]:
        """Every change under the prefix after that position, on one stream; the first item says that the stream stands.

        Never ends by itself. Unavailable: the stream broke, ended or was cancelled by etcd; resume from the last
        position seen. HistoryLost: that position is gone; list first.
        """
        create = rpc.WatchCreateRequest(
            key=prefix.encode(), range_end=_end_of(prefix), start_revision=after.revision + 1, progress_notify=True
        )
        endpoint = self._cluster.endpoint()
        with self._cluster.failing(endpoint):
            stream = endpoint.watch(metadata=REQUIRE_LEADER)
            try:
                async with asyncio.timeout(self._cluster.timeout_s):
                    await stream.write(rpc.WatchRequest(create_request=create))
                    header = heard(await stream.read()).header
                if not after.is_in(header):
                    raise HistoryLost("etcd's history went back")
                position = Position(after.revision, header.cluster_id, header.raft_term)
                yield Changes(position, ())
                while True:
                    changes = _changes(heard(await stream.read()), position)
                    position = changes.position
                    yield changes
            finally:
                stream.cancel()

    async def keep_alive(self, lease_id: int, every_s: float) -> AsyncGenerator[float, None]:
        """Keeps a lease alive on one stream while it is iterated; yields the time.monotonic() at which each
        acknowledged request was sent. LeaseLost: etcd no longer has the lease. Unavailable: the stream broke.
        """
        endpoint = self._cluster.endpoint()
        with self._cluster.failing(endpoint):
            stream = endpoint.keep_alive(metadata=REQUIRE_LEADER)
            try:
                while True:
                    sent_at = time.monotonic()
                    async with asyncio.timeout(self._cluster.timeout_s):
                        await stream.write(rpc.LeaseKeepAliveRequest(ID=lease_id))
                        answer = heard(await stream.read())
                    # etcd answers for a lease that is over as well, without an error.
                    if answer.TTL <= 0:
                        raise LeaseLost("etcd no longer has the lease")
                    yield sent_at
                    await asyncio.sleep(every_s)
            finally:
                stream.cancel()

    async def grant(self, ttl_s: int) -> int:
        """The id of a new lease of that many seconds."""
        answer = await self._cluster.call(lambda to: to.grant, rpc.LeaseGrantRequest(TTL=ttl_s))
        return int(answer.ID)

    async def revoke(self, lease_id: int) -> None:
        """The lease and every key under it are gone. LeaseLost when they were before."""
        await self._cluster.call(lambda to: to.revoke, rpc.LeaseRevokeRequest(ID=lease_id))

    async def check_version(self) -> None:
        """The log has a warning if etcd is too old to be relied on. Waits for etcd while it is away."""
        while True:
            try:
                answer = await self._cluster.call(lambda to: to.status, rpc.StatusRequest())
                break
            except Unavailable:
                await asyncio.sleep(_ASK_VERSION_EVERY_S)
        if is_outdated(answer.version):
            _log.warning(
                "this etcd may lose writes at a crash and show keys to those who may not read them",
                version=answer.version,
                remedy="beyond one machine use 3.6.14, 3.7.1 or newer",
            )

    async def close(self) -> None:
        """Every connection is closed; calls still running are cancelled."""
        await self._cluster.close()

    async def _only_if(self, compare: Sequence[Any], success: Sequence[Any]) -> int:
        answer = await self._cluster.call(lambda to: to.txn, rpc.TxnRequest(compare=compare, success=success))
        if not answer.succeeded:
            raise Conflict("changed by someone else meanwhile: read it again")
        return int(answer.header.revision)


class Lease:
    """A lease that lives as long as its `async with` block, and knows first when it does not.

    `lost` is set when etcd says so, or when no keep-alive sent in the last two thirds of the time to live was
    acknowledged: before etcd can give its keys to others. Time is the monotonic clock, so a change of the wall clock
    does no harm. A lost lease stays lost; the caller stops what it protected and takes a new one.
    """

    def __init__(self, client: EtcdClient, ttl_s: int) -> None:
        self.lost = asyncio.Event()
        self._client = client
        self._ttl_s = ttl_s
        self._id = 0
        self._fenced_at = 0.0

    @property
    def id(self) -> int:
        """etcd's id of the lease, for a write under it. Raises LeaseLost once it is lost."""
        if self.lost.is_set() or time.monotonic() >= self._fenced_at:
            raise LeaseLost("the lease was not kept alive in time")
        return self._id

    async def __aenter__(self) -> Self:
        self._acknowledged(time.monotonic())
        self._id = await self._client.grant(self._ttl_s)
        self._keeping = asyncio.create_task(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._keeping.cancel()
        await asyncio.wait([self._keeping])
        with contextlib.suppress(LeptonError):  # Gone already, or etcd is away and lets it run out.
            await self._client.revoke(self._id)

    def _acknowledged(self, sent_at: float) -> None:
        self._fenced_at = sent_at + self._ttl_s * 2 / 3

    async def _keep(self) -> None:
        try:
            async with asyncio.timeout(self._fenced_at - time.monotonic()) as fence:
                while True:
                    with contextlib.suppress(Unavailable):
                        await self._keep_on_one_stream(fence)
                    await asyncio.sleep(self._ttl_s / 30)
        except (TimeoutError, LeaseLost) as error:
            _log.warning("lease lost", reason=str(error) or "no acknowledged keep-alive in time")
        finally:
            self.lost.set()

    async def _keep_on_one_stream(self, fence: asyncio.Timeout) -> None:
        async with contextlib.aclosing(self._client.keep_alive(self._id, self._ttl_s / 3)) as acknowledgements:
            async for sent_at in acknowledgements:
                self._acknowledged(sent_at)
                fence.reschedule(asyncio.get_running_loop().time() + self._fenced_at - time.monotonic())


def _changes(answer: Any, position: Position) -> Changes:
    # While a watch catches up, the header is ahead of the events sent so far; only without events (a progress
    # notification) does it say how far this watch has heard everything.
    revision = answer.events[-1].kv.mod_revision if answer.events else answer.header.revision
    return Changes(
        Position(revision, position.cluster, max(position.term, answer.header.raft_term)),
        [(_text(e.kv.key), None if e.type == rpc.Event.DELETE else _versioned(e.kv)) for e in answer.events],
    )


def _versioned(pair: Any) -> Versioned:
    return Versioned(_text(pair.key), pair.value, pair.mod_revision, pair.create_revision)


def _text(key: bytes) -> str:
    # Someone else's key that is not UTF-8 must not stop the reader of a whole prefix.
    return key.decode("utf-8", "surrogateescape")


def _put(key: str, value: bytes, lease: Lease | None) -> Any:
    if len(value) > MAX_VALUE_BYTES:
        raise TooLarge(f"a live record of {len(value)} bytes: at most {MAX_VALUE_BYTES} are allowed")
    return rpc.PutRequest(key=key.encode(), value=value, lease=lease.id if lease else 0)


def _equal(key: str, target: int, **expected: int) -> Any:
    return rpc.Compare(result=rpc.Compare.EQUAL, target=target, key=key.encode(), **expected)


def _end_of(prefix: str) -> bytes:
    """The first key after every key with this prefix. UTF-8 has no byte 0xff, so the last byte can always grow."""
    start = prefix.encode()
    return start[:-1] + bytes([start[-1] + 1])
