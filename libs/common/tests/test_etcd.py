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
from lepton.processes import free_port
from lepton.servers import Etcd, etcd_program
from lepton_common.errors import Conflict, Invalid, TooLarge, Unavailable
from lepton_common.etcd import MAX_VALUE_BYTES, EtcdClient, Position
from lepton_common.etcd_cluster import HistoryLost, LeaseLost
from lepton_common.mirror import Mirror


class PrivateEtcd:
    """An etcd of one test's own, to kill, freeze and set back."""

    def __init__(self, folder: Path) -> None:
        self.recipe = Etcd(folder)
        self.address = self.recipe.address
        folder.mkdir()
        self.start()

    def start(self) -> None:
        # Without fsync, because what is killed here is the process and not the machine.
        options = ["--unsafe-no-fsync", "--experimental-watch-progress-notify-interval=200ms", "--log-level=error"]
        self.process = subprocess.Popen([*self.recipe.argv(), *options])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ctl(self, *arguments: str) -> None:
        program = Path(etcd_program()).with_name("etcdctl")
        subprocess.run([program, "--endpoints", self.address, *arguments], check=True, capture_output=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PrivateEtcd]:
    server = PrivateEtcd(tmp_path / "etcd")
    yield server
    server.kill()


@pytest.fixture
async def etcd(server: PrivateEtcd) -> AsyncIterator[EtcdClient]:
    client = EtcdClient(server.address)
    await available(client)
    yield client
    await client.close()


async def available(client: EtcdClient) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await client.get("/ready")
            except Unavailable:
                await asyncio.sleep(0.05)
            else:
                return


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
async def running(mirror: Mirror[Any]) -> AsyncIterator[None]:
    task = asyncio.create_task(mirror.run())
    try:
        await mirror.synced()
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


# --- values ---------------------------------------------------------------------------------------------------------


async def test_a_value_comes_back_with_its_revisions(etcd: EtcdClient) -> None:
    assert await etcd.get("/p/a") is None
    created = await etcd.put("/p/a", b"1")
    changed = await etcd.put("/p/a", b"\x00\xff")
    found = await etcd.get("/p/a")
    assert found is not None
    assert (found.key, found.value) == ("/p/a", b"\x00\xff")
    assert (found.create_revision, found.mod_revision) == (created, changed)


async def test_only_one_of_two_writers_of_the_same_revision_wins(etcd: EtcdClient) -> None:
    revision = await etcd.put_if_unchanged("/p/a", b"0", 0)
    outcomes = await asyncio.gather(
        *(etcd.put_if_unchanged("/p/a", value, revision) for value in (b"1", b"2")), return_exceptions=True
    )
    [won] = [outcome for outcome in outcomes if isinstance(outcome, int)]
    [lost] = [outcome for outcome in outcomes if not isinstance(outcome, int)]
    assert isinstance(lost, Conflict)
    found = await etcd.get("/p/a")
    assert found is not None
    assert found.mod_revision == won


async def test_a_key_that_exists_is_not_created_again(etcd: EtcdClient) -> None:
    await etcd.put("/p/a", b"1")
    with pytest.raises(Conflict):
        await etcd.put_if_unchanged("/p/a", b"2", 0)


async def test_a_changed_key_is_not_deleted(etcd: EtcdClient) -> None:
    old = await etcd.put("/p/a", b"1")
    new = await etcd.put("/p/a", b"2")
    with pytest.raises(Conflict):
        await etcd.delete_if_unchanged("/p/a", old)
    await etcd.delete_if_unchanged("/p/a", new)
    assert await etcd.get("/p/a") is None
    assert await etcd.delete("/p/a") is False


async def test_a_value_over_the_limit_is_refused_before_it_is_sent(etcd: EtcdClient) -> None:
    await etcd.put("/p/a", b"x" * MAX_VALUE_BYTES)
    with pytest.raises(TooLarge, match="65537"):
        await etcd.put("/p/a", b"x" * (MAX_VALUE_BYTES + 1))


async def test_a_list_larger_than_a_grpc_message_arrives_whole_and_in_order(etcd: EtcdClient) -> None:
    await asyncio.gather(*(etcd.put(f"/p/{number:04}", b"x" * 8000) for number in range(1100)))
    await etcd.put("/q", b"a neighbour")
    found, revision = await etcd.list("/p/")
    assert [each.key for each in found] == [f"/p/{number:04}" for number in range(1100)]
    assert revision == max(each.mod_revision for each in found) + 1


async def test_no_endpoint_is_an_error_at_once() -> None:
    with pytest.raises(Invalid):
        EtcdClient(" , ")


async def test_another_endpoint_answers_for_one_that_is_away(server: PrivateEtcd, etcd: EtcdClient) -> None:
    await etcd.put("/p/a", b"1")
    client = EtcdClient(f"127.0.0.1:{free_port()}, {server.address}")
    assert await client.get("/p/a") is not None
    await client.put("/p/a", b"2")  # Goes straight to the one that answered.
    await client.close()


async def test_every_call_ends_when_etcd_is_frozen(server: PrivateEtcd, etcd: EtcdClient) -> None:
    client = EtcdClient(server.address, timeout_s=0.3)
    await available(client)
    server.process.send_signal(signal.SIGSTOP)
    for call in (client.get("/p/a"), client.list("/p/"), client.put("/p/a", b""), client.delete("/p/a")):
        with pytest.raises(Unavailable):
            await call
    with pytest.raises(Unavailable):
        async with client.lease(5):
            pass
    with pytest.raises(Unavailable):
        await anext(client.watch("/p/", Position(1)))
    await client.close()
    server.process.send_signal(signal.SIGCONT)


# --- leases ---------------------------------------------------------------------------------------------------------


async def test_a_leased_key_outlives_its_time_to_live_and_goes_with_the_lease(etcd: EtcdClient) -> None:
    async with etcd.lease(2) as lease:
        await etcd.put("/p/worker", b"here", lease=lease)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lease.lost.wait(), 3)
        assert await etcd.get("/p/worker") is not None
    assert lease.lost.is_set()
    assert await etcd.get("/p/worker") is None


async def test_a_lease_that_etcd_no_longer_has_is_lost(etcd: EtcdClient) -> None:
    async with etcd.lease(3) as lease:
        await etcd.revoke(lease.id)
        with pytest.raises(LeaseLost):
            await etcd.put("/p/worker", b"here", lease=lease)
        await asyncio.wait_for(lease.lost.wait(), 3)
        with pytest.raises(LeaseLost):
            await etcd.put("/p/worker", b"here", lease=lease)


async def test_a_lease_survives_a_restart_of_etcd(server: PrivateEtcd, etcd: EtcdClient) -> None:
    async with etcd.lease(10) as lease:
        await etcd.put("/p/worker", b"here", lease=lease)
        server.kill()
        server.start()
        await available(etcd)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lease.lost.wait(), 4)
        await etcd.put("/p/worker", b"still here", lease=lease)


async def test_a_holder_fences_itself_before_etcd_gives_the_key_away(server: PrivateEtcd, etcd: EtcdClient) -> None:
    async with etcd.lease(3) as lease:
        await etcd.put("/p/worker", b"here", lease=lease)
        server.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        await lease.lost.wait()
        assert time.monotonic() - started < 3
        server.process.send_signal(signal.SIGCONT)
        with pytest.raises(LeaseLost):
            await etcd.put("/p/worker", b"here", lease=lease)


async def test_a_former_leader_cannot_write_over_its_successors_work(etcd: EtcdClient) -> None:
    await etcd.put("/p/leader", b"first")
    first = await etcd.get("/p/leader")
    revision = await etcd.put_if_unchanged("/p/work", b"by first", 0, fence=first)
    await etcd.delete("/p/leader")
    await etcd.put("/p/leader", b"second")
    with pytest.raises(Conflict):
        await etcd.put_if_unchanged("/p/work", b"by first", revision, fence=first)
    with pytest.raises(Conflict):
        await etcd.delete_if_unchanged("/p/work", revision, fence=first)
    second = await etcd.get("/p/leader")
    await etcd.put_if_unchanged("/p/work", b"by second", revision, fence=second)


# --- watching -------------------------------------------------------------------------------------------------------


async def test_a_mirror_holds_what_was_there_and_what_comes(etcd: EtcdClient) -> None:
    await etcd.put("/p/a", b"1")
    await etcd.put("/pq", b"not under the prefix")
    mirror = Watched(etcd)
    assert mirror.stale_s(time.monotonic()) == float("inf")
    async with running(mirror):
        assert dict(mirror.items) == {"a": "1"}
        await etcd.put("/p/b", b"2")
        await etcd.delete("/p/a")
        await mirror.until({"b": "2"})
    assert mirror.changes == [("a", "1"), ("b", "2"), ("a", None)]


async def test_a_record_that_cannot_be_read_harms_no_other_and_the_last_good_one_stays(etcd: EtcdClient) -> None:
    await etcd.put("/p/a", b"1")
    await etcd.put("/p/b", b"\xff")
    mirror = Watched(etcd)
    async with running(mirror):
        assert (dict(mirror.items), list(mirror.rejected)) == ({"a": "1"}, ["b"])
        await etcd.put("/p/a", b"\xff")
        await etcd.put("/p/b", b"2")
        await mirror.until({"a": "1", "b": "2"})
        assert list(mirror.rejected) == ["a"]


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
    async with running(mirror):
        assert seen == ["a", "a"]


async def test_a_mirror_keeps_its_items_while_etcd_is_killed_and_catches_up(
    server: PrivateEtcd, etcd: EtcdClient
) -> None:
    mirror = Watched(etcd)
    await etcd.put("/p/a", b"1")
    async with running(mirror):
        await mirror.until_connected()
        server.kill()
        await mirror.until_connected(False)
        assert dict(mirror.items) == {"a": "1"}
        assert mirror.stale_s(time.monotonic()) > 0
        server.start()
        other = EtcdClient(server.address)
        await available(other)
        await other.put("/p/b", b"2")
        await other.delete("/p/a")
        await mirror.until({"b": "2"})
        await mirror.until_connected()
        await other.close()
    # Nothing was told twice: the watch went on after the last revision it had seen.
    assert mirror.changes == [("a", "1"), ("b", "2"), ("a", None)]


async def test_a_frozen_etcd_is_noticed_and_a_thawed_one_followed_again(server: PrivateEtcd, etcd: EtcdClient) -> None:
    """Takes up to 9 s: that is how long gRPC's pings need."""
    mirror = Watched(etcd)
    await etcd.put("/p/a", b"1")
    async with running(mirror):
        await mirror.until_connected()
        server.process.send_signal(signal.SIGSTOP)
        await mirror.until_connected(False)
        assert dict(mirror.items) == {"a": "1"}
        server.process.send_signal(signal.SIGCONT)
        await mirror.until_connected()
        await available(etcd)
        await etcd.put("/p/b", b"2")
        await mirror.until({"a": "1", "b": "2"})


async def test_a_compaction_while_the_watcher_is_away_costs_no_change(server: PrivateEtcd, etcd: EtcdClient) -> None:
    mirror = Watched(etcd)
    await etcd.put("/p/a", b"1")
    await etcd.put("/p/gone", b"1")
    async with running(mirror):
        await mirror.until({"a": "1", "gone": "1"})
    other = EtcdClient(server.address)
    await other.delete("/p/gone")
    for number in range(5):
        revision = await other.put("/p/b", str(number).encode())
    server.ctl("compact", str(revision))
    await other.close()
    async with running(mirror):  # Goes on where it stopped, as after a broken stream.
        await mirror.until({"a": "1", "b": "4"})
    assert mirror.changes[-2:] == [("gone", None), ("b", "4")]


async def test_a_quiet_prefix_survives_compaction_without_a_new_list(server: PrivateEtcd, etcd: EtcdClient) -> None:
    await etcd.put("/p/a", b"1")
    _, revision = await etcd.list("/p/")
    async with aclosing(etcd.watch("/p/", Position(revision))) as stream:
        position = (await anext(stream)).position
        elsewhere = await etcd.put("/elsewhere", b"")
        async with asyncio.timeout(10):
            while position.revision < elsewhere:  # Progress notifications move it.
                position = (await anext(stream)).position
    server.ctl("compact", str(elsewhere))
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
    await asyncio.gather(*(etcd.put("/p/a", b"") for _ in range(2500)))
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
    server: PrivateEtcd, etcd: EtcdClient, tmp_path: Path
) -> None:
    mirror = Watched(etcd)
    await etcd.put("/p/a", b"old")
    server.kill()
    shutil.copytree(server.recipe.folder, tmp_path / "backup")
    server.start()
    await available(etcd)
    async with running(mirror):
        for number in range(20):
            await etcd.put("/p/a", f"new {number}".encode())
        await etcd.put("/p/lost", b"1")
        await mirror.until({"a": "new 19", "lost": "1"})
        server.kill()
        shutil.rmtree(server.recipe.folder)
        shutil.copytree(tmp_path / "backup", server.recipe.folder)
        server.start()
        await mirror.until({"a": "old"})
        await available(etcd)
        await etcd.put("/p/b", b"after")  # At a revision that the mirror had passed before the restore.
        await mirror.until({"a": "old", "b": "after"})


@pytest.mark.parametrize("change", [{"revision": 9}, {"cluster_id": 8}, {"raft_term": 2}])
def test_a_server_that_went_back_or_is_another_has_not_our_history(change: dict[str, int]) -> None:
    ours = {"revision": 10, "cluster_id": 7, "raft_term": 3}
    position = Position(10, cluster=7, term=3)
    assert position.is_in(rpc.ResponseHeader(**ours))
    assert not position.is_in(rpc.ResponseHeader(**(ours | change)))


async def test_a_watch_that_etcd_forbids_is_an_error_and_the_mirror_waits_for_better(
    server: PrivateEtcd, etcd: EtcdClient
) -> None:
    await etcd.put("/p/a", b"1")
    _, revision = await etcd.list("/p/")
    server.ctl("user", "add", "root:secret")
    server.ctl("auth", "enable")
    with pytest.raises(Unavailable, match="cancelled the watch"):
        async with aclosing(etcd.watch("/p/", Position(revision))) as stream:
            await anext(stream)
    mirror = Watched(etcd)
    task = asyncio.create_task(mirror.run())
    server.ctl("--user", "root:secret", "auth", "disable")
    await mirror.until({"a": "1"})
    task.cancel()
    await asyncio.wait([task])


# A server of our own, for what a real etcd does too rarely to wait for.
Watching = Callable[[Any, Any], AsyncIterator[Any]]


@asynccontextmanager
async def scripted(watching: Watching) -> AsyncIterator[EtcdClient]:
    class Servicer(rpc.Watch):  # type: ignore[misc]
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
