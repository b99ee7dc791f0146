"""Ports for servers that are about to start: each is given to one."""

import socket

import pytest
from lepton import ports
from lepton.ports import free_ports, is_free


def test_free_ports_are_distinct_and_not_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not is_free(server.getsockname()[1])
    found = free_ports(50)
    assert len(set(found)) == 50
    assert all(map(is_free, found))
    assert not {*found} & {*free_ports(50)}


def test_more_ports_than_are_kept_are_still_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_PORTS", range(31_000, 31_200))
    assert len(set(free_ports(150))) == 150


def test_a_free_port_is_kept_from_who_looks_for_one_and_open_to_the_server() -> None:
    (port,) = free_ports(1)
    with socket.socket() as another, pytest.raises(OSError, match="in use"):
        another.bind(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
        assert not is_free(port)
