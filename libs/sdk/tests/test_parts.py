import socket
from pathlib import Path

import pytest
from lepton import parts
from lepton.cli import app
from lepton.home import Home
from lepton.parts import Service, choose_ports, make_parts
from lepton.ports import free_port
from typer.testing import CliRunner


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path)
    home.create()
    return home


@pytest.fixture(autouse=True)
def no_servers_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LEPTON_KAFKA", "LEPTON_POSTGRES_DSN", "LEPTON_ETCD"):
        monkeypatch.delenv(name, raising=False)


def test_ports_stay_what_they_were() -> None:
    first = choose_ports(free_port(), 2, {}, keep=False)
    assert len(set(first.values())) == len(first)
    assert choose_ports(None, 2, first, keep=False) == first


def test_only_the_port_that_was_taken_meanwhile_changes() -> None:
    before = choose_ports(free_port(), 1, {}, keep=False)
    with socket.create_server(("127.0.0.1", before["etcd"])):
        after = choose_ports(None, 1, before, keep=False)
        assert {role for role in after if after[role] != before[role]} == {"etcd"}
        # As long as any part runs, the others know it at its old address.
        assert choose_ports(free_port(), 1, before, keep=True) == before


def test_another_number_of_workers_keeps_the_other_ports() -> None:
    two = choose_ports(free_port(), 2, {}, keep=False)
    three = choose_ports(None, 3, two, keep=False)
    assert set(three) - set(two) == {"worker-3"}
    assert two.items() <= three.items()


def test_front_door_moves_when_asked_to() -> None:
    before = choose_ports(free_port(), 1, {}, keep=False)
    port = free_port()
    assert choose_ports(port, 1, before, keep=False)["front"] == port


def test_taken_usual_port_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(parts, "FRONT_PORT", other.getsockname()[1])
        assert choose_ports(None, 1, {}, keep=False)["front"] != other.getsockname()[1]


def test_parts_find_each_other(home: Home) -> None:
    ports = choose_ports(free_port(), 2, {}, keep=False)
    layout, stages = make_parts(home, ports, 2)
    services = {part.name: part for part in stages[1] if isinstance(part, Service)}
    assert layout.parts == [
        "postgres",
        "etcd",
        "kafka",
        "registry",
        "rollout",
        "monitor",
        "gateway",
        "worker-1",
        "worker-2",
        "envoy",
    ]
    assert layout.url == f"http://127.0.0.1:{ports['front']}"
    for service in services.values():
        assert service.environment()["LEPTON_ETCD"] == f"127.0.0.1:{ports['etcd']}"
        assert service.environment()["LEPTON_KAFKA"] == layout.kafka
        assert service.environment()["LEPTON_PORT"] == str(ports[service.name])
    assert services["gateway"].settings["LEPTON_MESH"] == f"127.0.0.1:{ports['mesh']}"
    assert services["worker-1"].settings["LEPTON_CACHE"] != services["worker-2"].settings["LEPTON_CACHE"]
    assert services["worker-1"].settings["LEPTON_BLOBS"] == services["registry"].settings["LEPTON_BLOBS"]


def test_other_pools_have_workers_of_their_own(home: Home) -> None:
    pools = {"canary": 2}
    ports = choose_ports(free_port(), 1, {}, keep=False, pools=pools)
    layout, stages = make_parts(home, ports, 1, pools)
    workers = {part.name: part for part in stages[1] if isinstance(part, Service) and part.name.startswith("worker")}
    assert list(workers) == ["worker-1", "worker-canary-1", "worker-canary-2"]
    assert {part.module for part in workers.values()} == {"lepton_worker.main"}
    assert [part.settings.get("LEPTON_POOL") for part in workers.values()] == [None, "canary", "canary"]
    assert len({part.port for part in workers.values()}) == 3
    home.save_layout(layout)
    assert home.layout() == layout


@pytest.mark.parametrize("pool", ["canary", "canary=", "canary=-1", "Canary=1", "canary=100", "../x=1", "=1"])
def test_a_pool_that_cannot_be_is_refused_before_anything_starts(pool: str, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["up", "--home", str(tmp_path / "home"), "--pool", pool])
    assert refused.exit_code == 2
    assert "expected a pool and its workers" in refused.output
    assert not (tmp_path / "home").exists()


def test_existing_servers_are_used_instead_of_own_ones(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"LEPTON_KAFKA": "k:9092", "LEPTON_POSTGRES_DSN": "postgresql://u:p@p/db", "LEPTON_ETCD": "e:2379"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    layout, stages = make_parts(home, choose_ports(free_port(), 1, {}, keep=False), 1)
    assert layout.parts == ["registry", "rollout", "monitor", "gateway", "worker-1", "envoy"]
    assert stages[0] == []
    for service in stages[1]:
        assert given.items() <= service.environment().items()


def test_machine_without_kafka_gets_the_mock_and_says_so(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "find_kafka", lambda: None)
    layout, _ = make_parts(home, choose_ports(free_port(), 1, {}, keep=False), 1)
    assert layout.kafka.startswith("mock://")
