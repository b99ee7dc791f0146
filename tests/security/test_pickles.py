"""Bytes that would run a program if anything unpickled them: refused everywhere, and nothing ever does."""

import gzip
import hashlib
import io
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..integration.command import Lepton
from ..integration.local_platform import Platform
from .hostile import INSIDE, assert_tells_nothing, calling

CONTENT_TYPES = (
    "application/json",
    "application/octet-stream",
    "application/python-pickle",
    "application/x-python-serialize",
    "application/vnd.bentoml+pickle",
    "application/x-joblib",
    "application/zip",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "text/plain",
    "application/x-yaml",
)
ROUTES = (
    ("POST", "/v2/models/mlp/infer"),
    ("POST", "/v2/repository/models/mlp/load"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/logging"),
    ("POST", "/v2/models/mlp/trace/setting"),
    ("POST", "/v1/tenants"),
    ("POST", "/v1/keys"),
    ("POST", "/v1/models/mlp/versions"),
    ("POST", "/v1/rollouts"),
    ("PUT", "/v1/policies/mlp"),
    ("PUT", "/v1/mesh/mlp"),
    ("POST", "/v1/serving/mlp/load"),
    ("POST", "/v1/windows/counters"),
)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.path),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "unpickled"


@pytest.fixture
def payloads(mark: Path) -> dict[str, bytes]:
    """The same object as loaders of models find it: by itself, compressed, and in archives."""
    raw = {f"protocol {number}": pickle.dumps(Touch(mark), number) for number in (0, 2, 5)}
    data = raw["protocol 2"]
    array, archive, arrays = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Touch(mark)], object), allow_pickle=True)
    with zipfile.ZipFile(archive, "w") as torch:  # as torch.save writes it
        torch.writestr("archive/data.pkl", data)
        torch.writestr("archive/version", "3\n")
    np.savez(arrays, x=np.array([Touch(mark)], object))
    yaml = f'!!python/object/apply:os.mknod ["{mark}"]'.encode()
    packed = {"gzip": gzip.compress(data), "joblib": zlib.compress(data)}
    return (
        raw
        | packed
        | {
            "npy": array.getvalue(),
            "torch": archive.getvalue(),
            "npz": arrays.getvalue(),
            "yaml": yaml,
        }
    )


def test_pickle_is_refused_under_every_content_type(
    platform: Platform, mlp: str, payloads: dict[str, bytes], mark: Path
) -> None:
    with calling(platform.port, platform.key) as caller:
        for method, path in ROUTES:
            for name, data in payloads.items():
                for content_type in CONTENT_TYPES:
                    status, text = caller.ask(method, path, data, content_type=content_type)
                    assert 400 <= status < 500, (path, name, content_type, text)
                    assert_tells_nothing(platform, text)
    assert not mark.exists()


def test_pickle_is_no_tensor(platform: Platform, mlp: str, payloads: dict[str, bytes], mark: Path) -> None:
    with calling(platform.port, platform.key) as caller:
        for name, data in payloads.items():
            for length in ("1", "10", str(len(data))):
                status, text = caller.ask(
                    "POST", f"/v2/models/{mlp}/infer", data, inference_header_content_length=length
                )
                assert 400 <= status < 500, (name, text)
            # A body that is all tensor may be any bytes of the right number: they are read as numbers.
            status, text = caller.ask("POST", f"/v2/models/{mlp}/infer", data, inference_header_content_length="0")
            assert status == (400 if len(data) % 16 else 200), (name, text)
            for encoding in ("gzip", "deflate"):
                assert 400 <= caller.ask("POST", f"/v2/models/{mlp}/infer", data, content_encoding=encoding)[0] < 500
    assert not mark.exists()


def test_pickle_is_no_artifact(platform: Platform, payloads: dict[str, bytes], mark: Path) -> None:
    with calling(platform.port, platform.key) as caller:
        for name in ("protocol 0", "protocol 5", "torch"):
            data = payloads[name]
            path = f"/v1/artifacts/{hashlib.sha256(data).hexdigest()}"
            status, text = caller.ask("PUT", path, data)
            assert status == 400, (name, text)
            assert_tells_nothing(platform, text)
            assert caller.ask("GET", path)[0] == 404
    assert not mark.exists()


def test_command_line_unpickles_nothing(
    lepton: Lepton, mlp: str, payloads: dict[str, bytes], mark: Path, tmp_path: Path
) -> None:
    for name in ("npy", "npz", "torch"):
        file = tmp_path / f"x.{name.replace('torch', 'pt')}"
        file.write_bytes(payloads[name])
        arguments = ("push", file, "--name", "pickled") if name == "torch" else ("infer", mlp, "--input", file)
        assert lepton(*arguments).code != 0, name
    assert not mark.exists()


def test_no_process_of_the_platform_has_ever_unpickled_anything(platform: Platform, mlp: str, pickles: Path) -> None:
    records = {path.name: path.read_text().splitlines() for path in pickles.iterdir()}
    for part in INSIDE:
        assert str(platform.process(part).pid) in records, f"{part} is not watched"
    # What the registry inspects models with has no environment at all: there, only the payload itself could tell.
    assert any("lepton_worker.trial" in lines[0] for lines in records.values()), "nor is what tries models"
    assert {name: lines for name, lines in records.items() if len(lines) > 1} == {}
