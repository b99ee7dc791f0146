"""Calls to hosts that somebody else named: only over TLS, only to addresses that were checked, and never elsewhere."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import httpx

from lepton_common.errors import Forbidden, Invalid, Unavailable

_RESOLVE_S = 5.0
_TIMEOUT = httpx.Timeout(10.0)
# Behind it stands an IPv4 address, which the network's translator would dial.
_NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Outbound:
    """`private`: whether hosts may have addresses that are not public. `tls` None trusts the usual authorities."""

    private: bool = False
    tls: ssl.SSLContext | None = None

    @asynccontextmanager
    async def get(self, host: str, port: int, target: str) -> AsyncIterator[httpx.Response]:
        """The answer 200 to GET `target` (path and query) of the host, its body not read yet.

        The name is resolved once, every address it has is checked, and the one that was checked is dialled. Raises
        Forbidden for an address that must not be called, Invalid for any other answer, a redirect among them, and
        Unavailable when the host does not answer, or answers that it cannot just now.
        """
        address = await self._vetted(host, port)
        dialled = f"[{address}]" if ":" in address else address
        tls = self.tls or httpx.create_ssl_context()
        # The environment's proxies would dial for us, whatever we have checked.
        async with httpx.AsyncClient(verify=tls, trust_env=False, timeout=_TIMEOUT) as client:
            request = client.build_request(
                "GET",
                f"https://{dialled}:{port}{target}",
                headers={"host": host if port == 443 else f"{host}:{port}", "accept-encoding": "identity"},
                extensions={"sni_hostname": host},
            )
            try:
                response = await client.send(request, stream=True)
                try:
                    _check(response, host)
                    yield response
                finally:
                    await response.aclose()
            except httpx.TransportError as error:
                raise Unavailable(f"host {host!r} does not answer, or not over TLS as it should") from error

    async def _vetted(self, host: str, port: int) -> str:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_RESOLVE_S):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError, TimeoutError) as error:
            raise Unavailable(f"host {host!r} is not known") from error
        addresses = [str(sockaddr[0]) for *_, sockaddr in found]
        if not self.private and not all_public(addresses):
            raise Forbidden(f"host {host!r} has an address that is not public")
        return addresses[0]


def all_public(addresses: Sequence[str]) -> bool:
    """Whether there are addresses, and all are of the public internet, whatever they are wrapped in."""
    return bool(addresses) and all(_is_public(ip_address(each.partition("%")[0])) for each in addresses)


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _check(response: httpx.Response, host: str) -> None:
    status = response.status_code
    if status == httpx.codes.OK:
        if "content-encoding" in response.headers:
            raise Invalid(f"host {host!r} sent encoded bytes though it was asked not to")
        return
    if response.is_redirect:
        raise Invalid(f"host {host!r} answered {status}: redirects are not followed, name where it leads")
    if status >= 500 or status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.REQUEST_TIMEOUT):
        raise Unavailable(f"host {host!r} answered {status}")
    raise Invalid(f"host {host!r} answered {status}")
