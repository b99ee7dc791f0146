"""Who gets in at the gateway: keys for some models only, tokens of an issuer, and what the audit hears of it."""

import asyncio
import json
import time
from collections.abc import Callable

import jwt
from aiokafka import AIOKafkaConsumer
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from lepton_common import envelope
from lepton_common.etcd import EtcdClient
from lepton_common.events import AccessRefused, Event
from lepton_common.http11 import JSON, Server
from lepton_common.records import Scope
from lepton_common.settings import Oidc
from lepton_common.telemetry import Telemetry

from .lab import Lab, error_of, running

INFER = "/v2/models/m/infer"


async def test_a_key_for_some_models_learns_nothing_of_others(lab: Lab) -> None:
    await lab.serve("fraud-1", 1)
    await lab.until("/v2/models/fraud-1/ready", 503)
    key = await lab.new_key(Scope.INFER, Scope.DEPLOY, models=["fraud-*"])
    await lab.until("/v2/models/fraud-1/ready", 503, key)
    lab.client.headers["authorization"] = f"Bearer {key}"
    assert (await lab.client.post("/v2/models/fraud-1/infer", content=b"{}")).status_code == 200
    index = (await lab.client.post("/v2/repository/index")).json()
    assert {each["name"] for each in index} == {"fraud-1"}
    asked = [("GET", what) for what in ("", "/ready", "/config", "/stats", "/versions/1", "/trace/setting")]
    for verb, what in (*asked, ("POST", "/infer"), ("POST", "/versions/1/infer"), ("POST", "/trace/setting")):
        # One that is there, and one that is not: the answers are the same.
        there, nowhere = [await lab.client.request(verb, f"/v2/models/{each}{what}") for each in ("m", "n")]
        assert (there.status_code, nowhere.status_code) == (403, 403), what
        assert error_of(there) == error_of(nowhere).replace("'n'", "'m'")
    for what in ("load", "unload"):
        assert (await lab.client.post(f"/v2/repository/models/m/{what}")).status_code == 403
    assert len(lab.mesh.requests) == 1


async def test_a_token_infers_until_it_expires_and_is_verified_once(etcd: EtcdClient, telemetry: Telemetry) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    public = {**json.loads(ECAlgorithm.to_jwk(private.public_key())), "kid": "1"}
    issuer = Server(lambda request: request.respond(200, JSON, json.dumps({"keys": [public]}).encode()))
    await issuer.start("127.0.0.1", 0)
    url = "http://{}:{}".format(*issuer.address)
    oidc = Oidc(issuer=url, audience="lepton", scopes={"use": Scope.INFER}, jwks_url=f"{url}/keys")

    def token(lifetime_s: float) -> str:
        claims = {"iss": url, "aud": "lepton", "sub": "anna", "tenant": "acme", "scope": "use"}
        return jwt.encode({**claims, "exp": int(time.time() + lifetime_s)}, private, "ES256", {"kid": "1"})

    async with running(etcd, telemetry, oidc=oidc) as lab:
        long, short = token(3600), token(2)
        await lab.until("/v2/models/m", 200, long)
        lab.client.headers["authorization"] = f"Bearer {long}"
        assert (await lab.client.post(INFER)).status_code == 200
        assert (await lab.client.post(INFER, headers={"x-lepton-version": "1"})).status_code == 403
        # From here on it is known by itself: the issuer may be away.
        await issuer.drain(0)
        for _ in range(10):
            assert (await lab.client.post(INFER)).status_code == 200
        lab.client.headers["authorization"] = f"Bearer {short}"
        await lab.until("/v2/models/m", 401, short)
        answer = await lab.client.post(INFER)
        assert (answer.status_code, "expired" in error_of(answer)) == (401, True)
        forged = long[:-8] + ("A" * 8 if long[-8:] != "A" * 8 else "B" * 8)
        answer = await lab.client.post(INFER, headers={"authorization": f"Bearer {forged}"})
        assert answer.status_code == 401
        assert forged not in answer.text
        assert all(b"authorization" not in request.headers for request in lab.mesh.requests)


async def test_the_audit_hears_of_refusals_past_the_outbox(kafka: str, etcd: EtcdClient, telemetry: Telemetry) -> None:
    consumer = AIOKafkaConsumer("lepton.audit", bootstrap_servers=kafka, auto_offset_reset="earliest")
    await consumer.start()
    heard: list[Event] = []

    async def until_heard(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds():
                record = await consumer.getone()
                heard.append(envelope.decode({name: value.decode() for name, value in record.headers}, record.value))

    def refused(key: str) -> list[AccessRefused]:
        return [each for each in heard if isinstance(each, AccessRefused) and each.key == key]

    def strangers() -> list[AccessRefused]:
        # Other tests' are on this Kafka, too.
        return [each for each in refused("") if each.peer.startswith("203.0.113.9")]

    async with running(etcd, telemetry, kafka=kafka) as lab:
        for _ in range(200):
            assert (await lab.client.post("/v2/repository/models/m/load")).status_code == 403
        unknown = {"authorization": "Bearer lp_" + "x" * 43, "x-forwarded-for": "203.0.113.9"}
        assert (await lab.client.post(INFER, headers=unknown)).status_code == 401
        await until_heard(lambda: sum(each.count for each in refused(lab.key[:11])) == 200 and bool(strangers()))
        mine, [stranger] = refused(lab.key[:11]), strangers()
        assert len(mine) < 20
        assert {(each.tenant, each.status, each.what, each.service) for each in mine} == {
            ("acme", 403, "POST load", "gateway")
        }
        assert (stranger.status, stranger.peer, stranger.tenant) == (401, "203.0.113.9 by 127.0.0.1", "default")
        assert lab.key not in "".join(each.model_dump_json() for each in heard)
    await consumer.stop()
