"""Who calls: by API key, or without one from this machine where the operator allows it."""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit

from lepton_common.auth import DEFAULT_TENANT, Caller, Keys, authorise, check_operator, secret_of
from lepton_common.errors import Denied, Forbidden, Unauthenticated
from lepton_common.http11 import Request
from lepton_common.journal import origin
from lepton_common.records import Scope

_LOCAL = Caller(tenant=DEFAULT_TENANT, scopes=frozenset({Scope.INFER}), key_id="", name="loopback")


class Callers:
    def __init__(self, keys: Keys, *, keyless_loopback: bool) -> None:
        self._keys = keys
        self._keyless_loopback = keyless_loopback

    def check(self, request: Request, scope: Scope, model: str | None = None) -> Caller:
        """The caller, who has the scope, and is for the model. Raises Unauthenticated or Forbidden."""
        headers = request.headers
        return self.check_head(headers, headers.get(b"host", b""), request.peer, scope, model)

    def check_head(
        self, headers: Mapping[bytes, bytes], host: bytes, peer: str, scope: Scope, model: str | None = None
    ) -> Caller:
        """`check`, of a request whose body is not there yet."""
        secret = secret_of(headers.get(b"authorization"), headers.get(b"x-api-key"))
        if secret is not None:
            return self._keys.check(secret, scope, datetime.now(UTC), model)
        if not (self._keyless_loopback and _is_local(peer, headers.get(b"x-forwarded-for", b""))):
            raise Unauthenticated("send an API key as Authorization: Bearer lp_…")
        if foreign := _foreign_header(host, headers.get(b"origin")):
            raise Forbidden(
                f"header {foreign}: without an API key only programs and pages of this machine may call, and only as"
                " localhost or 127.0.0.1; send Authorization: Bearer lp_…"
            )
        if not _LOCAL.has(scope):
            raise Forbidden(f"this needs an API key with the scope {scope.value!r}")
        return _LOCAL

    def check_reader(self, request: Request, model: str | None = None) -> Caller:
        """The caller, who may look at the model, or at all that they see: whoever may use or read them."""
        try:
            caller = self.check(request, Scope.INFER)
        except Forbidden:
            caller = self.check(request, Scope.READ)
        authorise(caller, None, model=model)
        return caller

    def tenant_of(self, authorization: bytes) -> str:
        """Whose key or token it is; "" when it opens nothing. Nobody is refused by this, and nothing noted."""
        try:
            secret = secret_of(authorization, None)
            return "" if secret is None else self._keys.check(secret, Scope.INFER, datetime.now(UTC)).tenant
        except Denied:
            return ""

    def check_operator(self, request: Request) -> None:
        """Raises Unauthenticated or Forbidden unless the caller is the operator."""
        check_operator(self.check(request, Scope.ADMIN))

    def refused(self, headers: Mapping[bytes, bytes], peer: str, error: Denied, what: str) -> None:
        """The refusal is noted, for the audit."""
        self._keys.journal.refused(error, origin(peer, headers.get(b"x-forwarded-for")), what)


@lru_cache(maxsize=1024)
def _is_local(peer: str, forwarded: bytes) -> bool:
    """Whether the peer, and everyone it says it speaks for, is on loopback."""
    callers = [peer, *(each.strip() for each in forwarded.decode("latin-1").split(",") if each.strip())]
    try:
        return all(ip_address(caller).is_loopback for caller in callers)
    except ValueError:
        return False


@lru_cache(maxsize=1024)
def _foreign_header(host: bytes, origin: bytes | None) -> str | None:
    """The header by which a page from elsewhere gives itself away, in a browser on this machine; None without one.

    Browsers say whose page it is that sends something. For a page whose name was made to resolve to this machine (DNS
    rebinding) they think that it talks to its own server, but then they ask for that by the page's name.
    """
    if origin is not None and not _is_this_machine(origin):
        return "origin"
    return None if _is_this_machine(b"//" + host) else "host"


def _is_this_machine(url: bytes) -> bool:
    try:
        name = urlsplit(url.decode("latin-1")).hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False
