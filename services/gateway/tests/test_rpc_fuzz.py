"""Mutated gRPC messages through the whole gateway: each call ends once, none with INTERNAL, and it goes on serving.

LEPTON_FUZZ_CALLS: how many, 1500 by default.
"""

import os
import random
from collections import Counter

import orjson
from lepton_common.http11 import Request
from lepton_gateway import inference_pb2 as pb
from lepton_gateway.rpc import Status

from .lab import Lab
from .rpc_calls import INFER, STREAM, call_all, framed

CALLS = int(os.environ.get("LEPTON_FUZZ_CALLS", "1500"))
_AT_ONCE = 1000
_OUTPUT = {"name": "y", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 2}}
_HEAD = orjson.dumps({"model_name": "m", "model_version": "1", "id": "", "outputs": [_OUTPUT]})


def respond(request: Request) -> None:
    """As a worker does, and as one does that refuses."""
    if len(request.body) % 7 == 0:
        request.respond(400, b"content-type: application/json\r\n", b'{"error":"input \'x\': no"}')
    else:
        length = b"inference-header-content-length: %d\r\n" % len(_HEAD)
        request.respond(200, length + b"x-lepton-version: 1\r\n", _HEAD + b"ok")


def seeds() -> list[tuple[str, bytes]]:
    raw = pb.ModelInferRequest(model_name="m", id="1", raw_input_contents=[b"abcd"])
    raw.inputs.add(name="x", datatype="UINT8", shape=[4])
    raw.outputs.add(name="y")
    raw.parameters["priority"].int64_param = 3
    typed = pb.ModelInferRequest(model_name="m", model_version="1")
    typed.inputs.add(name="x", datatype="FP32", shape=[2]).contents.fp32_contents.extend([1, 2])
    typed.inputs.add(name="s", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"text")
    typed.parameters["binary_data_output"].bool_param = False
    several = [framed(each.SerializeToString()) for each in (raw, typed)]
    service = INFER.rpartition("/")[0]
    return [
        *((INFER, each) for each in several * 4),
        *((STREAM, b"".join(several * count)) for count in (1, 3)),
        (f"{service}/ModelMetadata", framed(pb.ModelMetadataRequest(name="m", version="1").SerializeToString())),
        (f"{service}/RepositoryModelLoad", framed(pb.RepositoryModelLoadRequest(model_name="m").SerializeToString())),
        (f"{service}/LogSettings", framed(pb.LogSettingsRequest().SerializeToString())),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", framed(b"\x3a\x01*")),
        ("/grpc.health.v1.Health/Check", framed(b"")),
    ]


def mutated(chance: random.Random, body: bytes) -> bytes:
    """A few bytes changed, left out, repeated or put in; mostly the length before the message is put right again."""
    data = bytearray(body)
    for _ in range(chance.randint(0, 4)):
        at = chance.randrange(min(len(data), 200) + 1)
        match chance.randrange(4):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at : at + chance.randint(1, 8)]
            case 2:
                data[at:at] = data[at : at + chance.randint(1, 40)]
            case _:
                data[at:at] = chance.randbytes(chance.randint(1, 6))
    if chance.random() < 0.8 and len(data) >= 5:
        data[:5] = b"\x00" + (len(data) - 5).to_bytes(4, "big")
    return bytes(data)


async def test_no_mutated_message_fails_the_gateway(lab: Lab) -> None:
    lab.mesh.handler = respond
    chance = random.Random(5)
    known = seeds()
    found: Counter[int] = Counter()
    for start in range(0, CALLS, _AT_ONCE):
        lab.mesh.requests.clear()
        bodies = []
        for _ in range(min(_AT_ONCE, CALLS - start)):
            path, body = chance.choice(known)
            bodies.append((path, mutated(chance, body)))
        answers = await call_all(lab.grpc_address, lab.key, bodies)
        found.update(each.status for each in answers)
        bad = [
            (body, each)
            for body, each in zip(bodies, answers, strict=True)
            if each.status in (-1, Status.INTERNAL, Status.UNKNOWN) or each.ends != 1
        ]
        assert not bad, f"{len(bad)} calls, the first: {bad[0]}"
    print("statuses:", dict(found))
    assert found[Status.OK] > CALLS / 10
    assert found[Status.INVALID_ARGUMENT] > CALLS / 10
    (last,) = await call_all(lab.grpc_address, lab.key, known[:1])
    assert last.status == Status.OK
    assert pb.ModelInferResponse.FromString(bytes(last.body[5:])).raw_output_contents == [b"ok"]
