"""A platform's life with known secrets, logged at the finest level: none of them is anywhere but where it belongs."""

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
from aiokafka import AIOKafkaProducer
from lepton.home import Home
from lepton_common.events import ModelCreated

from ..integration.local_platform import Platform, running_platform, until
from ..integration.oip_requests import GOOD, infer
from ..integration.onnx_models import mlp

ADMIN_KEY = "lp_" + "CanaryOfTheOperator".ljust(43, "k")
PASSWORD = "CanaryOfTheDatabase" + "p" * 24
WRONG_KEY = "lp_" + "CanaryOfAGuess".ljust(43, "g")
# Where they belong.
KEPT = {"key", "postgres/password"}
# Requests that go wrong in every service, with the key also where it does not belong.
WRONG = (
    ("GET", "/v1/models/none?api_key={key}"),
    ("POST", "/v1/keys?key={key}"),
    ("GET", "/v1/rollouts/none?key={key}"),
    ("PUT", "/v1/policies/secrets?key={key}"),
    ("GET", "/v1/windows?model=secrets&key={key}"),
    ("POST", "/v2/models/secrets/infer?key={key}"),
    ("POST", "/v2/repository/models/none/load?key={key}"),
    ("GET", "/nothing?key={key}"),
)


@contextmanager
def collecting() -> Iterator[tuple[str, list[bytes]]]:
    """A collector of traces: its URL, and all it was sent."""
    sent: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()
            thread.join()


async def test_secrets_are_nowhere_but_where_they_belong(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "platform")
    home.create()
    (home.folder / "key").write_text(ADMIN_KEY)
    (home.folder / "postgres").mkdir()
    (home.folder / "postgres" / "password").write_text(PASSWORD)
    with collecting() as (otlp, traces):
        settings = {"LEPTON_LOG_LEVEL": "debug", "LEPTON_OTLP": otlp}
        with running_platform(home.folder, workers=1, settings=settings) as platform:
            assert platform.key == ADMIN_KEY
            made, told = _live(platform)
            await _poison(platform)
            told.append(_lose_the_database(platform))
            told += [_text(platform.layout.ports[name], "/metrics") for name in ("registry", "rollout", "monitor")]
            told += [_text(platform.layout.ports[name], "/metrics") for name in ("gateway-admin", "worker-1")]
            told += [" ".join(process.cmdline()) for part in platform.pids() for process in _family(platform, part)]
        # Ended, so that everything is on disk and was sent.
        secrets = [ADMIN_KEY, PASSWORD, WRONG_KEY, made]
        found = {str(path): content for path, content in _files(home.folder)}
        found |= {f"answer {number}": text.encode() for number, text in enumerate(told)}
        found |= {f"trace {number}": body for number, body in enumerate(traces)}
    # What is looked through is all there, and can be read.
    assert any(b'"level":"debug"' in content for content in found.values())
    for folder in ("logs/gateway", "kafka", "etcd", "postgres"):
        assert any(b"secrets" in content for place, content in found.items() if f"/{folder}" in place), folder
    assert any(b"no headers" in content for place, content in found.items() if ".dlq-" in place)
    assert any(b"secrets" in body for body in traces)
    for secret in secrets:
        forms = (secret.encode(), base64.b64encode(secret.encode()).rstrip(b"=")[:-2], quote(secret, safe="").encode())
        assert [place for place, content in found.items() if any(form in content for form in forms)] == []


def _live(platform: Platform) -> tuple[str, list[str]]:
    """A model was pushed, called and rolled out, a key made, and much went wrong: that key, and all the answers."""
    answers = []
    with platform.client() as client:
        client.push(mlp(1), name="secrets")
        made = client.create_key("made", scopes=["infer", "read", "deploy"]).secret
        client.push(mlp(2), name="secrets")
    with platform.http(made) as http:
        until(lambda: infer(http, "secrets", GOOD).status_code == 200)
        answers.append(http.get("/v1/models/secrets/timeline").text)
    with platform.http() as http:
        answers += [http.get(path).text for path in ("/v1/keys", "/v1/tenants", "/v1/serving", "/v2/logging")]
        http.post("/v2/logging", json={"log_verbose_level": 2})
        http.post("/v2/trace/setting", json={"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
        infer(http, "secrets", GOOD)
    for key in (ADMIN_KEY, made, WRONG_KEY):
        headers = [
            {"authorization": f"Bearer {key}"},
            {"x-api-key": key},
            {"authorization": f"Basic {key}"},
            {"cookie": key},
        ]
        with platform.http(None) as http:
            for method, path in WRONG:
                for each in headers:
                    answer = http.request(method, path.format(key=key), headers=each, content=b'{"x": ')
                    answers.append(answer.text + str(answer.headers))
    return made, answers


async def _poison(platform: Platform) -> None:
    """A message that nobody can handle is among the dead letters."""
    producer = AIOKafkaProducer(bootstrap_servers=platform.layout.kafka)
    await producer.start()
    try:
        await producer.send_and_wait(ModelCreated.topic, b"no headers", key=b"default/secrets")
    finally:
        await producer.stop()


def _lose_the_database(platform: Platform) -> str:
    """What goes wrong without it is logged, and told to callers."""
    platform.kill("postgres")
    with platform.http() as http:
        answer = http.get("/v1/models").text
    platform.wait_ready()
    return answer


def _text(port: int, path: str) -> str:
    return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False).text


def _family(platform: Platform, part: str) -> list[psutil.Process]:
    process = platform.process(part)
    return [process, *process.children(recursive=True)]


def _files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Everything that the platform has written: logs, events, tables, etcd's keys, configurations."""
    for path in folder.rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in KEPT:
            yield path, path.read_bytes()
