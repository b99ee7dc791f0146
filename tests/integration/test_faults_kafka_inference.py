"""Inference over Kafka while gateways, workers and the broker are killed: every request has its outcome.

By hand: LEPTON_REQUESTS=100000 LEPTON_ASYNC_KILLS=50 pytest -s tests/integration/test_faults_kafka_inference.py
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from confluent_kafka import Consumer, KafkaException, Producer
from lepton.ports import free_port

from .faults import REQUEST, push_versions, wrong
from .local_platform import Platform, running_platform

COUNT = int(os.environ.get("LEPTON_REQUESTS", "3000"))
KILLS = int(os.environ.get("LEPTON_ASYNC_KILLS", "5"))
REQUESTS, RESULTS = "lepton.inference.requests", "lepton.inference.results"
MODEL = "checked"
_PER_KILL_S = 40.0
_QUIET = {"log_level": 0}  # A broker that is away is what this is about.


class SecondGateway:
    """Another gateway, that shares the partitions with the platform's own."""

    def __init__(self, platform: Platform, folder: Path) -> None:
        own = {"LEPTON_PORT": str(free_port()), "LEPTON_GRPC_PORT": "0", "LEPTON_ADMIN_PORT": "0"}
        own |= {"LEPTON_GATEWAY_ID": "gateway-2", "LEPTON_INSTANCE": "gateway-2"}
        self._environment = {**platform.process("gateway").environ(), **own}
        self._log = folder / "gateway-2.log"
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lepton_gateway.main"], env=self._environment, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """It has ended by SIGKILL, and another one starts."""
        self._process.kill()
        self._process.wait()
        self.start()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Results:
    """Every result that a plain consumer saw, from the beginning on, while the broker comes and goes."""

    def __init__(self, servers: str) -> None:
        self.ids: dict[str, Counter[str]] = {}  # of a request: the ids of its outcomes
        self.wrong: list[str] = []
        self._servers = servers
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _read(self) -> None:
        group = {"group.id": str(uuid4()), "auto.offset.reset": "earliest", **_QUIET}
        consumer = Consumer({"bootstrap.servers": self._servers, **group})
        consumer.subscribe([RESULTS])
        while not self._over.is_set():
            for message in consumer.consume(1000, 0.2):
                if message.error() is not None:
                    continue
                pairs: Any = message.headers()  # whose type is that of what may be written
                told = {name: value.decode() for name, value in pairs}
                self.ids.setdefault(told["ce_correlationid"], Counter())[told["ce_id"]] += 1
                body = message.value() or b""
                if problem := told["lepton-status"] != "200" or wrong(body, told["lepton-version"]):
                    self.wrong.append(f"{told['lepton-status']}: {problem} {body[:200]!r}")
        consumer.close()


def messages(who: str, count: int, secret: str) -> Iterator[tuple[str, bytes, list[tuple[str, bytes]]]]:
    """(id, value, headers) of each request."""
    value = json.dumps({**json.loads(REQUEST), "model": MODEL}).encode()
    for number in range(count):
        request_id = f"{who}-{number}"
        yield request_id, value, [("id", request_id.encode()), ("authorization", f"Bearer {secret}".encode())]


def write_with_confluent(servers: str, count: int, secret: str) -> None:
    settings = {"bootstrap.servers": servers, "enable.idempotence": True, "message.timeout.ms": 600_000, **_QUIET}
    producer = Producer(settings)
    for request_id, value, headers in messages("confluent", count, secret):
        while True:
            try:
                producer.produce(REQUESTS, value, request_id, headers=dict(headers))
                break
            except (BufferError, KafkaException):
                producer.poll(0.1)
        producer.poll(0)
    assert producer.flush(300) == 0


async def write_with_aiokafka(servers: str, count: int, secret: str) -> None:
    """A producer that failed is replaced, and what it had not stored for certain is written again."""
    left = list(messages("aiokafka", count, secret))
    while left:
        producer = AIOKafkaProducer(bootstrap_servers=servers, enable_idempotence=True)
        try:
            async with asyncio.timeout(60):
                await producer.start()
                while left:
                    batch = left[:200]
                    sent = [await producer.send(REQUESTS, value, key=i.encode(), headers=h) for i, value, h in batch]
                    await asyncio.gather(*sent)
                    del left[:200]
        except (KafkaError, TimeoutError, OSError):
            await asyncio.sleep(0.5)
        finally:
            with suppress(KafkaError, TimeoutError, OSError):
                async with asyncio.timeout(2):
                    await producer.stop()
            await producer.client.close()


@contextmanager
def writing(platform: Platform) -> Iterator[None]:
    """Half of the requests are written by each producer, beside whatever happens in the block."""
    servers, secret = platform.layout.kafka, platform.key
    half = COUNT // 2
    writers = [
        threading.Thread(target=write_with_confluent, args=(servers, half, secret)),
        threading.Thread(target=lambda: asyncio.run(write_with_aiokafka(servers, COUNT - half, secret))),
    ]
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        for writer in writers:
            writer.join()


@pytest.mark.timeout(120 + int(KILLS * _PER_KILL_S) + COUNT // 50)
def test_every_request_has_its_outcome_whoever_is_killed(tmp_path: Path) -> None:
    chance = random.Random(5)
    with running_platform(tmp_path / "platform", workers=2) as platform:
        push_versions(platform, MODEL, 1)
        second = SecondGateway(platform, tmp_path)
        results = Results(platform.layout.kafka)
        killed: Counter[str] = Counter()
        began = time.monotonic()
        try:
            with writing(platform):
                for _ in range(KILLS):
                    time.sleep(chance.uniform(0.2, 2.0))
                    victim = chance.choice(["gateway", "gateway-2", "worker-1", "worker-2", "kafka"])
                    killed[victim] += 1
                    if victim == "gateway-2":
                        second.kill()
                    else:
                        platform.kill(victim)
                        platform.wait_ready()
            end = time.monotonic() + 60 + COUNT / 100
            while len(results.ids) < COUNT and time.monotonic() < end:
                time.sleep(0.1)
            took_s = time.monotonic() - began
            time.sleep(2)  # What is answered twice is answered again by now.
        finally:
            results.close()
            second.end()
    answered = sum(sum(each.values()) for each in results.ids.values())
    found = len(results.ids)
    print(
        f"{COUNT} requests, {dict(killed)} killed: {found} distinct results, {COUNT - found} lost, "
        f"{answered - found} repeats, {took_s:.0f} s, {COUNT / took_s:.0f} requests/s"
    )
    assert len(results.ids) == COUNT
    assert all(len(outcomes) == 1 for outcomes in results.ids.values()), "a repeat with another ce_id"
    assert not results.wrong, results.wrong[:3]
