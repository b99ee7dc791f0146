"""Ports on loopback for servers that are about to start."""

import os
import random
import socket
from collections import deque

# Below the range the kernel picks outgoing ports from, so that a client cannot take a stopped server's port.
_PORTS = range(20_000, 32_000)
# Descriptors of sockets bound to ports where somebody is about to listen. Module state on purpose: ports are the whole
# process's, and the kernel takes them back when it ends, however it ends.
_promises: deque[int] = deque()
_MOST_PROMISES = 100


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports on loopback on which nothing listens. Until this process has ended, or has asked for
    a hundred others, they are in use to who looks by `free_ports`, or binds without SO_REUSEADDR."""
    found: list[int] = []
    while len(found) < count:
        port = random.choice(_PORTS)  # noqa: S311 - spreads, guards nothing
        if port not in found and _promise(port):
            found.append(port)
    return found


def _promise(port: int) -> bool:
    """The port is kept for who is about to listen there; False when it is in use or kept already.

    A socket that is bound and does not listen keeps away every other one without SO_REUSEADDR, as these are when they
    are bound, and lets in servers, which set it.
    """
    with socket.socket() as promise:
        try:
            promise.bind(("127.0.0.1", port))
        except OSError:
            return False
        promise.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _promises.append(promise.detach())
    if len(_promises) > _MOST_PROMISES:
        os.close(_promises.popleft())
    return True


def free_port() -> int:
    return free_ports(1)[0]


def is_free(port: int) -> bool:
    """True when a server could listen on the loopback port now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
