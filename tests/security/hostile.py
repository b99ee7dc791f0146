"""What the security tests send, and what no answer may carry."""

import http.client
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ..integration.local_platform import Platform

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "MKCOL", "PURGE", "QUERY")
# The services that listen for HTTP, behind the front door.
INSIDE = ("registry", "rollout", "monitor", "gateway", "worker-1")
SERVICE_OF = {
    "/v1/rollouts": "rollout",
    "/v1/policies": "rollout",
    "/v1/mesh": "rollout",
    "/v1/serving": "rollout",
    "/v1/windows": "monitor",
    "/v1/labels": "monitor",
    "/v1/": "registry",
    "/v2": "gateway",
}


def service_of(path: str) -> str:
    """Who answers a path of the front door."""
    return next(service for prefix, service in SERVICE_OF.items() if path.startswith(prefix))


class Caller:
    """One kept connection to a port of this machine that sends paths exactly as they are."""

    def __init__(self, port: int, headers: dict[str, str]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._headers = headers

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        """Status and body of the answer. A connection that the server closed after it is opened again."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, body, {**self._headers, **named})
        answer = self._connection.getresponse()
        text = answer.read().decode("latin-1")
        assert answer.headers["access-control-allow-origin"] is None, (method, path)
        return answer.status, text

    def close(self) -> None:
        self._connection.close()


@contextmanager
def calling(port: int, key: str | None = None, **headers: str) -> Iterator[Caller]:
    """A caller with that key."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    caller = Caller(port, named | ({"authorization": f"Bearer {key}"} if key else {}))
    try:
        yield caller
    finally:
        caller.close()


def secrets_of(platform: Platform) -> list[str]:
    """What belongs to the platform alone."""
    return [platform.key, (platform.home.folder / "postgres" / "password").read_text().strip()]


def assert_tells_nothing(platform: Platform, text: str) -> None:
    """The text has no secret, no path of this machine, no name of it, no address inside and no traceback."""
    for secret in secrets_of(platform):
        assert secret not in text
    inside = {port for role, port in platform.layout.ports.items() if role != "front"}
    assert not {port for port in inside if f":{port}" in text}, text
    assert str(platform.home.folder) not in text
    assert not re.search(r"Traceback|site-packages|\.py\b|/tmp/|/root/|/home/|/usr/", text), text
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text), text
