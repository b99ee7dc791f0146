"""Bearer tokens of an OpenID Connect issuer: signature and claims verified here, with the keys that it publishes."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import httpx
import jwt
import structlog
from pydantic import TypeAdapter, ValidationError

from lepton_common.auth import Caller
from lepton_common.errors import Forbidden, Invalid, Unauthenticated, Unavailable
from lepton_common.settings import IssuerUrl, Oidc
from lepton_common.types import checked_name

# Unknown key ids make us ask the issuer again, but no more often than this.
_COOLDOWN_S = 10.0
# A key that the issuer took back is forgotten after so long.
_REFRESH_S = 300.0
_TIMEOUT_S = 5.0
_MAX_DOCUMENT_BYTES = 256 * 1024
_MAX_TOKEN_CHARS = 8192
# How far the issuer's clock may be ahead of ours.
_LEEWAY_S = 10
_ID_CHARS = 16
_MAX_NAME_CHARS = 200
_REQUIRED = ["exp", "iss", "aud", "sub"]

# The kind of key that a signature needs: one of another kind is not tried, so that no algorithm takes it for its own.
_KEY_TYPES = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}

_URL: TypeAdapter[str] = TypeAdapter(IssuerUrl)

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Key:
    """A key of the issuer: its JWK without private members, and what signatures are verified with."""

    published: Mapping[str, Any]
    public: Any


class IssuerTokens:
    """Verifies tokens from memory. `run` keeps the issuer's keys; `on_change` is called when they are others."""

    def __init__(self, oidc: Oidc, on_change: Callable[[], None], *, cooldown_s: float = _COOLDOWN_S) -> None:
        self._oidc = oidc
        self._on_change = on_change
        self._cooldown_s = cooldown_s
        # An environment's proxy, and a redirect, could answer in the issuer's place.
        self._http = httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False, follow_redirects=False)
        self._keys: Mapping[str, _Key] = {}
        self._wanted = asyncio.Event()
        self._read_at = float("-inf")

    async def run(self) -> None:
        """Reads the issuer's keys, for ever: now and then, and soon after a token was signed by an unknown one."""
        while True:
            try:
                keys = await self._read()
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                _log.warning("the issuer's keys cannot be read, going on with those known", reason=str(error)[:300])
            else:
                if _published(keys) != _published(self._keys):
                    self._keys = keys
                    self._on_change()
            self._read_at = time.monotonic()
            self._wanted.clear()
            await asyncio.sleep(self._cooldown_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_S if self._keys else 0):
                    await self._wanted.wait()

    async def close(self) -> None:
        """No connection is left open."""
        await self._http.aclose()

    def verify(self, token: str) -> tuple[Caller, datetime]:
        """Who the token speaks for, and until when.

        Raises Unauthenticated for one that is not the issuer's, not for us or not valid now, Forbidden when its claims
        give nothing here, and Unavailable while the issuer's keys are on their way.
        """
        try:
            key, algorithm = self._signer(token)
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._oidc.audience,
                issuer=self._oidc.issuer,
                leeway=_LEEWAY_S,
                options={"require": _REQUIRED, "enforce_minimum_key_length": True},
            )
            expires_at = datetime.fromtimestamp(int(claims["exp"]), UTC)
        except jwt.ExpiredSignatureError as error:
            raise Unauthenticated("this token has expired") from error
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
            raise Unauthenticated(f"not a valid token: {_reason(error)}") from error
        return caller_of(claims, self._oidc), expires_at

    def _signer(self, token: str) -> tuple[Any, str]:
        """The public key that the token names, and by which algorithm it signed."""
        if len(token) > _MAX_TOKEN_CHARS:
            raise jwt.InvalidTokenError(f"it is longer than {_MAX_TOKEN_CHARS} characters")
        header = jwt.get_unverified_header(token)
        algorithm, name = header.get("alg"), header.get("kid")
        # Only what the operator allowed, whatever the token says of itself.
        if algorithm not in self._oidc.algorithms:
            raise jwt.InvalidTokenError(f"its algorithm is none of {', '.join(self._oidc.algorithms)}")
        # A key id is looked up, and nothing else: it is no path, no address and no query.
        key = self._keys.get(name) if isinstance(name, str) else self._only_key()
        if key is None:
            raise self._unknown_key()
        said = key.published.get("alg")
        if key.published["kty"] != _KEY_TYPES[algorithm[:2]] or said not in (None, algorithm):
            raise jwt.InvalidTokenError("its key is not for its algorithm")
        return key.public, algorithm

    def _only_key(self) -> _Key | None:
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    def _unknown_key(self) -> Unavailable | Unauthenticated:
        """Asks for the issuer's keys anew, unless that was just done: who rotates its keys signs with a new one."""
        if self._keys and not self._wanted.is_set() and time.monotonic() - self._read_at < self._cooldown_s:
            return Unauthenticated("not a valid token: the issuer has no such key")
        self._wanted.set()
        return Unavailable("the token issuer's keys are being read", retry_after_s=1)

    async def _read(self) -> Mapping[str, _Key]:
        """The issuer's public keys by id. Raises HTTPError and ValueError."""
        url = self._oidc.jwks_url
        if url is None:
            document = await self._get(self._oidc.issuer.rstrip("/") + "/.well-known/openid-configuration")
            if document.get("issuer") != self._oidc.issuer:
                raise ValueError("the discovery document is of another issuer")
            try:
                url = _URL.validate_python(document.get("jwks_uri"))
            except ValidationError:
                raise ValueError("the discovery document names no https address of keys") from None
        found = (await self._get(url)).get("keys")
        if not isinstance(found, list):
            raise ValueError("the document of keys has no list of them")
        keys = {}
        for each in found:
            if isinstance(each, dict) and each.get("kty") in _KEY_TYPES.values() and each.get("use") in (None, "sig"):
                public = {name: value for name, value in each.items() if name in _PUBLIC}
                try:
                    keys[str(each.get("kid", ""))] = _Key(public, jwt.PyJWK(public).key)
                except (jwt.PyJWTError, ValueError, TypeError) as error:
                    _log.warning("a key of the issuer is not usable", reason=_reason(error))
        if not keys:
            raise ValueError("the document of keys has none that can be used")
        return keys

    async def _get(self, url: str) -> dict[str, Any]:
        async with self._http.stream("GET", url) as response:
            if response.status_code != httpx.codes.OK:
                raise ValueError(f"the issuer answered with status {response.status_code}")
            body = b""
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _MAX_DOCUMENT_BYTES:
                    raise ValueError(f"a document of the issuer is larger than {_MAX_DOCUMENT_BYTES} bytes")
        return TypeAdapter(dict[str, Any]).validate_json(body)


# A JWK's public members: a private key that an issuer published by mistake is not kept.
_PUBLIC = frozenset({"kty", "kid", "alg", "use", "crv", "n", "e", "x", "y"})


def caller_of(claims: Mapping[str, Any], oidc: Oidc) -> Caller:
    """Whom verified claims mean here. Raises Forbidden when they name no tenant."""
    said = _claim(claims, oidc.tenant_claim)
    tenant = oidc.tenants.get(str(said)) if oidc.tenants else said
    subject = str(claims["sub"])
    key_id = "oidc-" + sha256(f"{oidc.issuer} {subject}".encode()).hexdigest()[:_ID_CHARS]
    try:
        tenant = checked_name("tenant", tenant if isinstance(tenant, str) else "")
    except Invalid:
        raise Forbidden(f"the token's claim {oidc.tenant_claim!r} names no tenant", key_id=key_id) from None
    granted = _claim(claims, oidc.scopes_claim)
    words = granted.split() if isinstance(granted, str) else granted if isinstance(granted, list) else []
    scopes = frozenset(oidc.scopes[each] for each in words if isinstance(each, str) and each in oidc.scopes)
    name = "".join(char for char in subject[:_MAX_NAME_CHARS] if char.isprintable())
    return Caller(tenant, scopes, key_id, name)


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """The claim of that name, or at that path."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _published(keys: Mapping[str, _Key]) -> dict[str, Mapping[str, Any]]:
    return {name: key.published for name, key in keys.items()}


def _reason(error: Exception) -> str:
    """What is wrong, as far as it holds nothing of the token."""
    match error:
        case jwt.InvalidAudienceError():
            return "it is for another audience"
        case jwt.InvalidIssuerError():
            return "it is of another issuer"
        case jwt.ImmatureSignatureError():
            return "it does not count yet"
        case jwt.InvalidSignatureError():
            return "its signature is wrong"
        case jwt.MissingRequiredClaimError():
            return f"it has no claim {error.claim!r}"
        case jwt.DecodeError() | jwt.InvalidKeyError():
            return "it is not a signed JWT"
        case jwt.InvalidTokenError():
            return str(error)[:200]
        case _:
            return "it cannot be read"
