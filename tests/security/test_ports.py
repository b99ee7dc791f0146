"""Who can reach what: by default nothing of a platform listens beyond this machine, and metrics are apart."""

from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address

import psutil

from ..integration.local_platform import Platform
from .hostile import calling


def test_everything_listens_on_loopback_alone(platform: Platform) -> None:
    supervisor = platform.home.supervisor_pid()
    assert supervisor
    bound = list(_bound(psutil.Process(supervisor)))
    for address, port in bound:
        ip = ip_address(address)
        mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
        assert (mapped or ip).is_loopback, (address, port)
    assert set(platform.layout.ports.values()) <= {port for _, port in bound}


def test_metrics_are_not_on_the_ports_of_callers(platform: Platform) -> None:
    ports = platform.layout.ports
    for port in (ports["front"], ports["gateway"]):
        with calling(port, platform.key) as caller:
            for path in ("/metrics", "/v2/metrics", "/v2/../metrics", "//metrics", "/v2/%2e%2e/metrics"):
                assert caller.ask("GET", path)[0] == 404, path
    with calling(ports["gateway-admin"]) as caller:
        status, text = caller.ask("GET", "/metrics")
        assert status == 200
        assert "lepton_gateway_connections" in text


def test_paths_of_the_services_themselves_are_not_at_the_front_door(platform: Platform) -> None:
    with calling(platform.port, platform.key) as caller:
        for path in (
            "/openapi.json",
            "/health/ready",
            "/docs",
            "/v1/openapi.json",
            "/stats",
            "/quitquitquit",
            "/config_dump",
        ):
            assert caller.ask("GET", path)[0] == 404, path
            assert caller.ask("POST", path)[0] in {404, 405}, path


def _bound(process: psutil.Process) -> Iterator[tuple[str, int]]:
    """The addresses on which the process and its children take connections or datagrams."""
    for each in (process, *process.children(recursive=True)):
        for connection in each.net_connections("inet"):
            if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and connection.laddr:
                yield connection.laddr.ip, connection.laddr.port
