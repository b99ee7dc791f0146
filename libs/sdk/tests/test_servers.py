import asyncio
import socket
import stat
from pathlib import Path

import asyncpg
import grpc
import httpx
import pytest
from aetcd import rpc
from lepton.kafka import MockKafka
from lepton.ports import free_port
from lepton.processes import Process, StartFailed, running
from lepton.servers import Etcd, Postgres, kept_secret


def test_etcd_keeps_what_it_acknowledged_over_a_kill_and_a_move_to_other_ports(tmp_path: Path) -> None:
    etcd = Etcd(tmp_path / "etcd")
    with running(etcd) as process:
        with grpc.insecure_channel(etcd.address) as channel:
            rpc.KVStub(channel).Put(rpc.PutRequest(key=b"a", value=b"b"), timeout=5)
        process.kill()
    moved = Etcd(etcd.folder)
    with running(moved), grpc.insecure_channel(moved.address) as channel:
        [found] = rpc.KVStub(channel).Range(rpc.RangeRequest(key=b"a"), timeout=5).kvs
        assert found.value == b"b"


def test_no_page_in_a_browser_can_write_to_etcd(tmp_path: Path) -> None:
    etcd = Etcd(tmp_path / "etcd")
    put = {"key": "YQ==", "value": "Yg=="}  # base64 of "a" and "b", as etcd's JSON gateway would take them
    with running(etcd), httpx.Client(base_url=f"http://{etcd.address}", trust_env=False) as browser:
        for path in ("/v3/kv/put", "/v3/kv/range", "/v3alpha/kv/put", "/v3beta/kv/put", "/v2/keys/a"):
            assert browser.post(path, json=put, headers={"content-type": "text/plain"}).status_code == 404, path
        assert browser.get("/metrics", headers={"host": f"evil.example:{etcd.port}"}).status_code == 421


async def test_postgres_keeps_what_it_committed_over_a_kill(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path / "postgres")
    with running(postgres) as process:
        connection = await asyncpg.connect(postgres.dsn)
        await connection.execute("CREATE TABLE t AS SELECT 7 AS n")
        await asyncio.to_thread(process.kill)
        connection.terminate()
    with running(postgres):
        connection = await asyncpg.connect(postgres.dsn)
        assert await connection.fetchval("SELECT n FROM t") == 7
        await connection.close()


async def test_postgres_lets_nobody_in_without_its_password(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path / "postgres")
    with running(postgres):
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(
                host="127.0.0.1", port=postgres.port, user="lepton", password="guess", database="postgres"
            )
        assert stat.S_IMODE((tmp_path / "postgres" / "password").stat().st_mode) == 0o600


def test_postgres_does_not_take_a_half_made_cluster_for_a_whole_one(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path / "postgres")
    half = tmp_path / "postgres" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18")
    with running(postgres) as process:
        assert process.alive()


def test_port_in_use_is_told_with_the_servers_own_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = Process.start(Etcd(tmp_path / "etcd", port=other.getsockname()[1]))
        with pytest.raises(StartFailed, match="address already in use"):
            process.wait_ready(20)


def test_servers_that_nobody_started_are_not_ready(tmp_path: Path) -> None:
    for server in (Etcd(tmp_path), Postgres(tmp_path), MockKafka(tmp_path)):
        assert server.not_ready() is not None


def test_secret_stays_what_it_was_and_is_nobody_elses_to_read(tmp_path: Path) -> None:
    path = tmp_path / "key"
    secret = kept_secret(path, "lp_")
    assert secret.startswith("lp_")
    assert len(secret) == len("lp_") + 43
    assert kept_secret(path, "lp_") == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_recipes_choose_ports_of_their_own(tmp_path: Path) -> None:
    first, second = Etcd(tmp_path / "a"), Etcd(tmp_path / "b", port=free_port())
    assert len({first.port, first.peer_port, second.port, second.peer_port}) == 4
