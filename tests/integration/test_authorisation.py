"""Every route of every service, with every method, by everybody: who gets in is written here, and nowhere else.

The routes come from the services' own tables: one without a rule fails, and so does a rule without a route. Services
are called directly, as from another machine. Workers have no callers but the mesh, hence no keys.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from lepton import Client
from lepton.errors import LeptonError
from lepton_common.auth import new_secret
from lepton_common.db import Database
from lepton_common.etcd import EtcdClient
from lepton_common.kafka import KafkaBus
from lepton_common.service import Service
from lepton_common.settings import Settings
from lepton_common.telemetry import Telemetry, configure
from lepton_gateway import domain as gateway
from lepton_monitor.main import build as build_monitor
from lepton_monitor.settings import Settings as MonitorSettings
from lepton_registry.main import build as build_registry
from lepton_registry.settings import Settings as RegistrySettings
from lepton_rollout.main import build as build_rollout
from lepton_rollout.mesh_envoy import EnvoyMesh
from lepton_rollout.settings import Settings as RolloutSettings
from prometheus_client import CollectorRegistry

from .local_platform import Platform, until
from .onnx_models import mlp

# Which keys of one scope open a route.
EVERYBODY = frozenset({"nobody", "infer", "read", "test", "deploy", "admin"})
INFER = frozenset({"infer", "admin"})
LOOK = frozenset({"infer", "read", "deploy", "admin"})
READ = frozenset({"read", "deploy", "admin"})
TEST = frozenset({"test", "deploy", "admin"})
DEPLOY = frozenset({"deploy", "admin"})
ADMIN = frozenset({"admin"})
OPERATOR: frozenset[str] = frozenset()  # and of no other tenant than `default`

OPERATIONAL = dict.fromkeys(
    ("GET /health/live", "GET /health/ready", "GET /metrics", "GET /openapi.json", "HEAD /openapi.json"), EVERYBODY
)
OF_MODEL, OF_VERSION = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
RULES: dict[str, dict[str, frozenset[str]]] = {
    "registry": {
        **OPERATIONAL,
        "POST /v1/tenants": OPERATOR,
        "GET /v1/tenants": ADMIN,
        "GET /v1/keys": ADMIN,
        "POST /v1/keys": ADMIN,
        "DELETE /v1/keys/{key_id}": ADMIN,
        "POST /v1/keys/{key_id}/rotate": ADMIN,
        "GET /v1/models": READ,
        "GET /v1/models/{model}": READ,
        "GET /v1/models/{model}/versions": READ,
        "POST /v1/models/{model}/versions": DEPLOY,
        "GET /v1/models/{model}/versions/{version}": READ,
        "GET /v1/models/{model}/timeline": READ,
        "PUT /v1/artifacts/{sha256}": DEPLOY,
        "HEAD /v1/artifacts/{sha256}": DEPLOY,
        "GET /v1/artifacts/{sha256}": READ,
    },
    "rollout": {
        **OPERATIONAL,
        "POST /v1/rollouts": DEPLOY,
        "GET /v1/rollouts": READ,
        "GET /v1/rollouts/{rollout}": READ,
        **{
            f"POST /v1/rollouts/{{rollout}}/{verb}": DEPLOY
            for verb in ("pause", "resume", "promote", "approve", "abort", "retry")
        },
        "POST /v1/rollouts/{rollout}/replay": READ,
        "GET /v1/rollouts/{rollout}/decisions": READ,
        "GET /v1/rollouts/{rollout}/windows": READ,
        "GET /v1/policies": READ,
        "GET /v1/policies/{model}": READ,
        "PUT /v1/policies/{model}": DEPLOY,
        "DELETE /v1/policies/{model}": DEPLOY,
        "GET /v1/mesh/{model}": READ,
        "PUT /v1/mesh/{model}": DEPLOY,
        "DELETE /v1/mesh/{model}": DEPLOY,
        "GET /v1/serving": READ,
        "GET /v1/serving/{model}": READ,
        "POST /v1/serving/{model}/rollback": DEPLOY,
        "POST /v1/serving/{model}/load": DEPLOY,
        "POST /v1/serving/{model}/unload": DEPLOY,
        "PUT /v1/serving/{model}/cache": DEPLOY,
        "DELETE /v1/serving/{model}/cache": DEPLOY,
        "PUT /v1/serving/{model}/limits": DEPLOY,
        "DELETE /v1/serving/{model}/limits": DEPLOY,
    },
    "monitor": {**OPERATIONAL, "GET /v1/windows": READ, "POST /v1/windows/counters": TEST, "GET /v1/labels": READ},
    "gateway": {
        **{
            f"{verb} {path}": EVERYBODY
            for verb in ("GET", "HEAD")
            for path in ("/health/live", "/health/ready", "/v2", "/v2/health/live", "/v2/health/ready")
        },
        **{
            f"{verb} {path}{what}": LOOK
            for verb in ("GET", "HEAD")
            for path in (OF_MODEL, OF_VERSION)
            for what in ("", "/ready", "/config", "/stats", "/docs", "/trace/setting")
        },
        **{f"POST {path}/infer": INFER for path in (OF_MODEL, OF_VERSION)},
        **{f"POST {path}/trace/setting": DEPLOY for path in (OF_MODEL, OF_VERSION)},
        **{f"{verb} /v2/models/stats": LOOK for verb in ("GET", "HEAD")},
        **{f"{verb} /v2/{what}": LOOK for verb in ("GET", "HEAD") for what in ("trace/setting", "logging", "docs")},
        **{f"{verb} /v2/traces{what}": READ for verb in ("GET", "HEAD") for what in ("", "/{request_id}")},
        "POST /v2/trace/setting": OPERATOR,
        "POST /v2/logging": OPERATOR,
        "POST /v2/repository/index": LOOK,
        "POST /v2/repository/models/{model}/load": DEPLOY,
        "POST /v2/repository/models/{model}/unload": DEPLOY,
        **{f"{verb} /v2/systemsharedmemory/status": EVERYBODY for verb in ("GET", "HEAD", "POST")},
    },
}
# A model can be named elsewhere than in the path.
MODEL = "matrix-model"
QUERIES = {f"GET /v1/{noun}": {"model": MODEL} for noun in ("windows", "labels", "rollouts")}
BODIES: dict[str, dict[str, Any]] = {
    "POST /v1/rollouts": {"model": MODEL, "version": 99},
    "POST /v1/windows/counters": {"model": MODEL, "version": 1, "counter": "refunds", "count": 1},
}
# What a rollout is looked up for; all else gets a body that it refuses, once the caller is in.
VALID: dict[str, dict[str, Any]] = {**BODIES, "POST /v1/rollouts/{rollout}/replay": {}}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
TENANT = "matrix-tenant"
# As told by a proxy: callers on this machine may infer without a key.
ELSEWHERE = {"x-forwarded-for": "203.0.113.9"}


@dataclass
class Role:
    """A caller: the key that they send, and the scope by which RULES know them."""

    secret: str | None
    scope: str = "admin"
    is_known: bool = True
    is_ours: bool = True
    sees_model: bool = True


def expected(label: str, opens: frozenset[str], role: Role) -> set[int]:
    """The statuses that are right; an empty set is any answer that lets the caller in."""
    if opens is EVERYBODY:
        return set()
    if role.secret is None or not role.is_known:
        return {401}
    if role.scope != "operator" and role.scope not in opens:
        return {403}
    if not role.sees_model and names_model(label):
        return {403}
    return {404} if not role.sees_model and "{rollout}" in label else set()


def names_model(label: str) -> bool:
    return "{model}" in label or label in QUERIES or label in BODIES


def tells(label: str, text: str) -> bool:
    """Whether an answer tells a stranger of what is TENANT's. What they named themselves may stand in it."""
    return f'"{TENANT}"' in text or (MODEL in text and not names_model(label))


@pytest.fixture(scope="module")
def known(platform: Platform) -> dict[str, str]:
    """What stands in paths: things of TENANT that exist."""
    with platform.client() as operator:
        operator.create_tenant(TENANT)
        key = operator.create_key("matrix setup", scopes=["admin"], tenant=TENANT)
    with platform.client(key.secret) as client:
        until(lambda: _let_in(client))
        pushed = client.push(mlp(96), name=MODEL)
        [rollout] = client.rollouts(MODEL)
    return {
        "model": MODEL,
        "version": "1",
        "sha256": pushed.sha256,
        "rollout": str(rollout.id),
        "key_id": "0" * 16,
        "request_id": "1",
    }


@pytest.fixture(scope="module")
def roles(platform: Platform, known: dict[str, str]) -> dict[str, Role]:
    """Everybody, known or refused everywhere."""
    with platform.client() as operator:
        operator.create_tenant(f"{TENANT}-2")

        def make(name: str, *scopes: str, tenant: str = TENANT, **more: Any) -> tuple[str, str]:
            key = operator.create_key(f"matrix {name}", scopes=scopes, tenant=tenant, **more)
            return key.id, key.secret

        revoked_id, revoked = make("revoked", "admin")
        soon = datetime.now(UTC) + timedelta(seconds=1)
        roles = {
            "nobody": Role(None),
            "garbage": Role("lp_\N{LATIN SMALL LETTER E WITH ACUTE}", is_known=False),
            "a token of nobody": Role("eyJhbGciOiJub25lIn0.eyJzdWIiOiJyb290In0.", is_known=False),
            "guess": Role(new_secret()[0], is_known=False),
            "revoked": Role(revoked, is_known=False),
            "expired": Role(make("expired", "admin", expires_at=soon)[1], is_known=False),
            **{scope: Role(make(scope, scope)[1], scope) for scope in ("infer", "read", "test", "deploy", "admin")},
            "foreign": Role(make("foreign", "admin", tenant=f"{TENANT}-2")[1], is_ours=False),
            "operator": Role(platform.key, "operator", is_ours=False),
        }
        for scope in ("infer", "test", "deploy"):
            secret = make(f"other models {scope}", scope, models=["other-*"])[1]
            roles[f"other models, {scope}"] = Role(secret, scope, sees_model=False)
        operator.revoke_key(revoked_id)
    paths = {"registry": "/v1/models", "rollout": "/v1/serving", "monitor": "/v1/windows", "gateway": "/v2/logging"}
    for service, path in paths.items():
        with caller(platform, service) as http:
            for role in roles.values():
                until(partial(_is_heard_of, http, path, role))
    return roles


def caller(platform: Platform, service: str) -> httpx.Client:
    url = f"http://127.0.0.1:{platform.layout.ports[service]}"
    return httpx.Client(base_url=url, headers=ELSEWHERE, timeout=60, trust_env=False)


def ask(http: httpx.Client, role: Role, verb: str, path: str, **request: Any) -> httpx.Response:
    headers = [] if role.secret is None else [(b"authorization", f"Bearer {role.secret}".encode())]
    return http.request(verb, path, headers=headers, **request)


def _is_heard_of(http: httpx.Client, path: str, role: Role) -> bool:
    """Whether the service knows what has become of the role's key."""
    is_refused = ask(http, role, "GET", path).status_code == 401
    return is_refused is (role.secret is None or not role.is_known)


def _let_in(client: Client) -> bool:
    with suppress(LeptonError):
        client.models()
        client.rollouts()
        return True
    return False


# --- the services' own tables -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every method and path, as the services have them; none of the services runs."""
    folder = tmp_path_factory.mktemp("tables")
    nowhere = {"postgres_dsn": "postgresql://nobody@127.0.0.1:1/nothing", "etcd": "127.0.0.1:1", "kafka": "127.0.0.1:1"}

    def built(name: str, build: Callable[..., Service], settings: Settings, *more: Any) -> set[str]:
        telemetry: Telemetry = configure(name, settings, CollectorRegistry())
        db, etcd = Database(settings.postgres_dsn, name), EtcdClient(settings.etcd)
        service = build(settings, telemetry, db, etcd, KafkaBus(settings.kafka, name, telemetry), *more)
        [(server, *_)] = service._servers
        app: Any = server
        telemetry.close()
        return {
            f"{verb} {route.path}"
            for route in iter_route_contexts(app.config.app.routes)
            for verb in route.methods or ()
        }

    return {
        "registry": built(
            "registry",
            build_registry,
            RegistrySettings(blobs=str(folder), staging=folder, **nowhere),  # type: ignore[arg-type]  # from text
        ),
        "monitor": built("monitor", build_monitor, MonitorSettings(**nowhere)),  # type: ignore[arg-type]
        "rollout": built(
            "rollout",
            build_rollout,
            RolloutSettings(mesh_dir=folder, envoy_admin="127.0.0.1:1", **nowhere),  # type: ignore[arg-type]  # from text
            EnvoyMesh(Path(folder), "127.0.0.1:1"),
            lambda: datetime.now(UTC),
        ),
        "gateway": {f"{verb} {path}" for path, page in _pages() for verb in gateway.METHODS[page]},
    }


def _pages() -> Iterator[tuple[str, gateway.Page]]:
    for segments, page in gateway._PAGES.items():
        yield "/" + "/".join(segments), page
    for prefix in (OF_MODEL, OF_VERSION):
        for segments, page in gateway._OF_MODEL.items():
            yield "/".join((prefix, *segments)), page
    for segments, page in gateway._OF_REPOSITORY.items():
        yield "/".join(("/v2/repository/models/{model}", *segments)), page
    yield "/v2/traces/{request_id}", gateway.Page.TRACED
    yield "/v2/systemsharedmemory/status", gateway.Page.SHARED_MEMORY


# --- tests ------------------------------------------------------------------------------------------------------------


def test_every_route_has_a_rule_and_every_rule_a_route(tables: dict[str, set[str]]) -> None:
    assert {service: set(rules) for service, rules in RULES.items()} == tables
    assert {page for _, page in _pages()} == set(gateway.Page)


@pytest.mark.parametrize("service", RULES)
def test_everybody_gets_where_the_rule_says_and_nowhere_else(
    platform: Platform, known: dict[str, str], roles: dict[str, Role], service: str
) -> None:
    wrong = []
    with caller(platform, service) as http:
        for label, opens in RULES[service].items():
            verb, _, template = label.partition(" ")
            for name, role in roles.items():
                request: dict[str, Any] = {"json": VALID.get(label, [])} if verb in {"POST", "PUT"} else {}
                answer = ask(http, role, verb, template.format(**known), params=QUERIES.get(label), **request)
                right = expected(label, opens, role)
                is_stranger = role.scope != "operator" and not (role.is_ours and role.sees_model)
                lets_in = answer.status_code not in {401, 403, 405} and (
                    answer.status_code < 500 or answer.status_code in {501, 503}
                )
                if not (answer.status_code in right if right else lets_in):
                    wrong.append((label, name, answer.status_code, answer.text[:200]))
                if is_stranger and opens is not EVERYBODY and tells(label, answer.text):
                    wrong.append((label, name, answer.status_code, f"told: {answer.text[:200]}"))
    assert wrong == []


@pytest.mark.parametrize("service", RULES)
def test_methods_that_a_path_does_not_take_are_405_whoever_asks(
    platform: Platform, known: dict[str, str], roles: dict[str, Role], service: str
) -> None:
    taken: dict[str, set[str]] = {}
    for label in RULES[service]:
        verb, _, template = label.partition(" ")
        taken.setdefault(template, set()).add(verb)
    wrong = []
    with caller(platform, service) as http:
        for template, verbs in taken.items():
            for verb in METHODS:
                for name in () if verb in verbs else ("nobody", "admin"):
                    answer = ask(http, roles[name], verb, template.format(**known))
                    if answer.status_code != 405:
                        wrong.append((verb, template, name, answer.status_code))
            # What HTTP has no such method for ends in the parser.
            if (answer := ask(http, roles["admin"], "BREW", template.format(**known))).status_code not in {400, 405}:
                wrong.append(("BREW", template, "admin", answer.status_code))
    assert wrong == []


def test_key_for_other_models_is_told_of_none_in_any_list(
    platform: Platform, known: dict[str, str], roles: dict[str, Role]
) -> None:
    lists = {
        "registry": ["GET /v1/models"],
        "rollout": ["GET /v1/rollouts", "GET /v1/serving"],
        "gateway": ["POST /v2/repository/index", "GET /v2/models/stats"],
    }
    for service, labels in lists.items():
        with caller(platform, service) as http:
            for label in labels:
                seen, blind = (ask(http, roles[name], *label.split(" ")) for name in ("deploy", "other models, deploy"))
                assert (seen.status_code, blind.status_code) == (200, 200)
                assert (MODEL in seen.text, MODEL in blind.text) == (True, False), label
