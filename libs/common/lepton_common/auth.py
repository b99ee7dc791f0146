"""API keys, checked in memory: etcd holds them by the sha256 of their secret, every service mirrors the table.

A secret is 256 random bits, so a fast hash is enough, and looking up its digest needs no constant-time comparison: how
far a guess's digest agrees with a stored one says nothing about the secret, and a caller cannot steer it.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import datetime

from lepton_common.errors import Forbidden, Unauthenticated, Unavailable
from lepton_common.etcd import EtcdClient
from lepton_common.mirror import Mirror
from lepton_common.records import KEYS, KeyLimits, KeyRecord, Scope

_SECRET = re.compile(r"lp_[A-Za-z0-9_-]{43}")
_PREFIX_CHARS = 11
_REMEMBERED = 10_000

# The tenant of whoever runs the platform: its admins are the operator's.
DEFAULT_TENANT = "default"

# What a scope brings with it: who changes what is served has to see it, and may try a version before others get it.
_IMPLIED = {
    Scope.DEPLOY: frozenset({Scope.READ, Scope.TEST}),
    Scope.ADMIN: frozenset(Scope),
}

# Of every key without limits, so that `is` tells it.
NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, by which key."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str
    name: str
    models: tuple[str, ...] = ()
    limits: KeyLimits = NO_LIMITS

    def has(self, scope: Scope) -> bool:
        """Whether the caller may do what needs the scope: `deploy` may also read and test, `admin` everything."""
        return scope in self.scopes or any(scope in _IMPLIED.get(each, ()) for each in self.scopes)


class Keys:
    """The live table of keys. A new or revoked key counts as soon as etcd has told of it, well under a second."""

    def __init__(self, etcd: EtcdClient) -> None:
        """`mirror` is to be run by the service; it also says how stale the table is."""
        self.mirror = Mirror(etcd, KEYS, KeyRecord.model_validate_json, self._forget)
        # The hot path is one lookup here. Only secrets of real keys get in, so guesses cannot fill it.
        self._remembered: dict[str, tuple[Caller, datetime | None]] = {}

    def check(self, secret: str, scope: Scope, now: datetime) -> Caller:
        """Who calls, from memory alone.

        Raises Unauthenticated for an unknown or expired key, Forbidden for one without the scope, and Unavailable as
        long as the table was never read. `now` is aware of its time zone.
        """
        caller, expires_at = self._remembered.get(secret) or self._find(secret)
        if expires_at is not None and now >= expires_at:
            raise Unauthenticated("this API key has expired")
        if not caller.has(scope):
            raise Forbidden(f"this API key does not have the scope {scope.value!r}")
        return caller

    def _find(self, secret: str) -> tuple[Caller, datetime | None]:
        if not _SECRET.fullmatch(secret):
            raise Unauthenticated("not an API key: expected lp_ and 43 letters, digits, - or _")
        record = self.mirror.items.get(digest(secret))
        if record is None:
            if not self.mirror.is_synced:
                raise Unavailable("the table of API keys is not loaded yet", retry_after_s=1)
            raise Unauthenticated("unknown API key")
        limits = NO_LIMITS if record.limits == NO_LIMITS else record.limits
        caller = Caller(record.tenant, record.scopes, record.id, record.name, record.models, limits)
        found = caller, record.expires_at
        if len(self._remembered) >= _REMEMBERED:
            self._remembered.clear()
        self._remembered[secret] = found
        return found

    def _forget(self, key: str, record: KeyRecord | None) -> None:
        self._remembered.clear()


def check_operator(caller: Caller) -> None:
    """For what concerns every tenant: raises Forbidden unless the caller is the operator, an admin of `default`."""
    if not caller.has(Scope.ADMIN) or caller.tenant != DEFAULT_TENANT:
        raise Forbidden(f"this concerns every tenant: only an admin key of the tenant {DEFAULT_TENANT!r} may do this")


def new_secret() -> tuple[str, str, str]:
    """A fresh key: its secret (shown once), the secret's sha256 in hex, and the prefix that tells it from others."""
    secret = f"lp_{secrets.token_urlsafe(32)}"
    return secret, digest(secret), secret[:_PREFIX_CHARS]


def digest(secret: str) -> str:
    """What etcd knows of a secret: its sha256 in hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def secret_of(authorization: bytes | None, api_key: bytes | None) -> str | None:
    """The secret in the values of the headers `Authorization: Bearer lp_…` and `x-api-key: lp_…`; None without either.

    Authorization counts when both are there, unless it is empty. Raises Unauthenticated when it has another scheme.
    """
    if not authorization:
        return None if api_key is None else api_key.strip().decode("latin-1")
    scheme, _, secret = authorization.strip().partition(b" ")
    if scheme.lower() != b"bearer":
        raise Unauthenticated("send the API key as Authorization: Bearer lp_…")
    return secret.strip().decode("latin-1")
