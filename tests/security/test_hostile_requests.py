"""Requests that are made to cost more than they are worth: each is cut before it costs anything."""

import hashlib
import io
import json
import re
import socket
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack

import onnx
import pytest
from lepton.processes import http_get
from onnx import TensorProto, helper

from ..integration.local_platform import Platform, until
from ..integration.oip_requests import GOOD, ROW
from ..integration.raw_http import exchange, post
from .hostile import INSIDE, assert_tells_nothing, calling
from .test_pickles import ROUTES

INFER = "/v2/models/mlp/infer"


def ports_of(platform: Platform) -> dict[str, int]:
    """Every port that speaks HTTP for callers or services."""
    ports = platform.layout.ports
    return {name: ports[name] for name in ("front", "mesh", "gateway-admin", *INSIDE)}


def free_bytes(metrics_port: int) -> float:
    """The room that a gateway or worker has left for large bodies."""
    _, page = http_get(metrics_port, "/metrics")
    (free,) = re.findall(rb"^lepton_\w+_free_body_bytes (\S+)$", page, re.MULTILINE)
    return float(free)


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        "Content-Type: multipart/form-data; boundary=" + "x" * (1 << 20),
        "Cookie: " + "a=b; " * 100_000,
        "X: " + "x" * 300_000,
        "\r\n".join(f"X-{number}: x" for number in range(2000)),
        "\r\n".join("X: x" for _ in range(2000)),
    ],
    ids=["boundary", "cookies", "one", "many", "one many times"],
)
def test_head_that_is_too_large_is_refused_at_once(platform: Platform, mlp: str, header: str) -> None:
    for name, port in ports_of(platform).items():
        began = time.monotonic()
        status, _ = exchange(port, post(INFER, b"{}", header))
        assert status in {0, 400, 431}, name
        assert time.monotonic() - began < 5, name


def test_boundaries_and_parts_of_forms_mean_nothing(platform: Platform, mlp: str) -> None:
    parts = b"".join(b'--x\r\nContent-Disposition: form-data; name="%d"\r\n\r\ny\r\n' % n for n in range(5000))
    with calling(platform.port, platform.key) as caller:
        for boundary in ("x", "-" * 50_000, '"', "", "x; boundary=y"):
            for method, path in ROUTES:
                kind = f"multipart/form-data; boundary={boundary}"
                status, text = caller.ask(method, path, parts + b"--x--\r\n", content_type=kind)
                assert status in {400, 431}, (path, text)
                assert_tells_nothing(platform, text)


def test_peers_that_say_nothing_more_are_cut(platform: Platform) -> None:
    begun = b"POST /v2/models/mlp/infer HTTP/1.1\r\nHost: localhost\r\nX: "
    with ExitStack() as stack:
        slow = {}
        for name, port in ports_of(platform).items():
            if name != "mesh":  # Only the gateway speaks to it.
                slow[name] = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
                slow[name].sendall(begun)
        for name, each in slow.items():  # The limit is 10 s.
            assert each.recv(4096).partition(b"\r\n")[0] in {b"", b"HTTP/1.1 408 Request Timeout"}, name


# --- bodies -----------------------------------------------------------------------------------------------------------


def test_three_megabytes_in_chunks_of_one_byte_are_one_body(platform: Platform, mlp: str) -> None:
    """Not crash, and not forty times the memory."""
    body = json.dumps(GOOD).encode()
    padding = 3 << 20

    def chunks() -> Iterator[bytes]:
        yield post(f"/v2/models/{mlp}/infer", b"", "Transfer-Encoding: chunked")
        yield b"".join(b"1\r\n%c\r\n" % each for each in body)
        for _ in range(padding >> 16):
            yield b"1\r\n \r\n" * (1 << 16)
        yield b"0\r\n\r\n"

    for name in ("front", "gateway", "worker-1"):
        process = platform.process("gateway" if name == "front" else name)
        before = process.memory_info().rss
        status, answer = exchange(platform.layout.ports[name], chunks(), patience_s=60)
        assert status == 200, (name, answer)
        assert process.memory_info().rss - before < 16 * padding, name


@pytest.mark.parametrize("name", ["front", "gateway", "worker-1"])
def test_bodies_that_never_come_keep_nobody_out(platform: Platform, mlp: str, name: str) -> None:
    """Announced are exactly as many bytes as there is room for: if they took any, nothing would be left."""
    path, port = f"/v2/models/{mlp}/infer", platform.layout.ports[name]
    metrics_port = platform.layout.ports["worker-1" if name == "worker-1" else "gateway-admin"]
    room, came = 1 << 30, 1 << 20
    announced = post(path, bytes(came), f"Content-Length: {room // 4}")
    large = json.dumps(GOOD).encode() + b" " * (8 << 20)
    until(lambda: free_bytes(metrics_port) == room)
    with ExitStack() as stack:
        peers = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(4)]
        for peer in peers:
            peer.sendall(announced)
        until(lambda: free_bytes(metrics_port) == room - 4 * came)
        for body in (json.dumps(GOOD).encode(), large):
            status, answer = exchange(port, post(path, body))
            assert status == 200, (len(body), answer)
        for peer in peers:
            peer.setblocking(False)
            with pytest.raises(BlockingIOError):  # Neither answered nor closed.
                peer.recv(1)


def test_body_for_a_service_ends_at_its_limit(platform: Platform) -> None:
    key = f"Authorization: Bearer {platform.key}"

    def chunks(path: str) -> Iterator[bytes]:
        yield post(path, b"", "Transfer-Encoding: chunked", key)
        for _ in range(40):
            yield b"1\r\n \r\n" * (1 << 16)

    for path in ("/v1/tenants", "/v1/rollouts", "/v1/windows/counters"):
        # The connection may be closed before the answer is read: what was still on its way makes the kernel reset it.
        assert exchange(platform.port, chunks(path))[0] in {413, 0}, path


@pytest.mark.parametrize("depth", [900, 5000, 200_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"spec":[', "]}")])
def test_json_of_any_depth_is_no_fault(platform: Platform, mlp: str, depth: int, opening: str, closing: str) -> None:
    deep = opening * depth + "1" + closing * depth
    fields = ("parameters", "inputs", "virtual_service", "policy", "limits", "spec", "hosts", "id", "name")
    bodies = [deep, opening * depth, json.dumps(GOOD)[:-1] + f', "parameters": {{"x": {deep}}}}}']
    bodies += [f'{{"{field}": {deep}}}' for field in fields]
    bodies += [
        f'{{"virtual_service": {{"spec": {deep}}}, "destination_rule": {{"spec": {deep}}}}}',
        f'{{"x": [NaN, {deep}]}}',
    ]
    with calling(platform.port, platform.key) as caller:
        for method, path in ROUTES:
            for body in bodies:
                if len(body) < 1 << 20:
                    status, text = caller.ask(method, path, body.encode())
                    assert status < 500, (path, body[:80], text[:300])


@pytest.mark.parametrize("size", [2**31, 2**32, 2**62, 2**63, 2**63 + 1, 2**64, 2**64 + 4, 10**400])
def test_shape_of_any_size_is_refused_before_it_is_made(platform: Platform, mlp: str, size: int) -> None:
    for shape in ([size, 4], [4, size], [size, size], [size] * 64, [-size, 4], [size, 0], [0, size, 4]):
        tensor = {"name": "x", "datatype": "FP32", "shape": shape}
        with calling(platform.port) as caller:
            status, text = caller.ask("POST", INFER, json.dumps({"inputs": [{**tensor, "data": ROW}]}).encode())
            assert status in {400, 413}, text
            header = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 16}}]}).encode()
            length = {"inference_header_content_length": str(len(header))}
            status, text = caller.ask("POST", INFER, header + bytes(16), **length)
            assert status in {400, 413}, text
            sized = header.replace(b": 16}", b": %d}" % size)
            length = {"inference_header_content_length": str(len(sized))}
            assert caller.ask("POST", INFER, sized + bytes(16), **length)[0] in {400, 413}
            assert_tells_nothing(platform, text)


# --- artifacts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location", ["../../../key", "/etc/passwd", "key", "..%2fkey", "file:///etc/passwd", "", "a\0b"]
)
def test_model_cannot_name_files_of_the_machine(platform: Platform, location: str) -> None:
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value=location)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "outside",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 4])],
        [weights],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    data = model.SerializeToString()
    with calling(platform.port, platform.key) as caller:
        status, text = caller.ask("PUT", f"/v1/artifacts/{hashlib.sha256(data).hexdigest()}", data)
    assert status == 400
    assert_tells_nothing(platform, text)


def test_archives_are_no_models(platform: Platform) -> None:
    """Nothing here unpacks anything: neither what climbs out, nor what unfolds to gigabytes."""
    for kind in ("zip", "tar"):
        archive = io.BytesIO()
        if kind == "zip":
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
                packed.writestr("../../key", "x")
                packed.writestr("model.onnx", bytes(64 << 20))
        else:
            with tarfile.open(fileobj=archive, mode="w:gz") as tar:
                link = tarfile.TarInfo("model.onnx")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
        data = archive.getvalue()
        with calling(platform.port, platform.key) as caller:
            status, text = caller.ask("PUT", f"/v1/artifacts/{hashlib.sha256(data).hexdigest()}", data)
        assert status == 400, text
        assert_tells_nothing(platform, text)
