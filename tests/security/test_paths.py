"""Nothing that a caller names becomes a path outside of where it belongs, however it is written."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from ..integration.command import Lepton
from ..integration.local_platform import Platform
from .hostile import assert_tells_nothing, calling, service_of

SHA256 = "ab" * 32
# As they could be meant for the file `key` in the platform's folder, or for one of the machine's.
NAMES = (
    "../key",
    "../../key",
    "../../../../../../../../etc/passwd",
    "/etc/passwd",
    "....//....//key",
    "..;/key",
    "..\\..\\key",
    "C:\\key",
    "file:///etc/passwd",
    "~/key",
    f"../{SHA256}",
    f"{SHA256}/../key",
    f"{SHA256}\0",
    f"{SHA256}\n",
    "\uff0e\uff0e\uff0fkey",
    "$(cat key)",
    "m;touch key",
    "m%",
    ".",
    "..",
)
# Not what `quote` would make of anything.
ODD = (
    "%c0%ae%c0%ae%c0%afkey",
    "%2e%2e/key",
    "..%2fkey",
    "..%5ckey",
    "%u002e%u002e%u2215key",
    "..%00/key",
    "%2e%2e%3bkey",
)
ROUTES = (
    ("GET", "/v1/artifacts/{}", None),
    ("HEAD", "/v1/artifacts/{}", None),
    ("PUT", "/v1/artifacts/{}", b"x"),
    ("GET", "/v1/models/{}", None),
    ("GET", "/v1/models/{}/versions", None),
    ("GET", "/v1/models/{}/timeline", None),
    ("POST", "/v1/models/{}/versions", b'{"sha256": "%b"}' % SHA256.encode()),
    ("DELETE", "/v1/keys/{}", None),
    ("GET", "/v1/rollouts/{}", None),
    ("POST", "/v1/rollouts/{}/abort", b"{}"),
    ("GET", "/v1/policies/{}", None),
    ("PUT", "/v1/policies/{}", b'{"strategy": "canary"}'),
    ("DELETE", "/v1/policies/{}", None),
    ("GET", "/v1/mesh/{}", None),
    ("PUT", "/v1/mesh/{}", b"{}"),
    ("GET", "/v1/serving/{}", None),
    ("POST", "/v1/serving/{}/load", b"{}"),
    ("POST", "/v1/serving/{}/rollback", b"{}"),
    ("GET", "/v1/windows?model={}", None),
    ("GET", "/v1/labels?model={}", None),
    ("POST", "/v2/models/{}/infer", b"{}"),
    ("GET", "/v2/models/{}/config", None),
    ("GET", "/v2/models/{}/versions/1/stats", None),
    ("POST", "/v2/repository/models/{}/load", b"{}"),
    ("POST", "/v2/repository/models/{}/unload", b"{}"),
)
BODIES = (
    ("/v1/tenants", "name"),
    ("/v1/keys", "tenant"),
    ("/v1/rollouts", "model"),
    ("/v1/models/paths/versions", "sha256"),
    ("/v1/windows/counters", "model"),
)


def encodings(name: str) -> list[str]:
    """The name as it can stand in a path: encoded once, twice and three times."""
    once = quote(name, safe="")
    return [once, once.lower(), quote(once, safe=""), quote(quote(once, safe=""), safe="")]


@pytest.fixture(autouse=True)
def _files_stay(platform: Platform) -> Iterator[None]:
    """Nothing came where nothing belongs, and the platform's own files are as they were."""
    before = _files(platform.home.folder)
    yield
    assert _files(platform.home.folder) == before


def _files(folder: Path) -> dict[str, object]:
    return {
        "key": (folder / "key").read_bytes(),
        "layout": (folder / "platform.json").read_bytes(),
        "home": sorted(os.listdir(folder)),
        "above": sorted(name for name in os.listdir(folder.parent) if not name.startswith("test_")),
        "blobs": [path for path in (folder / "blobs").glob("*/*") if not path.name.startswith(path.parent.name)],
        "uploads": sorted(set(os.listdir(folder / "registry" / "staging")) - {"default"}),
    }


@pytest.mark.parametrize(("method", "path", "body"), ROUTES, ids=[f"{method} {path}" for method, path, _ in ROUTES])
def test_name_in_a_path_leads_nowhere(platform: Platform, method: str, path: str, body: bytes | None) -> None:
    names = [*dict.fromkeys(encoded for name in NAMES for encoded in encodings(name)), *ODD]
    for port in (platform.port, platform.layout.ports[service_of(path)]):
        with calling(port, platform.key) as caller:
            for name in names:
                status, text = caller.ask(method, path.format(name), body)
                assert 400 <= status < 500 or (status, text) == (200, "[]"), (name, status, text)
                assert "root:" not in text
                assert_tells_nothing(platform, text)


@pytest.mark.parametrize(("path", "field"), BODIES, ids=[f"{path} {field}" for path, field in BODIES])
def test_name_in_a_body_leads_nowhere(platform: Platform, path: str, field: str) -> None:
    with calling(platform.port, platform.key) as caller:
        for name in dict.fromkeys((*NAMES, *map(quote, NAMES))):
            body = {"name": "paths", "model": "paths", "version": 1, "scopes": ["read"], field: name}
            status, text = caller.ask("POST", path, json.dumps(body).encode())
            assert 400 <= status < 500, (name, status, text)
            assert_tells_nothing(platform, text)


def test_command_line_reads_only_what_it_is_given(platform: Platform, lepton: Lepton, mlp: str, tmp_path: Path) -> None:
    for name in ("../key", "../../etc\n"):
        ended = lepton("infer", "--input", "-", "--", name, stdin="[[1,2,3,4]]")
        assert ended.code != 0, name
        assert_tells_nothing(platform, ended.out + ended.err)
    for file in (platform.home.folder / "key", tmp_path):
        ended = lepton("push", file, "--name", "paths")
        assert ended.code != 0, file
        assert platform.key not in ended.out + ended.err
