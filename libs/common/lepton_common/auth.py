"""Who calls, and what they may do, from memory: API keys that every service mirrors from etcd, and tokens of an issuer.

A key's secret is 256 random bits, so a fast hash is enough, and looking up its digest needs no constant-time
comparison: how far a guess's digest agrees with a stored one says nothing about the secret, and a caller cannot steer
it.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Protocol

from lepton_common.errors import Forbidden, NotFound, Unauthenticated, Unavailable
from lepton_common.etcd import EtcdClient
from lepton_common.journal import Journal
from lepton_common.mirror import Mirror
from lepton_common.records import KEYS, KeyLimits, KeyRecord, Scope
from lepton_common.types import ModelRef

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
    """Who calls, by which key or token. `models` are patterns of the names that it is for; none of them means all."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str
    name: str
    models: tuple[str, ...] = ()
    limits: KeyLimits = NO_LIMITS

    def has(self, scope: Scope) -> bool:
        """Whether the caller may do what needs the scope: `deploy` may also read and test, `admin` everything."""
        return scope in self.scopes or any(scope in _IMPLIED.get(each, ()) for each in self.scopes)

    def sees(self, model: str) -> bool:
        """Whether the caller may know of its tenant's model of that name."""
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)

    def manages(self, tenant: str) -> bool:
        """Whether the tenant is an admin's to manage: its own, and for one of `default` every tenant."""
        return self.tenant in (tenant, DEFAULT_TENANT)

    def ref(self, model: str) -> ModelRef:
        """The model of that name in the caller's tenant. Raises Forbidden, as `authorise` does."""
        authorise(self, None, model=model)
        return ModelRef(self.tenant, model)


def authorise(caller: Caller, scope: Scope | None, *, model: str | None = None, tenant: str | None = None) -> None:
    """The one rule of who may do what; returns when the caller may.

    Raises Forbidden without the scope, or for a model that none of the key's patterns matches: that is said of the name
    alone, before anything is looked up, so it does not tell whether there is such a model. Raises NotFound for a tenant
    that the caller does not manage. What belongs to a tenant is looked up in the caller's own, and is not found
    elsewhere.
    """
    if scope is not None and not caller.has(scope):
        raise forbidden(caller, f"this API key does not have the scope {scope.value!r}")
    if model is not None and not caller.sees(model):
        patterns = ", ".join(caller.models)
        raise forbidden(caller, f"this API key is for the models {patterns} only, and {model[:80]!r} is none of them")
    if tenant is not None and not caller.manages(tenant):
        raise NotFound(f"no tenant {tenant!r}")


def check_operator(caller: Caller) -> None:
    """For what concerns every tenant: raises Forbidden unless the caller is the operator, an admin of `default`."""
    if not caller.has(Scope.ADMIN) or caller.tenant != DEFAULT_TENANT:
        message = f"this concerns every tenant: only an admin key of the tenant {DEFAULT_TENANT!r} may do this"
        raise forbidden(caller, message)


def forbidden(caller: Caller, message: str) -> Forbidden:
    """The error that says so, and for the audit who was refused."""
    return Forbidden(message, tenant=caller.tenant, key_id=caller.key_id)


class Tokens(Protocol):
    """Verifies the tokens of an issuer; `oidc.IssuerTokens` does."""

    def verify(self, token: str) -> tuple[Caller, datetime]:
        """Who the token speaks for, and until when. Raises Unauthenticated, Forbidden, and Unavailable."""


class Keys:
    """The live table of keys. A new or revoked key counts as soon as etcd has told of it, well under a second.

    `journal` notes who used what and who was refused; see `access.py` for what becomes of it.
    """

    def __init__(self, etcd: EtcdClient, tokens: Tokens | None = None) -> None:
        """`mirror` is to be run by the service; it also says how stale the table is."""
        self.mirror = Mirror(etcd, KEYS, KeyRecord.model_validate_json, lambda key, record: self.forget())
        self.journal = Journal()
        self._tokens = tokens
        # The hot path is one lookup here. Only real keys and valid tokens get in, so guesses cannot fill it.
        self._remembered: dict[str, tuple[Caller, datetime | None]] = {}

    def check(self, secret: str, scope: Scope, now: datetime, model: str | None = None) -> Caller:
        """Who calls, from memory alone; they may do what needs the scope, to the model if one is named.

        `secret` is a key or a token. Raises Unauthenticated for an unknown or expired one, Forbidden as `authorise`,
        and Unavailable as long as the table was never read. `now` is aware of its time zone.
        """
        caller, expires_at = self._remembered.get(secret) or self._find(secret)
        if expires_at is not None and now >= expires_at:
            raise Unauthenticated("this API key has expired", tenant=caller.tenant, key_id=caller.key_id)
        self.journal.used[caller.key_id] = now
        authorise(caller, scope, model=model)
        return caller

    def forget(self) -> None:
        """What keys and tokens were good for is looked up anew."""
        self._remembered.clear()

    def _find(self, secret: str) -> tuple[Caller, datetime | None]:
        found: tuple[Caller, datetime | None]
        if _SECRET.fullmatch(secret):
            found = self._of_key(digest(secret))
        elif self._tokens is not None and not secret.startswith("lp_"):
            found = self._tokens.verify(secret)
        else:
            raise Unauthenticated("not an API key: expected lp_ and 43 letters, digits, - or _")
        if len(self._remembered) >= _REMEMBERED:
            self._remembered.clear()
        self._remembered[secret] = found
        return found

    def _of_key(self, sha256: str) -> tuple[Caller, datetime | None]:
        record = self.mirror.items.get(sha256)
        if record is None:
            if not self.mirror.is_synced:
                raise Unavailable("the table of API keys is not loaded yet", retry_after_s=1)
            raise Unauthenticated("unknown API key")
        # One object where there are no limits: the hot path only compares.
        limits = NO_LIMITS if record.limits == NO_LIMITS else record.limits
        caller = Caller(record.tenant, record.scopes, record.id, record.name, record.models, limits)
        return caller, record.expires_at


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
