"""Which URIs a producer may name, and that no way of writing one leads anywhere else."""

import os
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.errors import Forbidden, Invalid
from lepton_common.outbound import Outbound
from lepton_registry.sources import Location, Sources

HTTPS = "https://models.example.com/ci/"
FILES = "file:///srv/models/"


def sources(*prefixes: str) -> Sources:
    return Sources(prefixes, Outbound())


async def read(allowed: Sources, uri: str) -> bytes:
    async with allowed.open(uri) as (chunks, length):
        content = b"".join([chunk async for chunk in chunks])
        assert length == len(content)
        return content


@pytest.mark.parametrize(
    "uri",
    [
        "https://models.example.com/ci/a.onnx",
        "https://models.example.com:443/ci/a/b/c.onnx",
        "https://models.example.com/ci/a%20b.onnx?X-Signature=a%2Fb/..",
        "file:///srv/models/a.onnx",
        "file:///srv/models/a/b.onnx",
    ],
)
def test_what_is_below_a_prefix_is_allowed(uri: str) -> None:
    assert sources(HTTPS, FILES).check(uri)


def test_without_a_prefix_nothing_is_allowed() -> None:
    for uri in ("https://models.example.com/ci/a.onnx", "file:///srv/models/a.onnx"):
        with pytest.raises(Forbidden):
            sources().check(uri)


@pytest.mark.parametrize(
    "uri",
    [
        # another host, port, scheme or folder
        "https://example.com/ci/a", "https://models.example.com.evil.com/ci/a",
        "https://evil.com/models.example.com/ci/a",
        "https://models.example.com:8443/ci/a", "http://models.example.com/ci/a", "ftp://models.example.com/ci/a",
        "https://models.example.com/cia", "https://models.example.com/ci", "https://models.example.com/ci/",
        "https://models.example.com/", "https://models.example.com", "https:///ci/a", "https://127.0.0.1/ci/a",
        "https://2130706433/ci/a", "https://0x7f.1/ci/a", "https://[::1]/ci/a", "https://localhost/ci/a",
        "https://169.254.169.254/latest/meta-data/", "gopher://models.example.com/ci/a", "data:,a",
        "//models.example.com/ci/a",
        "/srv/models/a", "models.example.com/ci/a", "", "HTTPS://models.example.com/ci/a",
        "https://MODELS.example.com/ci/a",
        # a user, a fragment, a backslash, white space, control characters
        "https://models.example.com@evil.com/ci/a", "https://evil.com#@models.example.com/ci/a",
        "https://u:p@models.example.com/ci/a",
        "https://evil.com\\@models.example.com/ci/a", "https://models.example.com/ci/a#b",
        "https://models.example.com\\ci\\a",
        "https://models.example.com /ci/a", " https://models.example.com/ci/a", "https://models.example.com/ci/a\n",
        "https://models.example.com/ci/a\r\nHost: evil.com", "https://models.example.com/ci/a\t",
        "https://models.example.com/ci/\0",
        "https://models.example.com%2eevil.com/ci/a", "https://models.example.com./ci/a",
        "https://mod\u0435ls.example.com/ci/a",
        # up and out, also once and twice encoded
        "https://models.example.com/ci/../a", "https://models.example.com/ci/./a", "https://models.example.com/ci//a",
        "https://models.example.com/ci/%2e%2e/a", "https://models.example.com/ci/%2E%2E%2Fa",
        "https://models.example.com/ci/..%2fa",
        "https://models.example.com/ci/%252e%252e/a", "https://models.example.com/ci/%252fa",
        "https://models.example.com/ci/..%5ca",
        "https://models.example.com/ci/%00", "https://models.example.com/ci/%0d%0a",
        "https://models.example.com/ci/%ff",
        "https://models.example.com/ci/%c0%ae%c0%ae/a", "https://models.example.com/ci/%",
        "https://models.example.com/ci/%2",
        "https://models.example.com/ci/a%zz", "https://models.example.com:0/ci/a",
        "https://models.example.com:99999/ci/a",
        "file:///srv/models/../secret", "file:///srv/models/%2e%2e/secret", "file:///srv/models//etc/passwd",
        "file:///etc/passwd",
        "file://localhost/srv/models/a", "file://evil.com/srv/models/a", "file:/srv/models/a", "file:srv/models/a",
        "file:///srv/models/a?b", "file:///srv/models", "file:///srv/models/", "file:///srv/models2/a",
        "file:///proc/self/environ",
    ],
)  # fmt: skip
def test_what_is_not_below_a_prefix_is_refused_however_it_is_written(uri: str) -> None:
    with pytest.raises((Forbidden, Invalid)):
        sources(HTTPS, FILES).check(uri)


@given(st.lists(st.text(min_size=1, max_size=8) | st.sampled_from(["..", ".", "%2e", "a/b"]), max_size=6))
def test_no_path_leads_out_of_its_folder(parts: list[str]) -> None:
    for written in ("/".join(parts), quote("/".join(parts)), quote(quote("/".join(parts)))):
        try:
            location = sources(FILES).check(f"{FILES}{written}")
        except (Forbidden, Invalid):
            continue
        path = "/" + "/".join(location.segments)
        assert os.path.normpath(path) == path
        assert path.startswith("/srv/models/")


def test_what_may_be_a_secret_is_not_told() -> None:
    with pytest.raises(Forbidden) as refused:
        sources(HTTPS).check("https://evil.com/a?token=SECRET")
    assert refused.value.message.startswith("uri: https://evil.com:443/a is not below any prefix")


@pytest.mark.parametrize("prefix", ["http://a/", "https://a/../", "a", "file://host/a/"])
def test_a_prefix_that_is_no_uri_is_refused_at_the_start(prefix: str) -> None:
    with pytest.raises(Invalid):
        sources(prefix)


async def test_files_are_read_and_no_link_is_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "models", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    (folder / "sub" / "a b.onnx").write_bytes(b"bytes")
    (outside / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(outside / "secret")
    (folder / "linked").symlink_to(outside)
    os.mkfifo(folder / "pipe")
    allowed = sources(f"file://{folder}")
    assert await read(allowed, f"file://{folder}/sub/a%20b.onnx") == b"bytes"
    for name in ("link", "linked/secret", "sub/nothing", "sub", "pipe"):
        with pytest.raises(Invalid) as refused:
            await read(allowed, f"file://{folder}/{name}")
        assert "secret" not in refused.value.message.replace(name, "")
    with pytest.raises(Invalid):
        await read(sources(f"file://{tmp_path}/nowhere"), f"file://{tmp_path}/nowhere/a")


def test_a_location_is_told_apart_by_host_and_port() -> None:
    folder, file = Location.parse("https://a.b/c"), Location.parse("https://a.b:443/c/d")
    assert folder.holds(file)
    assert not file.holds(folder)
    assert not folder.holds(Location.parse("https://a.b:444/c/d"))
