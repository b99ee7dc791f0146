import asyncio
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from aetcd import rpc
from lepton.processes import Process, running
from lepton.servers import Etcd, etcd_program
from lepton_common.errors import Unavailable
from lepton_common.etcd import EtcdClient, Position
from lepton_common.etcd_cluster import HistoryLost
from lepton_common.mirror import Mirror


class TalkativeEtcd(Etcd):
    """Says how far it is five times a second, instead of every ten minutes."""

    def argv(self) -> list[str]:
        return [*super().argv(), "--experimental-watch-progress-notify-interval=200ms"]

    def ctl(self, *arguments: str) -> None:
        program = Path(etcd_program()).with_name("etcdctl")
        subprocess.run([program, "--endpoints", self.address, *arguments], check=True, capture_output=True)


@pytest.fixture
def recipe(tmp_path: Path) -> TalkativeEtcd:
    return TalkativeEtcd(tmp_path / "etcd")


@pytest.fixture
def server(recipe: TalkativeEtcd) -> Iterator[Process]:
    """An etcd of the test's own, to kill, freeze, compact and set back."""
    with running(recipe) as process:
        yield process


@pytest.fixture
async def etcd(recipe: TalkativeEtcd, server: Process) -> AsyncIterator[EtcdClient]:
    client = EtcdClient(recipe.address)
    yield client
    await client.close()


class Watched(Mirror[str]):
    """A mirror of text that can be waited on."""

    def __init__(self, client: EtcdClient, prefix: str = "/p/") -> None:
        super().__init__(client, prefix, bytes.decode, self._note)
        self.changes: list[tuple[str, str | None]] = []
        self._changed = asyncio.Event()

    def _note(self, key: str, value: str | None) -> None:
        self.changes.append((key, value))
        self._changed.set()

    async def until(self, expected: dict[str, str]) -> None:
        async with asyncio.timeout(30):
            while dict(self.items) != expected:
                self._changed.clear()
                await self._changed.wait()

    async def until_connected(self, connected: bool = True) -> None:
        async with asyncio.timeout(30):
            while (self.stale_s(time.monotonic()) == 0) != connected:  # noqa: ASYNC110, only tests wait for it
                await asyncio.sleep(0.02)


@asynccontextmanager
async def following(mirror: Mirror[Any]) -> AsyncIterator[None]:
    task = asyncio.create_task(mirror.run())
    try:
        await mirror.synced()
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_mirror_holds_what_was_there_and_what_comes(etcd: EtcdClient) -> None:
    await etcd.put("/p/a", b"1")
    await etcd.put("/pq", b"not under the prefix")
    mirror = Watched(etcd)
    assert mirror.stale_s(time.monotonic()) == float("inf")
    async with following(mirror):
        assert dict(mirror.items) == {"a": "1"}
        await etcd.put("/p/b", b"2")
        await etcd.delete("/p/a")
        await mirror.until({"b": "2"})
    assert mirror.changes == [("a", "1"), ("b", "2"), ("a", None)]


async def test_a_record_that_cannot_be_read_harms_no_other_and_the_last_good_one_stays(etcd: EtcdClient) -> None:
    await etcd.put("/p/a", b"1")
    await etcd.put("/p/b", b"\xff")
    mirror = Watched(etcd)
    async with following(mirror):
        assert dict(mirror.items) == {"a": "1"}
        await etcd.put("/p/a", b"\xff")
        await etcd.put("/p/b", b"2")
        await mirror.until({"a": "1", "b": "2"})


async def test_a_failing_on_change_hears_of_the_change_again(etcd: EtcdClient) -> None:
    seen: list[str] = []

    def fail_once(key: str, value: bytes | None) -> None:
        seen.append(key)
        if len(seen) == 1:
            raise RuntimeError("once")

    mirror = Mirror(etcd, "/p/", bytes, fail_once)
    await etcd.put("/p/a", b"1")
    with pytest.raises(RuntimeError, match="once"):
        await mirror.run()
    async with following(mirror):
        assert seen == ["a", "a"]


async def test_a_mirror_keeps_its_items_while_etcd_is_killed_and_catches_up(
    recipe: TalkativeEtcd, server: Process, etcd: EtcdClient
) -> None:
    mirror = Watched(etcd)
    await etcd.put("/p/a", b"1")
    async with following(mirror):
        await mirror.until_connected()
        server.kill()
        await mirror.until_connected(False)
        assert dict(mirror.items) == {"a": "1"}
        assert mirror.stale_s(time.monotonic()) > 0
        with running(recipe):
            other = EtcdClient(recipe.address)
            await other.put("/p/b", b"2")
            await other.delete("/p/a")
            await mirror.until({"b": "2"})
            await mirror.until_connected()
            await other.close()
    # Nothing was told twice: the watch went on after the last revision it had seen.
    assert mirror.changes == [("a", "1"), ("b", "2"), ("a", None)]


async def test_a_frozen_etcd_is_noticed_and_a_thawed_one_followed_again(server: Process, etcd: EtcdClient) -> None:
    """Takes up to 9 s: that is how long gRPC's pings need."""
    mirror = Watched(etcd)
    await etcd.put("/p/a", b"1")
    async with following(mirror):
        await mirror.until_connected()
        server.freeze()
        await mirror.until_connected(False)
        assert dict(mirror.items) == {"a": "1"}
        server.send(signal.SIGCONT)
        await mirror.until_connected()
        await etcd.put("/p/b", b"2")
        await mirror.until({"a": "1", "b": "2"})


async def test_a_compaction_while_the_watcher_is_away_costs_no_change(recipe: TalkativeEtcd, etcd: EtcdClient) -> None:
    mirror = Watched(etcd)
    await etcd.put("/p/a", b"1")
    await etcd.put("/p/gone", b"1")
    async with following(mirror):
        await mirror.until({"a": "1", "gone": "1"})
    other = EtcdClient(recipe.address)
    await other.delete("/p/gone")
    for number in range(5):
        revision = await other.put("/p/b", str(number).encode())
    recipe.ctl("compact", str(revision))
    await other.close()
    async with following(mirror):  # Goes on where it stopped, as after a broken stream.
        await mirror.until({"a": "1", "b": "4"})
    assert mirror.changes[-2:] == [("gone", None), ("b", "4")]


async def test_a_quiet_prefix_survives_compaction_without_a_new_list(recipe: TalkativeEtcd, etcd: EtcdClient) -> None:
    await etcd.put("/p/a", b"1")
    _, revision = await etcd.list("/p/")
    async with aclosing(etcd.watch("/p/", Position(revision))) as stream:
        position = (await anext(stream)).position
        elsewhere = await etcd.put("/elsewhere", b"")
        async with asyncio.timeout(10):
            while position.revision < elsewhere:  # Progress notifications move it.
                position = (await anext(stream)).position
    recipe.ctl("compact", str(elsewhere))
    async with aclosing(etcd.watch("/p/", position)) as stream:
        await anext(stream)
        await etcd.put("/p/b", b"2")
        heard = [change async for change in first_changes(stream)]
    assert heard == [("/p/b", b"2")]


async def first_changes(stream: Any) -> AsyncIterator[tuple[str, bytes | None]]:
    async for heard in stream:
        for key, value in heard.changes:
            yield key, value.value if value else None
        if heard.changes:
            return


async def test_thousands_of_revisions_are_caught_up_without_a_gap(etcd: EtcdClient) -> None:
    _, start = await etcd.list("/p/")
    for _ in range(25):  # All at once they would share one deadline.
        await asyncio.gather(*(etcd.put("/p/a", b"") for _ in range(100)))
    revisions: list[int] = []
    position = Position(start)
    while len(revisions) < 2500:
        async with asyncio.timeout(10), aclosing(etcd.watch("/p/", position)) as stream:
            async for heard in stream:
                revisions.extend(value.mod_revision for _, value in heard.changes if value)
                position = heard.position
                if heard.changes:
                    break  # A stream that breaks after every message must still miss nothing.
    assert revisions == list(range(start + 1, start + 2501))


async def test_an_etcd_restored_from_a_backup_is_followed_from_what_it_has(
    recipe: TalkativeEtcd, server: Process, etcd: EtcdClient, tmp_path: Path
) -> None:
    mirror = Watched(etcd)
    await etcd.put("/p/a", b"old")
    server.kill()
    shutil.copytree(recipe.folder, tmp_path / "backup")
    with running(recipe) as live:
        async with following(mirror):
            for number in range(20):
                await etcd.put("/p/a", f"new {number}".encode())
            await etcd.put("/p/lost", b"1")
            await mirror.until({"a": "new 19", "lost": "1"})
            live.kill()
            shutil.rmtree(recipe.folder)
            shutil.copytree(tmp_path / "backup", recipe.folder)
            with running(recipe):
                await mirror.until({"a": "old"})
                await mirror.until_connected()
                await etcd.put("/p/b", b"after")  # At a revision that the mirror had passed before the restore.
                await mirror.until({"a": "old", "b": "after"})
    assert ("lost", None) in mirror.changes  # Who listens hears that it is gone.
    assert mirror.changes[-1] == ("b", "after")


@pytest.mark.parametrize("change", [{"revision": 9}, {"cluster_id": 8}, {"raft_term": 2}])
def test_a_server_that_went_back_or_is_another_has_not_our_history(change: dict[str, int]) -> None:
    ours = {"revision": 10, "cluster_id": 7, "raft_term": 3}
    position = Position(10, cluster=7, term=3)
    assert position.is_in(rpc.ResponseHeader(**ours))
    assert not position.is_in(rpc.ResponseHeader(**(ours | change)))


async def test_a_watch_that_etcd_forbids_is_an_error_and_the_mirror_waits_for_better(
    recipe: TalkativeEtcd, server: Process, etcd: EtcdClient
) -> None:
    await etcd.put("/p/a", b"1")
    _, revision = await etcd.list("/p/")
    recipe.ctl("user", "add", "root:secret")
    recipe.ctl("auth", "enable")
    with pytest.raises(Unavailable, match="cancelled the watch"):
        async with aclosing(etcd.watch("/p/", Position(revision))) as stream:
            await anext(stream)
    mirror = Watched(etcd)
    task = asyncio.create_task(mirror.run())
    recipe.ctl("--user", "root:secret", "auth", "disable")
    await mirror.until({"a": "1"})
    task.cancel()
    await asyncio.wait([task])


# A server of our own, for what a real etcd does too rarely to wait for.
Watching = Callable[[Any, Any], AsyncIterator[Any]]


@asynccontextmanager
async def scripted(watching: Watching) -> AsyncIterator[EtcdClient]:
    class Servicer(rpc.Watch):  # type: ignore[misc]  # it has no types
        async def Watch(self, requests: Any, context: Any) -> AsyncIterator[Any]:
            async for answer in watching(requests, context):
                yield answer

    server = grpc.aio.server()
    rpc.rpc_pb2_grpc.add_WatchServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = EtcdClient(f"127.0.0.1:{port}", timeout_s=0.5)
    yield client
    await client.close()
    await server.stop(None)


async def ends(requests: Any, context: Any) -> AsyncIterator[Any]:
    await anext(aiter(requests))  # Else what the client still sends meets a stream that is over: another error.
    yield rpc.WatchResponse(created=True, header=rpc.ResponseHeader(revision=5))


async def compacts(requests: Any, context: Any) -> AsyncIterator[Any]:
    yield rpc.WatchResponse(created=True, header=rpc.ResponseHeader(revision=5))
    yield rpc.WatchResponse(canceled=True, compact_revision=4)


async def is_silent(requests: Any, context: Any) -> AsyncIterator[Any]:
    await asyncio.sleep(30)
    yield rpc.WatchResponse()


@pytest.mark.parametrize(
    ("watching", "error", "message"),
    [
        (ends, Unavailable, "ended the stream"),
        (compacts, HistoryLost, "compacted"),
        (is_silent, Unavailable, "no answer"),
    ],
)
async def test_a_watch_never_ends_quietly(watching: Watching, error: type[Exception], message: str) -> None:
    async with scripted(watching) as client:
        with pytest.raises(error, match=message):
            async for _ in client.watch("/p/", Position(3)):
                pass
