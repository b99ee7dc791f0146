"""Limits and admission as callers meet them, and the count of a day over several gateways."""

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
import structlog
from lepton_common.auth import Caller
from lepton_common.errors import LeptonError
from lepton_common.etcd import EtcdClient, Versioned
from lepton_common.http11 import JSON, Request
from lepton_common.records import QUOTAS, KeyLimits, Limits, QuotaUse, Scope
from lepton_common.telemetry import Telemetry
from lepton_gateway.admission import Admission
from lepton_gateway.lanes import Lane, Ticket
from lepton_gateway.limits import SECONDS_A_DAY, Use
from lepton_gateway.quotas import Quotas

from .lab import Lab, counted, error_of, running

INFER = "/v2/models/m/infer"
OK = b'{"model_name":"m","outputs":[]}'


async def told(lab: Lab, line: str) -> None:
    """Returns once the metrics have this line."""
    async with lab.patience():
        while True:
            if line in await lab.metrics():
                return
            await asyncio.sleep(0.01)


async def test_a_key_over_its_rate_is_429_and_others_are_not(lab: Lab) -> None:
    limited = await lab.new_key(Scope.INFER, limits=KeyLimits(rate_per_s=0.1, burst=2))
    headers = {"authorization": f"Bearer {limited}"}
    await lab.until("/v2/models/m", 200, limited)
    responses = [await lab.client.post(INFER, headers=headers) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 429]
    assert "this API key is over its rate of 0.1 requests/s" in error_of(responses[2])
    assert responses[2].headers["retry-after"] == "10"
    assert (await lab.client.post(INFER)).status_code == 200
    assert 'lepton_gateway_shed_requests_total{class="interactive",reason="key_rate"} 1.0' in await lab.metrics()
    assert counted(lab.windows.told("m"))[0, False, "shed"] == 1


async def test_a_key_has_its_day_until_midnight(lab: Lab) -> None:
    limited = await lab.new_key(Scope.INFER, limits=KeyLimits(per_day=2))
    headers = {"authorization": f"Bearer {limited}"}
    await lab.until("/v2/models/m", 200, limited)
    responses = [await lab.client.post(INFER, headers=headers) for _ in range(3)]
    now = datetime.now(UTC)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0)
    assert [response.status_code for response in responses] == [200, 200, 429]
    assert "midnight UTC" in error_of(responses[2])
    assert int(responses[2].headers["retry-after"]) == pytest.approx((midnight - now).total_seconds(), abs=20)


async def test_large_bodies_have_room_together_and_small_ones_always(lab: Lab) -> None:
    answering, held = lab.mesh.handler, asyncio.Queue[Request]()
    lab.mesh.handler = held.put_nowait
    waiting = [asyncio.create_task(lab.client.post(INFER, content=bytes(1_000_000))) for _ in range(2)]
    async with lab.patience():
        requests = [await held.get() for _ in waiting]
    lab.mesh.handler = answering
    refused = await lab.client.post(INFER, content=bytes(600_000))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert error_of(refused) == "body: 600000 bytes, more than there is room for now"
    metrics = await lab.metrics()
    assert "lepton_gateway_refused_bodies_total 1.0" in metrics
    assert "lepton_gateway_free_body_bytes 500000.0" in metrics
    assert (await lab.client.post(INFER, content=bytes(64 << 10))).status_code == 200
    for each in requests:
        answering(each)
    assert [(await each).status_code for each in waiting] == [200, 200]
    assert (await lab.client.post(INFER, content=bytes(600_000))).status_code == 200


async def test_who_has_no_key_is_refused_before_a_large_body_is_taken(etcd: EtcdClient, telemetry: Telemetry) -> None:
    async with running(etcd, telemetry, keyless=False) as lab:
        key, reader = lab.key, await lab.new_key(Scope.READ)
        await lab.until("/v2/models/nobody/ready", 404, key=reader)
        announced = "content-length: 300000\r\n"
        assert await _first_line(lab, announced) == b"HTTP/1.1 401 Unauthorized"
        assert (
            await _first_line(lab, f"{announced}authorization: Bearer lp_{'x' * 43}\r\n")
            == b"HTTP/1.1 401 Unauthorized"
        )
        chunk = b"11000\r\n" + bytes(0x11000)  # and more to come
        assert await _first_line(lab, "transfer-encoding: chunked\r\n", chunk) == b"HTTP/1.1 401 Unauthorized"
        for known in (key, reader):
            expecting = f"{announced}authorization: Bearer {known}\r\nexpect: 100-continue\r\n"
            assert await _first_line(lab, expecting) == b"HTTP/1.1 100 Continue"


async def _first_line(lab: Lab, headers: str, body: bytes = b"") -> bytes:
    """Of what is answered to a request that is not whole yet."""
    reader, writer = await asyncio.open_connection(*lab.address)
    writer.write(f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n".encode() + body)
    async with lab.patience():
        line = await reader.readline()
    writer.transport.abort()
    return line.strip()


async def test_a_model_has_a_rate_of_its_own(lab: Lab) -> None:
    await lab.serve("slow", 1, limits=Limits(rate_per_s=0.01, burst=1))
    await lab.until("/v2/models/slow", 200)
    assert (await lab.client.post("/v2/models/slow/infer")).status_code == 200
    response = await lab.client.post("/v2/models/slow/infer")
    assert response.status_code == 429
    assert "model 'slow' is over its rate" in error_of(response)


async def test_what_waits_goes_in_its_turn_with_the_time_it_has_left(lab: Lab) -> None:
    # The worker says that they wait too long: the places become fewer, down to two.
    lab.mesh.handler = lambda request: request.respond(200, JSON + b"x-lepton-queue-ms: 100\r\n", OK)
    async with lab.patience():
        while 'model_in_flight_limit{model="m",pool="cpu",tenant="acme"} 2.0' not in await lab.metrics():
            for _ in range(10):
                assert (await lab.client.post(INFER)).status_code == 200
    held: asyncio.Queue[Request] = asyncio.Queue()
    lab.mesh.handler = held.put_nowait
    timeout = {"x-request-timeout-ms": "5000"}
    asked = [asyncio.create_task(lab.client.post(INFER, headers=timeout)) for _ in range(2)]
    running = [await held.get() for _ in asked]
    asked += [asyncio.create_task(lab.client.post(INFER, headers=timeout)) for _ in range(2)]
    await told(lab, 'queue_length{class="interactive",pool="cpu"} 2.0')
    asked[2].cancel()  # Its caller leaves.
    await told(lab, 'queue_length{class="interactive",pool="cpu"} 1.0')
    running[0].respond(200, JSON, OK)
    last = await held.get()
    left_ms = int(last.headers[b"x-request-timeout-ms"])
    assert left_ms < 5000
    assert last.headers[b"x-envoy-upstream-rq-timeout-ms"] == b"%d" % left_ms
    for request in (running[1], last):
        request.respond(200, JSON, OK)
    assert [(await asked[index]).status_code for index in (0, 1, 3)] == [200] * 3
    assert held.empty()
    assert 'lepton_gateway_in_flight{model="m",tenant="acme"} 0.0' in await lab.metrics()


class Gateway:
    """What counts the requests of one key at one gateway."""

    def __init__(self, etcd: EtcdClient, clock_s: list[float]) -> None:
        self.admission = Admission(lambda: clock_s[0])
        self.quotas = Quotas(etcd, self.admission)
        self._lane = Lane(self.admission.pool("cpu"), "acme", Use("model 'm'", Limits()))
        self._caller = Caller("acme", frozenset({Scope.INFER}), "key-1", "", limits=KeyLimits(per_day=100))

    def ask(self, times: int) -> None:
        for _ in range(times):
            now = time.monotonic()
            ticket = Asked("acme", self._lane, 1, now, now + 30)
            self.admission.enter(ticket, self._caller)
            self.admission.leave(self._lane, ticket, now, None)

    @property
    def used(self) -> int:
        day = self.admission.keys["key-1"].day
        assert day is not None
        return day.on(self.admission.today())


class Asked(Ticket):
    def start(self) -> None: ...

    def refuse(self, error: LeptonError) -> None:
        raise error


async def test_gateways_count_a_day_together_and_restarts_forget_nothing(etcd: EtcdClient) -> None:
    clock_s = [20_000.5 * SECONDS_A_DAY]
    one, other = Gateway(etcd, clock_s), Gateway(etcd, clock_s)
    one.ask(30)
    other.ask(20)
    await asyncio.gather(one.quotas.share(), other.quotas.share())
    one.ask(1)
    await one.quotas.share()
    assert one.used == 51
    again = Gateway(etcd, clock_s)
    again.ask(1)
    await again.quotas.share()
    assert again.used == 52
    clock_s[0] += SECONDS_A_DAY
    again.ask(5)
    await again.quotas.share()
    found = await etcd.get(QUOTAS + "key-1")
    assert found is not None
    assert QuotaUse.model_validate_json(found.value) == QuotaUse(day=20_001, used=5)


async def test_counts_of_days_that_are_over_leave_etcd_whatever_became_of_their_keys(etcd: EtcdClient) -> None:
    clock_s = [20_000.5 * SECONDS_A_DAY]
    gateway = Gateway(etcd, clock_s)
    gateway.ask(3)
    await gateway.quotas.share()
    for days_later, is_there in ((0, True), (1, True), (2, False)):
        clock_s[0] = (20_000.5 + days_later) * SECONDS_A_DAY
        await gateway.quotas.sweep()
        assert (await etcd.get(QUOTAS + "key-1") is not None) is is_there


async def test_a_count_that_cannot_be_read_keeps_no_other_in_etcd(etcd: EtcdClient) -> None:
    clock_s = [20_000.5 * SECONDS_A_DAY]
    gateway = Gateway(etcd, clock_s)
    gateway.ask(3)
    await gateway.quotas.share()
    await etcd.put(QUOTAS + "a-key", b"not JSON")  # Listed before the other.
    clock_s[0] += 2 * SECONDS_A_DAY
    with structlog.testing.capture_logs() as lines:
        await gateway.quotas.sweep()
    assert await etcd.get(QUOTAS + "key-1") is None
    assert [(each["log_level"], each["key"]) for each in lines] == [("warning", QUOTAS + "a-key")]


async def test_a_count_that_cannot_be_read_begins_anew_and_stops_nothing(etcd: EtcdClient) -> None:
    gateway = Gateway(etcd, [20_000.5 * SECONDS_A_DAY])
    await etcd.put(QUOTAS + "key-1", b"not JSON")
    gateway.ask(3)
    await gateway.quotas.share()
    found = await etcd.get(QUOTAS + "key-1")
    assert found is not None
    assert QuotaUse.model_validate_json(found.value) == QuotaUse(day=20_000, used=3)


async def test_a_key_that_is_used_again_while_its_old_count_is_swept_keeps_the_new_one(
    etcd: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_s = [20_000.5 * SECONDS_A_DAY]
    gateway, other = Gateway(etcd, clock_s), Gateway(etcd, clock_s)
    gateway.ask(3)
    await gateway.quotas.share()
    clock_s[0] += 2 * SECONDS_A_DAY
    listed = etcd.list

    async def listed_before_another_writes(prefix: str) -> tuple[Sequence[Versioned], int]:
        found = await listed(prefix)
        other.ask(1)
        await other.quotas.share()
        return found

    monkeypatch.setattr(etcd, "list", listed_before_another_writes)
    await gateway.quotas.sweep()
    found = await etcd.get(QUOTAS + "key-1")
    assert found is not None
    assert QuotaUse.model_validate_json(found.value) == QuotaUse(day=20_002, used=1)
