"""A platform small enough to break on purpose: `/v1` in its real shapes, `/v2` on the platform's own codec."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import onnx
import onnx.helper
import orjson
import pytest
from lepton import Client
from lepton.cli import app
from lepton.models import (
    CreatedKey,
    Model,
    Page,
    Tenant,
    TimelineEntry,
    Upload,
    Version,
)
from lepton_common import oip
from lepton_common.errors import LeptonError, status_of
from lepton_common.signature import Signature, TensorSpec
from pydantic import BaseModel
from typer.testing import CliRunner, Result

from libs.sdk.tests.traffic import ROUTES, Answer, Traffic, not_found

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SECRET, NEW_SECRET = "lp_secret", "lp_another"
KEY_ID, NEW_KEY_ID = "0123456789abcdef", "fedcba9876543210"

# The model that is served answers with its inputs.
SPECS = (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("text", "BYTES", (-1,)), TensorSpec("n", "INT64", (-1,)))


class Platform(Traffic):
    """What it was sent, what it stores, and the faults to come."""

    def __init__(self) -> None:
        super().__init__()
        self.url = ""
        self.requests: list[str] = []
        self.artifacts: dict[str, bytes] = {}
        self.staged: dict[str, bytearray] = {}
        self.versions: dict[str, list[Version]] = {}
        self.keys: list[CreatedKey] = []
        self.tenants: list[Tenant] = []
        self.signature = Signature(SPECS[:1], SPECS[:1])
        self.broken_uploads: list[int] = []  # For each upload to break: after how many bytes.
        self.answers: list[Answer] = []  # Given to the next requests, whatever they are.

    def counted(self, start: str) -> int:
        return sum(line.startswith(start) for line in self.requests)

    # --- registry ---

    def put_artifact(self, request: "Request", sha256: str) -> None:
        span, total = request.headers["content-range"].removeprefix("bytes ").split("/")
        staged = self.staged.setdefault(sha256, bytearray())
        if span != "*" and int(span.split("-")[0]) != len(staged):
            raise Answer(409, {"title": "Conflict", "status": 409, "detail": "wrong offset"})
        left = request.length
        if self.broken_uploads:
            left = self.broken_uploads.pop(0)
            staged += request.rfile.read(left)
            raise ConnectionAbortedError
        staged += request.rfile.read(left)
        if len(staged) < int(total):
            raise Answer(202, Upload(sha256=sha256, offset=len(staged), total_bytes=int(total)))
        assert hashlib.sha256(staged).hexdigest() == sha256
        self.artifacts[sha256] = bytes(staged)
        raise Answer(201, {"sha256": sha256})

    def head_artifact(self, _: "Request", sha256: str) -> None:
        if sha256 in self.artifacts:
            raise Answer(200)
        raise Answer(404, headers={"upload-offset": str(len(self.staged.get(sha256, b"")))})

    def post_version(self, request: "Request", model: str) -> None:
        wanted = request.json()
        known = self.versions.setdefault(model, [])
        for version in known:
            if version.sha256 == wanted["sha256"]:
                raise Answer(200, version)
        version = Version(
            tenant="default",
            model=model,
            version=len(known) + 1,
            sha256=wanted["sha256"],
            size_bytes=len(self.artifacts[wanted["sha256"]]),
            format="onnx",
            signature={"inputs": [], "outputs": []},
            batching=wanted["batching"],
            metrics=wanted["metrics"],
            labels=wanted["labels"],
            state="registered",
            created_at=NOW,
            created_by="local",
        )
        known.append(version)
        if wanted["deploy"] and len(known) == 1:
            self.start_rollout(model, 1)
        raise Answer(201, version)

    def get_models(self, request: "Request") -> None:
        names = sorted(self.versions)
        after = request.query.get("after", "")
        name = next((each for each in names if each > after), None)
        if name is None:
            raise Answer(200, Page[Model](items=[]))
        raise Answer(200, Page[Model](items=[self.model(name)], next=name if name != names[-1] else None))

    def get_model(self, _: "Request", name: str) -> None:
        raise Answer(200, self.model(name))

    def model(self, name: str) -> Model:
        count = len(self.known(name))
        aliases = {"production": self.stable[name]} if name in self.stable else {}
        return Model(tenant="default", name=name, latest_version=count, aliases=aliases, created_at=NOW)

    def get_versions(self, _: "Request", model: str) -> None:
        raise Answer(200, Page[Version](items=self.known(model)))

    def get_version(self, _: "Request", model: str, number: str) -> None:
        raise Answer(200, self.known(model)[int(number) - 1])

    def get_timeline(self, _: "Request", model: str) -> None:
        entries = [
            TimelineEntry(id=str(uuid4()), at=NOW, type="VersionRegistered", version=each.version, evidence={})
            for each in self.known(model)
        ]
        raise Answer(200, Page[TimelineEntry](items=entries))

    def known(self, model: str) -> list[Version]:
        if model not in self.versions:
            raise not_found(f"there is no model {model!r}")
        return self.versions[model]

    def post_key(self, request: "Request") -> None:
        wanted = request.json()
        key = CreatedKey(
            id=KEY_ID,
            prefix="lp_se",
            tenant="default",
            created_at=NOW,
            secret=SECRET,
            **{name: wanted[name] for name in ("name", "scopes", "expires_at", "models", "limits")},
        )
        self.keys = [key]
        raise Answer(201, key)

    def post_rotation(self, request: "Request", key: str) -> None:
        old = next((each for each in self.keys if each.id == key), None)
        if old is None:
            raise not_found(f"there is no key {key!r}")
        if old.replaced_by:
            raise Answer(409, {"title": "Conflict", "status": 409, "detail": "it was rotated before"})
        new = old.model_copy(update={"id": NEW_KEY_ID, "secret": NEW_SECRET})
        ends_at = NOW + timedelta(seconds=request.json()["overlap_s"])
        self.keys = [old.model_copy(update={"replaced_by": NEW_KEY_ID, "expires_at": ends_at}), new]
        raise Answer(201, new)

    def post_tenant(self, request: "Request") -> None:
        self.tenants.append(Tenant(name=request.json()["name"], created_at=NOW))
        raise Answer(201, self.tenants[-1])

    def get_tenants(self, _: "Request") -> None:
        raise Answer(200, [each.model_dump(mode="json") for each in self.tenants])

    def get_keys(self, _: "Request") -> None:
        raise Answer(200, [each.model_dump(mode="json", exclude={"secret"}) for each in self.keys])

    def delete_key(self, _: "Request", key: str) -> None:
        raise Answer(204) if key in (KEY_ID, NEW_KEY_ID) else not_found(f"there is no key {key!r}")

    # --- inference ---

    def metadata(self, _: "Request", model: str, version: str = "7") -> None:
        raise Answer(
            200, {"name": model, "versions": [version], "platform": "onnxruntime_onnx", **self.signature.to_dict()}
        )

    def infer(self, request: "Request", model: str, version: str = "7") -> None:
        try:
            length = oip.header_length_of(request.headers["inference-header-content-length"].encode())
            wanted = oip.decode_request(request.rfile.read(request.length), length, self.signature)
        except LeptonError as error:
            raise Answer(status_of(error), {"error": error.message}) from error
        arrays = {output.name: wanted.inputs[output.name] for output in wanted.outputs}
        head, parts = oip.encode_response(model, version, wanted, arrays, self.signature)
        raise Answer(200, b"".join(parts), {"inference-header-content-length": str(head)})


_ROUTES: dict[tuple[str, str], Callable[..., None]] = {
    ("HEAD", "v1/artifacts/*"): Platform.head_artifact,
    ("PUT", "v1/artifacts/*"): Platform.put_artifact,
    ("POST", "v1/models/*/versions"): Platform.post_version,
    ("GET", "v1/models"): Platform.get_models,
    ("GET", "v1/models/*"): Platform.get_model,
    ("GET", "v1/models/*/versions"): Platform.get_versions,
    ("GET", "v1/models/*/versions/*"): Platform.get_version,
    ("GET", "v1/models/*/timeline"): Platform.get_timeline,
    ("POST", "v1/keys"): Platform.post_key,
    ("GET", "v1/keys"): Platform.get_keys,
    ("POST", "v1/keys/*/rotate"): Platform.post_rotation,
    ("POST", "v1/tenants"): Platform.post_tenant,
    ("GET", "v1/tenants"): Platform.get_tenants,
    ("DELETE", "v1/keys/*"): Platform.delete_key,
    **ROUTES,
    ("GET", "v2/models/*"): Platform.metadata,
    ("GET", "v2/models/*/versions/*"): Platform.metadata,
    ("POST", "v2/models/*/infer"): Platform.infer,
    ("POST", "v2/models/*/versions/*/infer"): Platform.infer,
}


class Request(BaseHTTPRequestHandler):
    """One connection to the platform of its server."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    @property
    def length(self) -> int:
        return int(self.headers.get("content-length", 0))

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def json(self) -> Any:
        return orjson.loads(self.rfile.read(self.length))

    def do_any(self) -> None:
        platform = self.server.platform
        platform.requests.append(f"{self.command} {self.path}")
        try:
            self.answer()
        except ConnectionAbortedError:
            self.close_connection = True
        except Answer as answer:
            body = answer.body if isinstance(answer.body, bytes) else orjson.dumps(answer.body, default=_plain)
            self.send_response(answer.status)
            for name, value in {**answer.headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any  # noqa: N815  # So http.server calls them.

    def answer(self) -> None:
        if self.server.platform.answers:
            self.rfile.read(self.length)
            raise self.server.platform.answers.pop(0)
        parts = urlsplit(self.path).path.strip("/").split("/")
        for (method, pattern), route in _ROUTES.items():
            wanted = pattern.split("/")
            if method == self.command and len(wanted) == len(parts):
                pairs = list(zip(wanted, parts, strict=True))
                if all(want in ("*", part) for want, part in pairs):
                    return route(self.server.platform, self, *(part for want, part in pairs if want == "*"))
        raise not_found(f"no route {self.path}")

    def log_message(self, *_: object) -> None:
        """Tests look at `Platform.requests` instead."""


class Server(ThreadingHTTPServer):
    platform: Platform
    daemon_threads = True


def _plain(value: object) -> Any:
    assert isinstance(value, BaseModel)
    return value.model_dump(mode="json")


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    """A running platform that `Client()` and the command line find by themselves."""
    with Server(("127.0.0.1", 0), Request) as server:
        server.platform = Platform()
        server.platform.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("LEPTON_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("LEPTON_URL", server.platform.url)
        monkeypatch.delenv("LEPTON_API_KEY", raising=False)
        yield server.platform
        server.shutdown()
        thread.join()


@pytest.fixture
def client(platform: Platform) -> Iterator[Client]:
    with Client() as client:
        yield client


Run = Callable[..., Result]


@pytest.fixture
def run(platform: Platform) -> Run:
    """Runs `lepton ARGS…` against the platform."""

    def run(*args: object, stdin: str = "") -> Result:
        return CliRunner().invoke(app, [str(each) for each in args], input=stdin)

    return run


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An ONNX file of a bit more than one upload chunk."""
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [300_000], bytes(1_200_000), raw=True)
    value = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [300_000])
    graph = onnx.helper.make_graph([], "empty", [], [value], [weight])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    return path
