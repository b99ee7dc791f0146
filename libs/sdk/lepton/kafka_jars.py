"""Fetches Kafka's jars with Maven: `python -m lepton.kafka_jars FOLDER`, once per machine."""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lepton.kafka import Kafka, KafkaRuntime, find_java
from lepton.processes import Process, StartFailed

KAFKA_VERSION = "4.4.0"
LOG4J_VERSION = "2.25.5"  # the one this Kafka brings; the binding must match it

_POM = f"""\
<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>lepton</groupId>
  <artifactId>kafka</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>{KAFKA_VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.apache.logging.log4j</groupId>
      <artifactId>log4j-slf4j-impl</artifactId>
      <version>{LOG4J_VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""


def fetch_kafka(into: Path) -> bool:
    """True when `into` has the jars of Kafka (43 MB), fetched now if it lacked them; False when Maven is not there.

    Raises subprocess.CalledProcessError when Maven fails, having said why on the terminal."""
    wanted = [f"kafka_2.13-{KAFKA_VERSION}.jar", f"log4j-slf4j-impl-{LOG4J_VERSION}.jar"]
    if all((into / jar).exists() for jar in wanted):
        return True
    into.parent.mkdir(parents=True, exist_ok=True)
    maven = shutil.which("mvn")
    if maven is None:
        return False
    with tempfile.TemporaryDirectory(dir=into.parent) as folder:
        (Path(folder) / "pom.xml").write_text(_POM)
        goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory=libs"]
        subprocess.run([maven, "--batch-mode", "--quiet", *goal], cwd=folder, check=True)
        # Renamed when whole: an interrupted fetch leaves nothing that looks like Kafka.
        shutil.rmtree(into, ignore_errors=True)
        (Path(folder) / "libs").rename(into)
    return True


@dataclass(frozen=True, slots=True)
class _Archiving(Kafka):
    """A broker that writes its classes down when it ends."""

    def argv(self) -> list[str]:
        java, *rest = Kafka.argv(self)
        return [java, f"-XX:ArchiveClassesAtExit={_fresh(self.runtime)}", *rest]


def archive_classes(runtime: KafkaRuntime) -> None:
    """What Kafka's classes come to once they are loaded and verified is kept beside the jars, for this Java, and in
    place of what another one left. Raises StartFailed and OSError."""
    runtime.archive.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        process = Process.start(_Archiving(Path(folder), runtime))
        try:
            process.wait_ready()
        finally:
            process.stop(timeout_s=60)  # It writes now.
    _fresh(runtime).rename(runtime.archive)


def _fresh(runtime: KafkaRuntime) -> Path:
    return runtime.archive.with_suffix(".new")


def _hasten(libs: Path) -> None:
    if java := find_java():
        try:
            archive_classes(KafkaRuntime(java, libs))
        except (StartFailed, OSError) as error:
            sys.stdout.write(f"WARNING: Kafka's classes could not be archived, so it starts more slowly: {error}\n")


def main() -> None:
    into = Path(sys.argv[1]).resolve()
    if fetch_kafka(into):
        _hasten(into)
        sys.stdout.write(f"Kafka {KAFKA_VERSION} is in {into}\n")
    else:
        sys.stdout.write(
            "WARNING: Maven (mvn) is not on PATH, so Kafka's jars were not fetched.\n"
            "Lepton will run on librdkafka's mock broker: events do not survive a restart.\n"
        )


if __name__ == "__main__":
    main()
