"""A full disk and damaged artifacts: nothing half-stored, nothing wrong served, healed by pushing the same again."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from lepton import Client
from lepton.errors import RolloutFailed

from . import onnx_models
from .faults import SETTINGS, answering_version, load_on, problem, push_versions, wait_for_workers
from .local_platform import Platform, running_platform, until

MODEL = "checked"
_BLOBS_BYTES = 4 << 20


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for a platform whose artifacts lie on a disk of their own, of 4 MiB."""
    folder = tmp_path_factory.mktemp("victim")
    blobs = folder / "blobs"
    blobs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_BLOBS_BYTES}", "tmpfs", str(blobs)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: that needs root")
    yield folder
    subprocess.run(["umount", str(blobs)], check=True)


@pytest.fixture(scope="module")
def victim(small_disk: Path) -> Iterator[Platform]:
    """A platform with MODEL's version 1 serving, on the small disk."""
    with running_platform(small_disk, settings=SETTINGS) as victim:
        push_versions(victim, MODEL, 1)
        yield victim


@pytest.fixture
def http(victim: Platform) -> Iterator[httpx.Client]:
    with victim.http() as http:
        yield http


@pytest.fixture
def client(victim: Platform) -> Iterator[Client]:
    with victim.client() as client:
        yield client


def test_a_full_disk_refuses_pushes_until_there_is_room_and_keeps_nothing_of_them(
    victim: Platform, http: httpx.Client, client: Client
) -> None:
    blobs = victim.home.folder / "blobs"
    before = _files(blobs)
    large = onnx_models.mlp(1, labels=False)  # other bytes than MODEL's version 1
    with load_on(victim, MODEL) as load:
        filler = _fill(blobs)
        data = large.SerializeToString()
        refused = http.put(f"/v1/artifacts/{hashlib.sha256(data).hexdigest()}", content=data)
        assert "full" in problem(refused)
        assert http.get("/v1/models/large").status_code == 404
        assert _files(blobs) == before | {filler}
        load.wait_for(100)
        filler.unlink()
        assert client.push(large, name="large", timeout=60).version == 1
    assert answering_version(http, "large") == "1"
    assert not load.failures, load.report()


def test_a_damaged_artifact_in_a_workers_cache_is_fetched_again(victim: Platform, client: Client) -> None:
    sha256 = client.version(MODEL, 1).sha256
    cached = victim.home.folder / "worker-1" / "cache" / f"{sha256}.artifact"
    right = cached.read_bytes()
    with load_on(victim, MODEL) as load:
        _damage(cached)
        victim.kill("worker-1")
        victim.wait_ready()
        wait_for_workers(victim, 2)
        load.wait_for(100)
    assert cached.read_bytes() == right
    assert not load.failures, load.report()


def test_a_damaged_stored_artifact_fails_its_rollout_with_a_reason_until_it_is_pushed_again(
    victim: Platform, http: httpx.Client, client: Client
) -> None:
    version = client.push(onnx_models.mlp(2), name=MODEL, deploy=False)
    stored = victim.home.folder / "blobs" / version.sha256[:2] / version.sha256
    with load_on(victim, MODEL) as load:
        _damage(stored)
        with pytest.raises(RolloutFailed, match=f"the bytes of artifact {version.sha256}"):
            client.deploy(MODEL, version.version, timeout=60)
        assert answering_version(http, MODEL) == "1"
        state = until(lambda: _failure(client, version.version))
        assert version.sha256 in state

        assert client.push(onnx_models.mlp(2), name=MODEL, timeout=60).version == version.version
        load.wait_for_version(version.version)
    assert not load.failures, load.report()


def _failure(client: Client, version: int) -> str:
    """Why the version failed, once its model's records say so."""
    found = client.version(MODEL, version)
    return found.state_reason if found.state == "failed" else ""


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def _fill(folder: Path) -> Path:
    """A file that leaves no byte free."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return filler


def _damage(path: Path) -> None:
    """One bit of the file is another one."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(content)
        os.fsync(file.fileno())
