"""Infer requests with something wrong in them, the same ones for the same seed."""

import json
import random
from collections.abc import Iterator

import numpy as np

# What stands at the edges of what parsers, numpy and C take.
_TOKENS = (
    *(b"0", b"-0", b"-1", b"0.0", b"1e5", b"1e308", b"1e999", b"-1e999", b"NaN", b"-Infinity", b"0x10", b"01"),
    *(str(number).encode() for number in (2**31, 2**32, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 2**64 + 4, 10**400)),
    *(
        b"9" * 5000,
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b'"\\ud800"',
        b'"\\u0000"',
        b'"x"',
        b"[" * 400,
        b'{"a":' * 400,
    ),
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b",", b":", b'"', b"\\", b"]", b"}", b"\n", b"/*", b"'"),
    *(b'"BYTES"', b'"FP32"', b'"INT8"', b'"BF16"', b'"FP8"', b'"shape"', b'"data"', b'"binary_data_size"', b'"inputs"'),
)


def json_request(datatype: str = "FP32") -> bytes:
    """A right one."""
    data = {"FP32": [0.5, -1, 2e3, 4], "BYTES": ["a", "", "é", "d"], "BOOL": [True, False, 1, 0]}.get(
        datatype, [1, 2, 3, 4]
    )
    return json.dumps(
        {
            "id": "1",
            "parameters": {"timeout": 1_000_000, "binary_data_output": False, "custom": "a"},
            "inputs": [{"name": "x", "shape": [1, 4], "datatype": datatype, "parameters": {}, "data": data}],
            "outputs": [{"name": "scores", "parameters": {"binary_data": False, "classification": 0}}],
        }
    ).encode()


def binary_request(datatype: str = "FP32") -> tuple[bytes, int]:
    """A right one, and the length of its JSON."""
    tail = np.arange(4, dtype=np.float32).tobytes()
    if datatype == "BYTES":
        tail = b"".join(len(each).to_bytes(4, "little") + each for each in (b"a", b"", b"bc", b"d"))
    tensor = {"name": "x", "shape": [1, 4], "datatype": datatype, "parameters": {"binary_data_size": len(tail)}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return header + tail, len(header)


def mutations(seed: int, count: int, datatype: str = "FP32") -> Iterator[tuple[bytes, int | None]]:
    """So many bodies, JSON and binary in turns, each with its Inference-Header-Content-Length."""
    chance = random.Random(seed)
    bases = [(json_request(datatype), None), binary_request(datatype)]
    for number in range(count):
        body, length = bases[number % 2]
        for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
            body = mutated(body, chance)
        if length is not None and chance.random() < 0.3:
            length = chance.choice((0, 1, length - 1, length + 1, len(body), len(body) + 1, 2**31, 2**63))
        elif length is None and chance.random() < 0.05:
            length = chance.randint(0, len(body))
        yield body, length


def mutated(body: bytes, chance: random.Random) -> bytes:
    """The body with one thing changed."""
    start = chance.randint(0, len(body))
    end = min(len(body), start + chance.choice((0, 1, 1, 2, 4, 16, len(body))))
    match chance.randint(0, 5):
        case 0 if start < len(body):
            return body[:start] + bytes([body[start] ^ 1 << chance.randint(0, 7)]) + body[start + 1 :]
        case 1:
            return body[:start] + body[end:]
        case 2:
            return body[:end] + body[start:]
        case 3:
            return body[:start] + chance.choice(_TOKENS) + body[end:]
        case 4:
            return _value_replaced(body, chance)
        case _:
            return body[:start] + chance.randbytes(chance.randint(1, 8)) + body[start:]


def _value_replaced(body: bytes, chance: random.Random) -> bytes:
    """A whole number or word is another one: the JSON stays JSON more often than not."""
    places = [index for index, byte in enumerate(body) if byte in b"0123456789"]
    if not places:
        return body
    start = end = chance.choice(places)
    while end < len(body) and body[end] in b"0123456789":
        end += 1
    return body[:start] + chance.choice(_TOKENS) + body[end:]
