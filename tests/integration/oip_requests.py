"""Open Inference Protocol requests by hand, right ones and all but right ones, and the errors that answer them."""

import json
from copy import deepcopy
from typing import Any

import httpx

MAX_BODY_BYTES = 256 << 20
ROW = [1.0, 2.0, 3.0, 4.0]
# What the model `mlp` takes.
GOOD: dict[str, Any] = {"id": "1", "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": ROW}]}


def with_input(**changes: Any) -> dict[str, Any]:
    """The good request with its input changed; None takes a key away."""
    body = deepcopy(GOOD)
    tensor = body["inputs"][0]
    for key, value in changes.items():
        if value is None:
            del tensor[key]
        else:
            tensor[key] = value
    return body


def binary(data: bytes, *, size: object = None, shape: list[int] | None = None) -> tuple[bytes, int]:
    """A body with one binary input, and the length of its JSON."""
    tensor = {
        "name": "x",
        "shape": shape or [1, 4],
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(data) if size is None else size},
    }
    header = json.dumps({"inputs": [tensor]}).encode()
    return header + data, len(header)


def infer(http: httpx.Client, model: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(
        f"/v2/models/{model}/infer",
        content=content,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


def send_binary(http: httpx.Client, model: str, body: bytes, header_length: object) -> httpx.Response:
    return infer(http, model, body, inference_header_content_length=str(header_length))


def error_of(answer: httpx.Response, status: int) -> str:
    """The message of an OIP error."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.json()["error"]
    assert isinstance(error, str)
    assert error
    assert "Traceback" not in error
    return error
