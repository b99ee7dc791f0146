import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from lepton.envoy import Envoy
from lepton.ports import free_port
from lepton.processes import Process, running


class Echo(ThreadingHTTPServer):
    """A service that says its name, and how it was asked."""

    daemon_threads = True

    def __init__(self, name: str, port: int = 0) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                size = len(self.rfile.read(int(self.headers.get("content-length", 0))))
                answer = f"{name} {self.path} {size}".encode()
                self.send_response(200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", port), Handler)
        self.name = name
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture(scope="module")
def late_port() -> int:
    """Where rollout will listen, in the one test that starts it."""
    return free_port()


@pytest.fixture(scope="module")
def envoy(tmp_path_factory: pytest.TempPathFactory, late_port: int) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("envoy")
    services = [Echo(name) for name in ("gateway", "registry", "monitor")]
    ports = {service.name: service.server_port for service in services} | {"rollout": late_port}
    with running(Envoy(folder / "envoy", folder / "mesh", ports)) as process:
        yield process
    for service in services:
        service.close()


@pytest.fixture(scope="module")
def recipe(envoy: Process) -> Envoy:
    assert isinstance(envoy.recipe, Envoy)
    return envoy.recipe


@pytest.fixture(scope="module")
def front(recipe: Envoy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=recipe.url, timeout=20) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "service"),
    [
        ("/v2", "gateway"),
        ("/v2/models/m/infer?x=%2F", "gateway"),
        ("/v1/models", "registry"),
        ("/v1", "registry"),
        ("/v1/servings", "registry"),
        ("/v1/windows?model=m", "monitor"),
        ("/v1/windows/counters", "monitor"),
        ("/v1/labels?model=m", "monitor"),
        ("/v1/rolloutsandmore", "registry"),
    ],
)
def test_path_leads_to_its_service_as_it_was_sent(front: httpx.Client, path: str, service: str) -> None:
    assert front.get(path).text.split()[:2] == [service, path]


@pytest.mark.parametrize("path", ["/", "/v3", "/v1x", "/metrics"])
def test_other_paths_are_a_problem_json_404(front: httpx.Client, path: str) -> None:
    answer = front.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {"type": "about:blank", "status": 404, "detail": "Lepton answers under /v1 and /v2"}


def test_large_body_passes_whole(front: httpx.Client) -> None:
    assert front.post("/v1/artifacts/x", content=bytes(20_000_000)).text.split()[2] == "20000000"


def test_service_that_is_just_being_restarted_is_waited_for(front: httpx.Client, late_port: int) -> None:
    service: list[Echo] = []
    timer = threading.Timer(0.5, lambda: service.append(Echo("rollout", late_port)))
    timer.start()
    try:
        assert front.post("/v1/rollouts", content=b"{}").text.split()[0] == "rollout"
        for path in ("/v1/serving/m", "/v1/policies", "/v1/mesh/m"):
            assert front.get(path).text.split()[0] == "rollout"
    finally:
        timer.join()
        service[0].close()


@pytest.mark.parametrize(
    ("path", "content_type", "key"),
    [("/v2/models/m/infer", "application/json", "error"), ("/v1/models", "application/problem+json", "detail")],
)
def test_missing_service_is_a_503_in_the_words_of_its_api(
    tmp_path: Path, path: str, content_type: str, key: str
) -> None:
    with running(Envoy(tmp_path / "envoy", tmp_path / "mesh")) as process:
        assert isinstance(process.recipe, Envoy)
        answer = httpx.get(process.recipe.url + path, timeout=20)
    assert answer.status_code == 503
    assert answer.headers["content-type"] == content_type
    assert answer.headers["retry-after"] == "1"
    assert answer.json()[key] == "this part of the platform does not answer just now"


def test_mesh_without_routes_answers_an_oip_error(recipe: Envoy) -> None:
    answer = httpx.get(f"http://{recipe.mesh}/v2/models/m", timeout=20)
    assert (answer.status_code, answer.json()) == (404, {"error": "the mesh knows no such model"})


def test_admin_port_only_tells(recipe: Envoy) -> None:
    with httpx.Client(base_url=f"http://{recipe.admin}", trust_env=False) as admin:
        for path in (
            "/quitquitquit",
            "/healthcheck/fail",
            "/logging?level=trace",
            "/runtime_modify?a=b",
            "/drain_listeners",
        ):
            assert admin.post(path).status_code == 403, path
        assert admin.get("/ready").status_code == 200


def test_restart_keeps_the_meshs_files(tmp_path: Path) -> None:
    envoy = Envoy(tmp_path / "envoy", tmp_path / "mesh")
    envoy.folder.mkdir()
    envoy.prepare()
    routes = envoy.mesh_dir / "rds.json"
    routes.write_text(routes.read_text().replace('"virtual_hosts": []', f'"virtual_hosts": [{HELLO}]'))
    for _ in range(2):
        with running(envoy):
            assert _eventually_hello(f"http://{envoy.mesh}/")


HELLO = """{"name": "hello", "domains": ["*"], "routes": [
  {"match": {"prefix": "/"}, "direct_response": {"status": 503, "body": {"inline_string": "hello"}}}]}"""


def _eventually_hello(url: str) -> bool:
    """True when the mesh's routes, which Envoy reads just after it is ready, are there within 5 s."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if httpx.get(url, timeout=5).json() == {"error": "hello"}:
            return True
    return False
