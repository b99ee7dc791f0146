"""Base of every service's settings: environment variables LEPTON_…, read once in `main`, passed down as values."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lepton_common.records import Scope

PREFIX = "LEPTON_"

# Signatures that only the issuer can make. `none`, and HMAC, whose key would be the caller's too, are no choice.
SigningAlgorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
# Plain HTTP would let anyone on the way hand out keys of their own.
IssuerUrl = Annotated[
    str, Field(pattern=r"^(https://[^\s]+|http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?(/[^\s]*)?)$")
]


class Oidc(BaseModel):
    """An OpenID Connect issuer, and what its tokens' claims mean here. Nothing in a token counts that is not named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: IssuerUrl
    audience: Annotated[str, Field(min_length=1)]
    scopes: Annotated[dict[str, Scope], Field(min_length=1)]
    """what a value of the scopes' claim is here"""
    scopes_claim: str = "scope"
    """a list, or a text of words; `a.b` is the claim b inside a"""
    tenant_claim: str = "tenant"
    tenants: dict[str, str] = {}
    """which tenant a value of the tenant's claim is; empty: the value is the tenant"""
    algorithms: Annotated[tuple[SigningAlgorithm, ...], Field(min_length=1)] = ("RS256", "ES256")
    jwks_url: IssuerUrl | None = None
    """where the issuer's keys are; None: as its discovery document says"""


def _from_json(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


class Settings(BaseSettings):
    """What an operator can change of any service. The text under a field is what an error says was expected."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )

    host: str = "127.0.0.1"
    """address to listen on"""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """port to listen on, 0 for any free one"""
    kafka: str = "127.0.0.1:9092"
    """Kafka's bootstrap servers, host:port[,host:port]"""
    instance: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,100}$")] = ""
    """this replica's name, its own and the same after a restart; with one, Kafka's group takes it back at once"""
    postgres_dsn: Annotated[str, Field(repr=False, pattern=r"^postgresql(\+asyncpg)?://")] = (
        "postgresql://lepton@127.0.0.1:5432/lepton"
    )
    """PostgreSQL, postgresql://user:password@host:port/database"""
    etcd: str = "127.0.0.1:2379"
    """etcd's endpoints, host:port[,host:port]"""
    oidc: Annotated[Oidc | None, NoDecode, BeforeValidator(_from_json)] = None
    """an OpenID Connect issuer whose tokens are taken beside keys: a JSON object with the fields of `Oidc`"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """least severe log line to write"""
    otlp: Annotated[str, Field(pattern=r"^(https?://.+)?$")] = ""
    """OTLP/HTTP collector, http://host:4318; empty for no traces"""
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """seconds that running requests get to finish after SIGTERM"""

    @classmethod
    def read(cls) -> Self:
        """The settings of this process. Ends the process with one line for every variable that is wrong or missing."""
        try:
            return cls()
        except ValidationError as error:
            lines = (_line(cls, each) for each in error.errors(include_url=False, include_context=False))
            raise SystemExit("\n".join(lines)) from None


def _line(settings: type[Settings], error: Any) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    field = settings.model_fields.get(name)
    expected = (field.description if field else None) or error["msg"]
    if error["type"] == "missing":
        return f"{PREFIX}{name.upper()} is not set: expected {expected}"
    # A field that keeps itself out of repr() holds a password.
    got = repr(error["input"])[:80] if field is None or field.repr else "a value not shown here"
    return f"{PREFIX}{name.upper()} is {got}: expected {expected} ({error['msg']})"
