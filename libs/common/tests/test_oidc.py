"""Tokens of an issuer: a small one of our own, over HTTP, stands for the world outside."""

import asyncio
import base64
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from lepton_common.access import guard
from lepton_common.auth import Keys
from lepton_common.errors import Forbidden, LeptonError, Unauthenticated, Unavailable
from lepton_common.etcd import EtcdClient
from lepton_common.http11 import JSON, Request, Server
from lepton_common.oidc import IssuerTokens, caller_of
from lepton_common.records import Scope
from lepton_common.service import Service
from lepton_common.settings import Oidc, Settings
from lepton_common.telemetry import Telemetry
from lepton_common.testing import until

PRIVATE: dict[str, Any] = {
    "rsa": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ec": ec.generate_private_key(ec.SECP256R1()),
    "stranger": rsa.generate_private_key(public_exponent=65537, key_size=2048),
}
ALGORITHMS = {"rsa": "RS256", "ec": "ES256", "stranger": "RS256"}


def jwk(name: str) -> dict[str, Any]:
    """The public key as its issuer publishes it."""
    key: Any = PRIVATE[name]
    algorithm: Any = ECAlgorithm if name == "ec" else RSAAlgorithm
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": name, "use": "sig"}


@dataclass
class Issuer:
    """Answers with its discovery document and its keys, and remembers what it was asked."""

    url: str = ""
    names: list[str] = field(default_factory=lambda: ["rsa", "ec"])
    status: int = 200
    asked: list[str] = field(default_factory=list)
    document: dict[str, Any] = field(default_factory=dict)

    def __call__(self, request: Request) -> None:
        self.asked.append(request.path)
        body: dict[str, Any] = {"keys": [*map(jwk, self.names), {"kty": "oct", "k": "c2VjcmV0", "kid": "hmac"}]}
        if request.path == "/.well-known/openid-configuration":
            body = {"issuer": self.url, "jwks_uri": f"{self.url}/keys", **self.document}
        request.respond(self.status, JSON, json.dumps(body).encode())

    def oidc(self, **more: Any) -> Oidc:
        scopes = {"model-users": Scope.INFER, "model-owners": Scope.DEPLOY}
        return Oidc(issuer=self.url, audience="lepton", scopes=scopes, **more)

    def token(self, name: str = "rsa", *, header: dict[str, Any] | None = None, **claims: Any) -> str:
        known = {
            "iss": self.url,
            "aud": "lepton",
            "sub": "anna",
            "exp": int(time.time()) + 60,
            "tenant": "acme",
            "scope": "openid model-users",
        }
        said = {name: value for name, value in {**known, **claims}.items() if value is not None}
        return jwt.encode(said, PRIVATE[name], ALGORITHMS[name], {"kid": name, **(header or {})})


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    issuer = Issuer()
    server = Server(issuer)
    await server.start("127.0.0.1", 0)
    issuer.url = "http://{}:{}".format(*server.address)
    yield issuer
    await server.drain(0)


@asynccontextmanager
async def verifying(oidc: Oidc, cooldown_s: float = 60) -> AsyncIterator[IssuerTokens]:
    """It has asked the issuer once, at least."""
    tokens = IssuerTokens(oidc, lambda: None, cooldown_s=cooldown_s)
    running = asyncio.create_task(tokens.run())
    try:
        await until(lambda: tokens._read_at > 0)
        yield tokens
    finally:
        running.cancel()
        await asyncio.wait([running])
        await tokens.close()


def refused(tokens: IssuerTokens, token: str, kind: type[LeptonError] = Unauthenticated) -> str:
    with pytest.raises(kind) as error:
        tokens.verify(token)
    assert token not in error.value.message
    return error.value.message


async def test_a_token_speaks_for_its_tenant_with_the_scopes_that_its_claims_mean(issuer: Issuer) -> None:
    async with verifying(issuer.oidc()) as tokens:
        caller, expires_at = tokens.verify(issuer.token(exp=1_900_000_000))
        assert (caller.tenant, caller.scopes, caller.name) == ("acme", frozenset({Scope.INFER}), "anna")
        assert expires_at == datetime.fromtimestamp(1_900_000_000, UTC)
        owner, _ = tokens.verify(issuer.token("ec", scope=["model-owners", "admin", 7]))
        assert owner.scopes == {Scope.DEPLOY}
        assert owner.key_id == caller.key_id
        assert tokens.verify(issuer.token(sub="ben"))[0].key_id != caller.key_id
    assert issuer.asked == ["/.well-known/openid-configuration", "/keys"]


async def test_what_is_not_the_issuers_or_not_for_us_or_not_valid_now_is_refused(issuer: Issuer) -> None:
    now = int(time.time())
    async with verifying(issuer.oidc()) as tokens:
        assert "expired" in refused(tokens, issuer.token(exp=now - 60))
        assert "does not count yet" in refused(tokens, issuer.token(nbf=now + 60))
        assert "another issuer" in refused(tokens, issuer.token(iss=f"{issuer.url}/"))
        assert "another audience" in refused(tokens, issuer.token(aud="lepton-2"))
        for claim in ("exp", "iss", "aud", "sub"):
            missing: dict[str, Any] = {claim: None}
            assert repr(claim) in refused(tokens, issuer.token(**missing))
        assert "signature is wrong" in refused(tokens, issuer.token("stranger", header={"kid": "rsa"}))
        assert "no such key" in refused(tokens, issuer.token("stranger"))
        assert "critical" in refused(tokens, issuer.token(header={"crit": ["exp"], "exp": 1}))
        head, _, signature = issuer.token().split(".")
        forged = base64.urlsafe_b64encode(json.dumps({"sub": "root"}).encode()).rstrip(b"=").decode()
        assert "signature is wrong" in refused(tokens, f"{head}.{forged}.{signature}")
        impossible: list[Any] = ["soon", -(10**30), 10**30, None, [], True]
        for exp in impossible:
            refused(tokens, issuer.token(exp=exp))


async def test_the_algorithm_is_what_the_operator_allows_and_the_key_is_for(issuer: Issuer) -> None:
    public = (
        PRIVATE["rsa"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )

    def handmade(header: dict[str, Any], secret: bytes | None) -> str:
        claims = {"iss": issuer.url, "aud": "lepton", "sub": "root", "exp": int(time.time()) + 60, "tenant": "acme"}
        parts = [base64.urlsafe_b64encode(json.dumps(each).encode()).rstrip(b"=") for each in (header, claims)]
        signed = b".".join(parts)
        mac = b"" if secret is None else base64.urlsafe_b64encode(hmac.digest(secret, signed, sha256)).rstrip(b"=")
        return (signed + b"." + mac).decode()

    async with verifying(issuer.oidc(algorithms=("RS256",))) as tokens:
        unsigned: list[Any] = ["none", "None", "", None, 7, [], {"a": 1}]
        for algorithm in unsigned:
            assert "algorithm" in refused(tokens, handmade({"alg": algorithm, "kid": "rsa"}, None))
        # The public key as an HMAC secret: everybody has it.
        for kid in ("rsa", "hmac"):
            assert "algorithm" in refused(tokens, handmade({"alg": "HS256", "kid": kid}, public))
        assert "algorithm" in refused(tokens, issuer.token("ec"))
    async with verifying(issuer.oidc()) as tokens:
        assert "not for its algorithm" in refused(tokens, issuer.token("ec", header={"kid": "rsa"}))


@pytest.mark.parametrize("kid", ["../../etc/passwd", "http://127.0.0.1/keys", "file:///dev/null", "' OR 1=1", ""])
async def test_a_key_id_is_looked_up_and_nothing_else(issuer: Issuer, kid: str) -> None:
    async with verifying(issuer.oidc()) as tokens:
        refused(tokens, issuer.token(header={"kid": kid}))
        assert set(issuer.asked) == {"/.well-known/openid-configuration", "/keys"}


async def test_new_keys_are_read_soon_and_taken_back_ones_forgotten_but_a_flood_asks_once(issuer: Issuer) -> None:
    changes = []
    tokens = IssuerTokens(issuer.oidc(jwks_url=f"{issuer.url}/keys"), lambda: changes.append(1), cooldown_s=0.3)
    refused(tokens, issuer.token(), Unavailable)
    running = asyncio.create_task(tokens.run())
    await until(lambda: bool(changes))
    tokens.verify(issuer.token())
    issuer.names = ["stranger"]
    token = issuer.token("stranger")
    for _ in range(500):
        with pytest.raises((Unavailable, Unauthenticated)):
            tokens.verify(token)
    assert issuer.asked == ["/keys"]
    await until(lambda: _is_taken(tokens, token))
    assert issuer.asked == ["/keys"] * 2
    assert "no such key" in refused(tokens, issuer.token())
    assert len(changes) == 2
    running.cancel()
    await asyncio.wait([running])
    await tokens.close()


def _is_taken(tokens: IssuerTokens, token: str) -> bool:
    try:
        tokens.verify(token)
    except LeptonError:
        return False
    return True


@pytest.mark.parametrize(
    "document",
    [{"issuer": "https://evil.example"}, {"jwks_uri": "http://evil.example/keys"}, {"jwks_uri": "file:///etc/passwd"}],
)
async def test_a_discovery_document_that_leads_elsewhere_is_not_followed(
    issuer: Issuer, document: dict[str, Any]
) -> None:
    issuer.document = document
    async with verifying(issuer.oidc()) as tokens:
        assert refused(tokens, issuer.token(), Unavailable)
        assert issuer.asked == ["/.well-known/openid-configuration"]


async def test_an_issuer_that_is_away_costs_no_token_that_is_known_already(
    issuer: Issuer, etcd: EtcdClient, telemetry: Telemetry
) -> None:
    service = Service("things", Settings(oidc=issuer.oidc()), telemetry)

    async def tell(events: object) -> None: ...

    keys = guard(service, etcd, tell)
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    token, now = issuer.token(), datetime.now(UTC)
    await until(lambda: _opens(keys, token))
    issuer.status = 503
    assert keys.check(token, Scope.INFER, now).tenant == "acme"
    with pytest.raises(Forbidden, match="'deploy'"):
        keys.check(token, Scope.DEPLOY, now)
    with pytest.raises(Unauthenticated, match="expired"):
        keys.check(token, Scope.INFER, datetime.fromtimestamp(now.timestamp() + 61, UTC))
    assert list(keys._remembered) == [token]
    with pytest.raises(Unauthenticated, match="not an API key"):
        keys.check("lp_" + token, Scope.INFER, now)
    stop.set()
    await running


def _opens(keys: Keys, token: str) -> bool:
    try:
        keys.check(token, Scope.INFER, datetime.now(UTC))
    except (Unavailable, Unauthenticated):
        return False
    return True


@pytest.mark.parametrize(
    ("oidc", "claims", "tenant"),
    [
        ({"tenant_claim": "https://lepton/tenant"}, {"https://lepton/tenant": "acme"}, "acme"),
        ({"tenant_claim": "org.name"}, {"org": {"name": "acme"}}, "acme"),
        ({"tenant_claim": "iss", "tenants": {"https://issuer": "acme"}}, {"iss": "https://issuer"}, "acme"),
        ({"tenants": {"Acme Inc.": "acme"}}, {"tenant": "Acme Inc."}, "acme"),
        ({"tenants": {"Acme Inc.": "acme"}}, {"tenant": "acme"}, None),
        ({}, {"tenant": "../default"}, None),
        ({}, {"tenant": ["default"]}, None),
        ({}, {}, None),
        ({"tenant_claim": "org.name.first"}, {"org": {"name": "acme"}}, None),
    ],
)
def test_the_tenant_is_what_the_operator_says_of_the_claim(
    oidc: dict[str, Any], claims: dict[str, Any], tenant: str | None
) -> None:
    mapping = Oidc(issuer="https://issuer", audience="lepton", scopes={"use": Scope.INFER}, **oidc)
    if tenant:
        assert caller_of({"sub": "anna", **claims}, mapping).tenant == tenant
    else:
        with pytest.raises(Forbidden, match="names no tenant"):
            caller_of({"sub": "anna", **claims}, mapping)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["use", "admin", "acme"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "scope"]), inner),
    max_leaves=8,
)


@given(claims=st.dictionaries(st.sampled_from(["tenant", "scope", "a", "a.b"]), JSON_VALUES), sub=JSON_VALUES)
def test_no_claims_give_more_than_the_configuration_says(claims: dict[str, Any], sub: Any) -> None:
    oidc = Oidc(issuer="https://issuer", audience="lepton", scopes={"use": Scope.INFER}, scopes_claim="a.b")
    try:
        caller = caller_of({**claims, "sub": sub}, oidc)
    except Forbidden:
        return
    assert caller.scopes <= {Scope.INFER}
    assert caller.tenant == claims["tenant"]
    assert caller.name.isprintable()
