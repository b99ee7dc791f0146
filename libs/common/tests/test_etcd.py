import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import structlog
from lepton.ports import free_port
from lepton.processes import Process, running
from lepton.servers import Etcd
from lepton_common.errors import Conflict, Invalid, TooLarge, Unavailable
from lepton_common.etcd import MAX_VALUE_BYTES, EtcdClient, Position
from lepton_common.etcd_cluster import LeaseLost, is_outdated


@pytest.fixture
def recipe(tmp_path: Path) -> Etcd:
    return Etcd(tmp_path / "etcd")


@pytest.fixture
def server(recipe: Etcd) -> Iterator[Process]:
    """An etcd of the test's own, to kill and to freeze."""
    with running(recipe) as process:
        yield process


@pytest.fixture
async def private(recipe: Etcd, server: Process) -> AsyncIterator[EtcdClient]:
    client = EtcdClient(recipe.address)
    yield client
    await client.close()


# --- values ---------------------------------------------------------------------------------------------------------


async def test_a_value_comes_back_with_its_revisions(etcd: EtcdClient) -> None:
    assert await etcd.get("/lepton/p/a") is None
    created = await etcd.put("/lepton/p/a", b"1")
    changed = await etcd.put("/lepton/p/a", b"\x00\xff")
    found = await etcd.get("/lepton/p/a")
    assert found is not None
    assert (found.key, found.value) == ("/lepton/p/a", b"\x00\xff")
    assert (found.create_revision, found.mod_revision) == (created, changed)


async def test_only_one_of_two_writers_of_the_same_revision_wins(etcd: EtcdClient) -> None:
    revision = await etcd.put_if_unchanged("/lepton/p/a", b"0", 0)
    outcomes = await asyncio.gather(
        *(etcd.put_if_unchanged("/lepton/p/a", value, revision) for value in (b"1", b"2")), return_exceptions=True
    )
    [won] = [outcome for outcome in outcomes if isinstance(outcome, int)]
    [lost] = [outcome for outcome in outcomes if not isinstance(outcome, int)]
    assert isinstance(lost, Conflict)
    found = await etcd.get("/lepton/p/a")
    assert found is not None
    assert found.mod_revision == won


async def test_a_key_that_exists_is_not_created_again(etcd: EtcdClient) -> None:
    await etcd.put("/lepton/p/a", b"1")
    with pytest.raises(Conflict):
        await etcd.put_if_unchanged("/lepton/p/a", b"2", 0)


async def test_a_deleted_key_is_gone(etcd: EtcdClient) -> None:
    await etcd.put("/lepton/p/a", b"1")
    assert await etcd.delete("/lepton/p/a") is True
    assert await etcd.get("/lepton/p/a") is None
    assert await etcd.delete("/lepton/p/a") is False


async def test_a_key_that_changed_meanwhile_is_not_deleted(etcd: EtcdClient) -> None:
    await etcd.put("/lepton/p/a", b"1")
    before = await etcd.get("/lepton/p/a")
    await etcd.put("/lepton/p/a", b"2")
    after = await etcd.get("/lepton/p/a")
    assert before is not None
    assert after is not None
    with pytest.raises(Conflict):
        await etcd.delete_if_unchanged(before)
    assert await etcd.get("/lepton/p/a") == after
    await etcd.delete_if_unchanged(after)
    assert await etcd.get("/lepton/p/a") is None
    with pytest.raises(Conflict):
        await etcd.delete_if_unchanged(after)


async def test_a_value_over_the_limit_is_refused_before_it_is_sent(etcd: EtcdClient) -> None:
    await etcd.put("/lepton/p/a", b"x" * MAX_VALUE_BYTES)
    with pytest.raises(TooLarge, match="65537"):
        await etcd.put("/lepton/p/a", b"x" * (MAX_VALUE_BYTES + 1))


async def test_a_list_larger_than_a_grpc_message_arrives_whole_and_in_order(etcd: EtcdClient) -> None:
    await asyncio.gather(*(etcd.put(f"/lepton/p/{number:04}", b"x" * 8000) for number in range(1100)))
    await etcd.put("/lepton/q", b"a neighbour")
    found, revision = await etcd.list("/lepton/p/")
    assert [each.key for each in found] == [f"/lepton/p/{number:04}" for number in range(1100)]
    assert revision == max(each.mod_revision for each in found) + 1


async def test_no_endpoint_is_an_error_at_once() -> None:
    with pytest.raises(Invalid):
        EtcdClient(" , ")


async def test_another_endpoint_answers_for_one_that_is_away(etcd_server: Etcd, etcd: EtcdClient) -> None:
    await etcd.put("/lepton/p/a", b"1")
    client = EtcdClient(f"127.0.0.1:{free_port()}, {etcd_server.address}")
    assert await client.get("/lepton/p/a") is not None
    await client.put("/lepton/p/a", b"2")  # Goes straight to the one that answered.
    await client.close()


@pytest.mark.parametrize(
    ("version", "outdated"),
    [
        *((version, True) for version in ("3.4.37", "3.5.1", "3.5.32", "3.6.13", "3.7.0", "3.7.1-rc.0", "main")),
        *((version, False) for version in ("3.5.33", "3.6.14", "3.7.1", "3.8.0", "4.0.0")),
    ],
)
def test_versions_without_the_fixes_are_known(version: str, outdated: bool) -> None:
    assert is_outdated(version) is outdated


async def test_outdated_etcd_is_told_loudly(etcd_server: Etcd, etcd: EtcdClient) -> None:
    with structlog.testing.capture_logs() as lines:
        await etcd.check_version()
    async with httpx.AsyncClient() as http:
        version = (await http.get(f"http://{etcd_server.address}/version")).json()["etcdserver"]
    warned = [each["version"] for each in lines if each["log_level"] == "warning"]
    assert warned == ([version] if is_outdated(version) else [])


async def test_every_call_ends_when_etcd_is_frozen(recipe: Etcd, server: Process) -> None:
    client = EtcdClient(recipe.address, timeout_s=0.3)
    await client.get("/lepton/p/a")
    server.freeze()
    for call in (
        client.get("/lepton/p/a"),
        client.list("/lepton/p/"),
        client.put("/lepton/p/a", b""),
        client.delete("/lepton/p/a"),
    ):
        with pytest.raises(Unavailable):
            await call
    with pytest.raises(Unavailable):
        async with client.lease(5):
            pass
    with pytest.raises(Unavailable):
        await anext(client.watch("/lepton/p/", Position(1)))
    await client.close()
    server.send(signal.SIGCONT)


# --- leases ---------------------------------------------------------------------------------------------------------


async def test_a_leased_key_outlives_its_time_to_live_and_goes_with_the_lease(etcd: EtcdClient) -> None:
    async with etcd.lease(2) as lease:
        await etcd.put("/lepton/p/worker", b"here", lease=lease)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lease.lost.wait(), 3)
        assert await etcd.get("/lepton/p/worker") is not None
    assert lease.lost.is_set()
    assert await etcd.get("/lepton/p/worker") is None


async def test_a_lease_that_etcd_no_longer_has_is_lost(etcd: EtcdClient) -> None:
    async with etcd.lease(3) as lease:
        await etcd.revoke(lease.id)
        with pytest.raises(LeaseLost):
            await etcd.put("/lepton/p/worker", b"here", lease=lease)
        await asyncio.wait_for(lease.lost.wait(), 3)
        with pytest.raises(LeaseLost):
            await etcd.put("/lepton/p/worker", b"here", lease=lease)


async def test_a_lease_survives_a_restart_of_etcd(server: Process, private: EtcdClient) -> None:
    async with private.lease(10) as lease:
        await private.put("/lepton/p/worker", b"here", lease=lease)
        server.kill()
        with running(server.recipe):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(lease.lost.wait(), 4)
            await private.put("/lepton/p/worker", b"still here", lease=lease)


async def test_a_holder_fences_itself_before_etcd_gives_the_key_away(server: Process, private: EtcdClient) -> None:
    async with private.lease(3) as lease:
        await private.put("/lepton/p/worker", b"here", lease=lease)
        server.freeze()
        started = time.monotonic()
        await lease.lost.wait()
        assert time.monotonic() - started < 3
        server.send(signal.SIGCONT)
        with pytest.raises(LeaseLost):
            await private.put("/lepton/p/worker", b"here", lease=lease)


async def test_a_former_leader_cannot_write_over_its_successors_work(etcd: EtcdClient) -> None:
    await etcd.put("/lepton/p/leader", b"first")
    first = await etcd.get("/lepton/p/leader")
    revision = await etcd.put_if_unchanged("/lepton/p/work", b"by first", 0, fence=first)
    await etcd.delete("/lepton/p/leader")
    await etcd.put("/lepton/p/leader", b"second")
    with pytest.raises(Conflict):
        await etcd.put_if_unchanged("/lepton/p/work", b"by first", revision, fence=first)
    second = await etcd.get("/lepton/p/leader")
    await etcd.put_if_unchanged("/lepton/p/work", b"by second", revision, fence=second)
