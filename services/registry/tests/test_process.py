"""The registry as a process of its own: what it needs of memory, and what a kill -9 costs."""

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from lepton_registry.settings import Settings

from .conftest import OPERATOR, model_bytes, url_of

MEBIBYTE = 1 << 20


@contextmanager
def process(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """The registry, ready, and gone at the end."""
    values = settings.model_dump(exclude_none=True) | {"kafka": "127.0.0.1:1", "max_artifact_bytes": 1 << 30}
    variables = {f"LEPTON_{name.upper()}": str(value) for name, value in values.items()}
    command = [sys.executable, "-m", "lepton_registry.main"]
    with subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.DEVNULL) as running:
        try:
            deadline = time.monotonic() + 30
            while not is_ready(settings):
                assert running.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield running
        finally:
            running.kill()


def is_ready(settings: Settings) -> bool:
    try:
        return httpx.get(f"{url_of(settings)}/health/ready").is_success
    except httpx.TransportError:
        return False


def peak_memory_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.fixture
def client(settings: Settings) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {OPERATOR}"}
    with httpx.Client(base_url=url_of(settings), headers=headers, timeout=60) as client:
        yield client


def chunks(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), MEBIBYTE):
        yield data[start : start + MEBIBYTE]


def test_artifact_is_never_in_the_memory_of_the_service(settings: Settings, client: httpx.Client) -> None:
    data = model_bytes(padding=256 * MEBIBYTE)
    path = f"/v1/artifacts/{hashlib.sha256(data).hexdigest()}"
    with process(settings) as registry:
        before = peak_memory_bytes(registry.pid)
        assert client.put(path, content=chunks(data)).status_code == 201
        with client.stream("GET", path) as download:
            assert sum(map(len, download.iter_bytes())) == len(data)
        assert peak_memory_bytes(registry.pid) - before < 128 * MEBIBYTE


def test_upload_goes_on_after_a_kill_of_the_registry(settings: Settings, client: httpx.Client) -> None:
    data = model_bytes(padding=3 * MEBIBYTE)
    path, total, half = f"/v1/artifacts/{hashlib.sha256(data).hexdigest()}", len(data), len(data) // 2
    with process(settings) as registry:
        acknowledged = client.put(path, content=data[:half], headers={"content-range": f"bytes 0-{half - 1}/{total}"})
        assert acknowledged.json()["offset"] == half

        def killed_in_the_middle() -> Iterator[bytes]:
            yield data[half : half + MEBIBYTE]
            registry.kill()
            registry.wait()
            yield data[half + MEBIBYTE :]

        with pytest.raises(httpx.TransportError):
            client.put(
                path, content=killed_in_the_middle(), headers={"content-range": f"bytes {half}-{total - 1}/{total}"}
            )
    with process(settings):
        offset = int(client.head(path).headers["upload-offset"])
        assert half <= offset <= half + MEBIBYTE
        rest = client.put(path, content=data[offset:], headers={"content-range": f"bytes {offset}-{total - 1}/{total}"})
        assert rest.status_code == 201
