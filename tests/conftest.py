"""The platform as a user has it: real Kafka, PostgreSQL, etcd, Envoy and every service, started once, and ended
after the last test here.

`platform` is shared: a test leaves it as it found it, apart from models and keys of its own. What destroys something
gets a platform of its own from `private_platform`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import httpx
import numpy as np
import pytest
from lepton import Client
from tritonclient.http import InferenceServerClient

from .integration import onnx_models
from .integration.command import Lepton, command
from .integration.local_platform import Platform, running_platform, until
from .integration.oip_requests import GOOD, ROW, infer

SETTINGS = {
    # A model that hangs while it loads is given up after so long. Sound ones take a second or two.
    "LEPTON_LOAD_TIMEOUT_S": "15",
    # A worker runs one request of a model at a time, however many cores there are.
    "LEPTON_INSTANCES": "1",
}

# Python runs the sitecustomize.py in it before anything else.
AUDITED = Path(__file__).with_name("security") / "audited"

_numbers = count(1)


@pytest.fixture(scope="package")
def platform(tmp_path_factory: pytest.TempPathFactory, pickles: Path) -> Iterator[Platform]:
    """The platform that all share, with two workers."""
    audited = {"PYTHONPATH": str(AUDITED), "PICKLES": str(pickles)}
    with running_platform(tmp_path_factory.mktemp("platform"), settings={**SETTINGS, **audited}) as platform:
        yield platform


@pytest.fixture(scope="package")
def pickles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of every Python process of the platform, which says what it unpickled."""
    return tmp_path_factory.mktemp("pickles")


@pytest.fixture
def private_platform(tmp_path: Path) -> Iterator[Callable[..., Platform]]:
    """Starts platforms that belong to the test alone: `private_platform(workers=1, settings={"LEPTON_…": "…"})`."""
    with ExitStack() as platforms:

        def start(*, workers: int = 2, settings: Mapping[str, str] | None = None) -> Platform:
            folder = tmp_path / f"platform-{next(_numbers)}"
            return platforms.enter_context(running_platform(folder, workers=workers, settings=settings))

        yield start


@pytest.fixture
def client(platform: Platform) -> Iterator[Client]:
    """The operator's client."""
    with platform.client() as client:
        yield client


@pytest.fixture
def lepton(platform: Platform, tmp_path: Path) -> Lepton:
    """The operator's command line."""
    return command(platform.home.folder, tmp_path)


@pytest.fixture
def name() -> str:
    """A name that no model, key or tenant has yet."""
    return f"test-{next(_numbers)}"


@pytest.fixture(scope="package")
def make_key(platform: Platform) -> Iterator[Callable[..., str]]:
    """Makes keys: `make_key("infer", "deploy", tenant="acme")` is the secret of a new one, known to every service."""
    with platform.client() as operator:

        def make(*scopes: str, tenant: str | None = None) -> str:
            if tenant and tenant not in {each.name for each in operator.tenants()}:
                operator.create_tenant(tenant)
            secret = operator.create_key(f"key-{next(_numbers)}", scopes=scopes, tenant=tenant).secret
            with platform.http(secret) as http:
                paths = ("/v1/models", "/v1/serving", "/v2")
                until(lambda: all(http.get(path).status_code != 401 for path in paths))
            return secret

        yield make


@pytest.fixture(scope="package")
def http(platform: Platform) -> Iterator[httpx.Client]:
    """A caller without a key: on this machine that is tenant `default`, which may infer."""
    with platform.http(None) as http:
        yield http


@pytest.fixture
def serves_on(http: httpx.Client, mlp: str, platform: Platform) -> Iterator[None]:
    """When the test is over the same processes serve, and serve the right answer."""
    before = platform.pids()
    yield
    answer = infer(http, mlp, GOOD)
    assert answer.status_code == 200, answer.text
    expected = onnx_models.mlp_scores(np.array([ROW], np.float32)).ravel()
    np.testing.assert_allclose(answer.json()["outputs"][0]["data"], expected, rtol=1e-4)
    assert platform.pids() == before


@pytest.fixture
def triton(platform: Platform) -> Iterator[InferenceServerClient]:
    """tritonclient without a key."""
    with InferenceServerClient(platform.address) as client:
        yield client


@pytest.fixture
def operator(platform: Platform) -> dict[str, str]:
    """Headers with a key that may do everything."""
    return {"Authorization": f"Bearer {platform.key}"}


# --- models, each pushed when the first test asks for it --------------------------------------------------------------


@pytest.fixture(scope="package")
def mlp(platform: Platform) -> str:
    return platform.serve("mlp", onnx_models.mlp())


@pytest.fixture(scope="package")
def every_datatype(platform: Platform) -> str:
    """All but BF16, side by side."""
    return platform.serve("every-datatype", onnx_models.identities(onnx_models.WITHOUT_BF16))


@pytest.fixture(scope="package")
def bfloat16(platform: Platform) -> str:
    """BF16 and FP32, side by side."""
    return platform.serve("bfloat16", onnx_models.identities(onnx_models.WITH_BF16))


@pytest.fixture(scope="package")
def echo(platform: Platform) -> str:
    return platform.serve("echo", onnx_models.echo())


@pytest.fixture(scope="package")
def text(platform: Platform) -> str:
    return platform.serve("text", onnx_models.echo("BYTES", ("rows",)))


@pytest.fixture(scope="package")
def arithmetic(platform: Platform) -> str:
    return platform.serve("arithmetic", onnx_models.arithmetic())


@pytest.fixture(scope="package")
def slow(platform: Platform) -> str:
    return platform.serve("slow", onnx_models.slow())


@pytest.fixture(scope="package")
def fragile(platform: Platform) -> str:
    return platform.serve("fragile", onnx_models.fragile())


@pytest.fixture(scope="package")
def neighbourly(platform: Platform) -> str:
    return platform.serve("neighbourly", onnx_models.neighbourly())
