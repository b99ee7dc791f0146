"""What a local platform consists of: every part's recipe, with the addresses through which they find each other."""

import hashlib
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from lepton.envoy import Envoy
from lepton.home import Home, Layout
from lepton.kafka import Kafka, MockKafka, find_kafka
from lepton.ports import free_ports, is_free
from lepton.processes import Recipe, http_get
from lepton.servers import Etcd, Postgres

FRONT_PORT = 8080


@dataclass(frozen=True, slots=True)
class Service:
    """One of Lepton's own services, run by this interpreter."""

    name: str
    folder: Path
    module: str
    port: int
    settings: dict[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM

    def prepare(self) -> None: ...

    def argv(self) -> list[str]:
        return [sys.executable, "-m", self.module]

    def environment(self) -> dict[str, str]:
        own = {"LEPTON_HOST": "127.0.0.1", "LEPTON_PORT": str(self.port), "LEPTON_INSTANCE": self.name}
        return {**own, **self.settings}

    def not_ready(self) -> str | None:
        try:
            status, body = http_get(self.port, "/health/ready")
        except OSError as error:
            return str(error)
        return None if status == 200 else body.decode(errors="replace")[:300]


def worker_pools(workers: int, pools: Mapping[str, int]) -> dict[str, str]:
    """The pool of every worker by the worker's name, "" for the usual one."""
    names = {f"worker-{number}": "" for number in range(1, workers + 1)}
    return names | {f"worker-{pool}-{number}": pool for pool, count in pools.items() for number in range(1, count + 1)}


def choose_ports(
    front: int | None,
    workers: int,
    before: dict[str, int],
    *,
    keep: bool,
    pools: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, int]:
    """Every role's port. Those chosen `before` stay, unless something else took one meanwhile; with `keep` they stay
    in any case, because a part that still runs knows them. The front door is at 8080 when that is free."""
    roles = ["front", "mesh", "envoy-admin", "kafka", "kafka-controller", "postgres", "etcd", "etcd-peer"]
    roles += ["registry", "rollout", "monitor", "gateway", "gateway-grpc", "gateway-admin"]
    roles += worker_pools(workers, pools)
    wanted = {"front": FRONT_PORT} | before
    if front and not keep:
        wanted["front"] = front
    spare = iter(free_ports(len(roles)))
    return {role: wanted[role] if role in wanted and (keep or is_free(wanted[role])) else next(spare) for role in roles}


def make_parts(
    home: Home, ports: dict[str, int], workers: int, pools: Mapping[str, int] = MappingProxyType({})
) -> tuple[Layout, list[list[Recipe]]]:
    """Every part of the platform in three stages: the servers, Lepton's services on them, Envoy before these.

    LEPTON_KAFKA, LEPTON_POSTGRES_DSN and LEPTON_ETCD name existing servers that are used instead of own ones.
    """
    servers: list[Recipe] = []
    settings = {name: os.environ.get(name, "") for name in ("LEPTON_KAFKA", "LEPTON_POSTGRES_DSN", "LEPTON_ETCD")}
    if not settings["LEPTON_POSTGRES_DSN"]:
        postgres = Postgres(home.folder / "postgres", ports["postgres"])
        postgres.folder.mkdir(exist_ok=True)  # for the password, which the services need before the server runs
        servers.append(postgres)
        settings["LEPTON_POSTGRES_DSN"] = postgres.dsn
    if not settings["LEPTON_ETCD"]:
        etcd = Etcd(home.folder / "etcd", ports["etcd"], ports["etcd-peer"])
        servers.append(etcd)
        settings["LEPTON_ETCD"] = etcd.address
    if not settings["LEPTON_KAFKA"]:
        kafka = _kafka(home, ports)
        servers.append(kafka)
        settings["LEPTON_KAFKA"] = kafka.address
    upstreams = {name: ports[name] for name in ("gateway", "gateway-grpc", "registry", "rollout", "monitor")}
    folder, mesh_dir = home.folder / "envoy", home.folder / "mesh"
    envoy = Envoy(folder, mesh_dir, upstreams, ports["front"], ports["mesh"], ports["envoy-admin"])
    services = _services(home, ports, worker_pools(workers, pools), envoy, settings)
    stages: list[list[Recipe]] = [servers, services, [envoy]]
    names = [part.name for stage in stages for part in stage]
    return Layout(envoy.url, settings["LEPTON_KAFKA"], ports, names, workers, dict(pools)), stages


def _kafka(home: Home, ports: dict[str, int]) -> Kafka | MockKafka:
    """The real broker where its jars and Java are, else librdkafka's mock of one."""
    if runtime := find_kafka():
        return Kafka(home.folder / "kafka", runtime, ports["kafka"], ports["kafka-controller"])
    return MockKafka(home.folder / "kafka", ports["kafka"])


def _services(
    home: Home, ports: dict[str, int], workers: Mapping[str, str], envoy: Envoy, servers: dict[str, str]
) -> list[Recipe]:
    """registry, rollout, monitor, gateway and the workers, with their pools; `servers` are the settings all have."""
    blobs = str(home.folder / "blobs")
    # Workers share the machine's cores.
    instances = max(1, (os.cpu_count() or 1) // len(workers))
    own: dict[str, dict[str, str]] = {
        "registry": {
            "LEPTON_BLOBS": blobs,
            "LEPTON_STAGING": str(home.folder / "registry" / "staging"),
            "LEPTON_BOOTSTRAP_KEY_SHA256": hashlib.sha256(home.key().encode()).hexdigest(),
        },
        "rollout": {"LEPTON_MESH_DIR": str(envoy.mesh_dir), "LEPTON_ENVOY_ADMIN": envoy.admin},
        "monitor": {},
        "gateway": {
            "LEPTON_GATEWAY_ID": "gateway",
            "LEPTON_GRPC_PORT": str(ports["gateway-grpc"]),
            "LEPTON_MESH": envoy.mesh,
            "LEPTON_ADMIN_PORT": str(ports["gateway-admin"]),
            "LEPTON_ROLLOUT_URL": f"http://127.0.0.1:{ports['rollout']}",
            "LEPTON_KEYLESS_LOOPBACK": "true",
        },
    }
    for name, pool in workers.items():
        own[name] = {
            "LEPTON_WORKER_ID": name,
            "LEPTON_BLOBS": blobs,
            "LEPTON_CACHE": str(home.folder / name / "cache"),
            "LEPTON_INSTANCES": os.environ.get("LEPTON_INSTANCES") or str(instances),
            **({"LEPTON_POOL": pool} if pool else {}),
        }
    return [
        Service(name, home.folder / name, f"lepton_{name.partition('-')[0]}.main", ports[name], {**servers, **settings})
        for name, settings in own.items()
    ]
