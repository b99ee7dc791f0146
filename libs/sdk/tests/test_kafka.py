from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from lepton.kafka import Kafka, MockKafka, find_java, find_kafka, kafka_libs_folders
from lepton.processes import running


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


# --- the archive of its classes ---------------------------------------------------------------------------------------


def test_the_archive_that_setup_made_is_used(real_kafka: Kafka) -> None:
    if not real_kafka.runtime.archive.exists():
        pytest.skip("its classes are not archived: `python -m lepton.kafka_jars`")
    with running(real_kafka) as process:
        assert str(real_kafka.runtime.archive) in Path(f"/proc/{process.pid}/maps").read_text()


def test_an_archive_that_is_of_no_use_is_passed_over(real_kafka: Kafka, tmp_path: Path) -> None:
    libs = tmp_path / "libs"
    libs.mkdir()
    for jar in real_kafka.runtime.libs.glob("*.jar"):
        (libs / jar.name).symlink_to(jar)
    runtime = replace(real_kafka.runtime, libs=libs)
    runtime.archive.write_bytes(b"another Java's")

    with running(replace(real_kafka, runtime=runtime)) as process:
        assert "classes.jsa" not in process.log.read_text()
