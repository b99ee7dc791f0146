"""Who calls: by API key, or without one from this machine where the operator allows it."""

from datetime import UTC, datetime
from functools import lru_cache
from ipaddress import ip_address

from lepton_common.auth import DEFAULT_TENANT, Caller, Keys, check_operator, secret_of
from lepton_common.errors import Forbidden, Unauthenticated
from lepton_common.http11 import Request
from lepton_common.records import Scope

_LOCAL = Caller(tenant=DEFAULT_TENANT, scopes=frozenset({Scope.INFER}), key_id="", name="loopback")


class Callers:
    def __init__(self, keys: Keys, *, keyless_loopback: bool) -> None:
        self._keys = keys
        self._keyless_loopback = keyless_loopback

    def check(self, request: Request, scope: Scope) -> Caller:
        """The caller, who has the scope. Raises Unauthenticated or Forbidden."""
        headers = request.headers
        secret = secret_of(headers.get(b"authorization"), headers.get(b"x-api-key"))
        if secret is not None:
            return self._keys.check(secret, scope, datetime.now(UTC))
        if not (self._keyless_loopback and _is_local(request.peer, headers.get(b"x-forwarded-for", b""))):
            raise Unauthenticated("send an API key as Authorization: Bearer lp_…")
        if not _LOCAL.has(scope):
            raise Forbidden(f"this needs an API key with the scope {scope.value!r}")
        return _LOCAL

    def check_reader(self, request: Request) -> Caller:
        """The caller, who may look at models: whoever may use or read them."""
        try:
            return self.check(request, Scope.INFER)
        except Forbidden:
            return self.check(request, Scope.READ)

    def check_operator(self, request: Request) -> None:
        """Raises Unauthenticated or Forbidden unless the caller is the operator."""
        check_operator(self.check(request, Scope.ADMIN))


@lru_cache(maxsize=1024)
def _is_local(peer: str, forwarded: bytes) -> bool:
    """Whether the peer, and everyone it says it speaks for, is on loopback."""
    callers = [peer, *(each.strip() for each in forwarded.decode("latin-1").split(",") if each.strip())]
    try:
        return all(ip_address(caller).is_loopback for caller in callers)
    except ValueError:
        return False
