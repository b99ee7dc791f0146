import asyncio
import json
import socket
import stat
import urllib.request
from pathlib import Path

import asyncpg
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from lepton.processes import Process, StartFailed, free_port, running
from lepton.servers import (
    Etcd,
    Kafka,
    MockKafka,
    Postgres,
    find_java,
    find_kafka,
    kafka_libs_folders,
    kept_secret,
)

# base64 of "a" and "b", as etcd's JSON gateway wants them
A, B = "YQ==", "Yg=="


def ask_etcd(etcd: Etcd, what: str, request: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    body = json.dumps(request).encode()
    with urllib.request.urlopen(f"http://{etcd.address}/v3/kv/{what}", data=body, timeout=5) as answer:
        content: dict[str, list[dict[str, str]]] = json.load(answer)
        return content


def produce(address: str, topic: str, text: str) -> None:
    producer = Producer({"bootstrap.servers": address, "acks": "all"})
    producer.produce(topic, text)
    assert producer.flush(20) == 0


def first_message(address: str, topic: str) -> str:
    settings = {"bootstrap.servers": address, "group.id": "test", "auto.offset.reset": "earliest"}
    consumer = Consumer(settings)
    try:
        consumer.subscribe([topic])
        message = consumer.poll(30)
        assert message is not None
        assert message.error() is None
        value = message.value()
        assert value is not None
        return value.decode()
    finally:
        consumer.close()


@pytest.fixture
def real_kafka(tmp_path: Path) -> Kafka:
    runtime = find_kafka()
    if runtime is None:
        pytest.skip("no Kafka jars or no Java: `lepton doctor`")
    return Kafka(tmp_path / "kafka", runtime)


def test_etcd_keeps_what_it_acknowledged_over_a_kill_and_a_move_to_other_ports(tmp_path: Path) -> None:
    etcd = Etcd(tmp_path / "etcd")
    with running(etcd) as process:
        ask_etcd(etcd, "put", {"key": A, "value": B})
        process.kill()
    moved = Etcd(etcd.folder)
    with running(moved):
        assert ask_etcd(moved, "range", {"key": A})["kvs"][0]["value"] == B


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


def test_kafka_keeps_messages_over_a_kill_and_a_move_to_other_ports(real_kafka: Kafka) -> None:
    with running(real_kafka) as process:
        admin = AdminClient({"bootstrap.servers": real_kafka.address})
        admin.create_topics([NewTopic("facts", 1)])["facts"].result(20)
        produce(real_kafka.address, "facts", "kept")
        process.kill()
    moved = Kafka(real_kafka.folder, real_kafka.runtime)
    with running(moved):
        assert first_message(moved.address, "facts") == "kept"


def test_mock_kafka_has_the_same_address_after_a_restart(tmp_path: Path) -> None:
    mock = MockKafka(tmp_path / "kafka")
    assert mock.address == f"mock://127.0.0.1:{mock.port}"
    for text in ("first", "second"):
        with running(mock):
            produce(f"127.0.0.1:{mock.port}", "facts", text)
            # Nothing is left of the first life.
            assert first_message(f"127.0.0.1:{mock.port}", "facts") == text


def test_port_in_use_is_told_with_the_servers_own_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = Process.start(Etcd(tmp_path / "etcd", port=other.getsockname()[1]))
        with pytest.raises(StartFailed, match="address already in use"):
            process.wait_ready(20)


def test_servers_that_nobody_started_are_not_ready(tmp_path: Path) -> None:
    for server in (Etcd(tmp_path), Postgres(tmp_path), MockKafka(tmp_path)):
        assert server.not_ready() is not None


def test_old_java_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_392\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert find_java() != str(java)
    java.write_text("#!/bin/sh\necho 'openjdk version \"21.0.1\" 2023-10-17' >&2\n")
    assert find_java() == str(java)


def test_kafkas_folder_can_be_named_and_must_hold_kafka(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_KAFKA_LIBS", str(tmp_path))
    assert kafka_libs_folders()[0] == tmp_path
    runtime = find_kafka()
    assert runtime is None or runtime.libs != tmp_path


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
