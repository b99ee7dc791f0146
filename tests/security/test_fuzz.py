"""Thousands of infer requests with something wrong in them: each is read or refused, none is a fault of ours.

By hand, over Kafka: LEPTON_FUZZ=100000 pytest tests/security/test_fuzz.py -k kafka
"""

import json
import os
import random
import zlib
from typing import Any

import grpc
import numpy as np
import pytest
from confluent_kafka import Producer
from lepton_common import compression, oip
from lepton_common.errors import Invalid, TooLarge
from lepton_common.signature import DTYPES, Signature, TensorSpec
from tritonclient.grpc import service_pb2

from ..integration.local_platform import Platform
from ..integration.test_kafka_inference import DEAD, REQUESTS, RESULTS, Topic, pairs
from .hostile import assert_tells_nothing, calling
from .mutations import binary_request, json_request, mutated, mutations

COUNT = int(os.environ.get("LEPTON_FUZZ", "600"))
DATATYPES = ("FP32", "INT64", "BOOL", "BYTES", "FP16")


def signature_of(datatype: str) -> Signature:
    return Signature(
        inputs=(TensorSpec("x", datatype, (-1, 4)),),
        outputs=(TensorSpec("scores", datatype, (-1, 4)),),
    )


@pytest.mark.parametrize("datatype", DATATYPES)
def test_codec_reads_or_refuses_whatever_comes(datatype: str) -> None:
    signature = signature_of(datatype)
    read = 0
    for body, length in mutations(1, 4000, datatype):
        try:
            request = oip.decode_request(body, length, signature)
        except (Invalid, TooLarge):
            continue
        read += 1
        assert signature.inputs[0].fits(request.inputs["x"].shape)
        assert request.inputs["x"].dtype == DTYPES[datatype]
        try:
            _, parts = oip.encode_response("m", "1", request, {"scores": request.inputs["x"]}, signature)
        except Invalid:
            continue  # Bytes that are no text, or classes of what has no order.
        json.loads(bytes(parts[0]))
    assert 100 < read < 4000, "what is fuzzed is neither all right nor all wrong"


def test_decompression_reads_or_refuses_whatever_comes() -> None:
    for encoding, wbits in ((b"gzip", 31), (b"deflate", 15)):
        packer = zlib.compressobj(wbits=wbits)
        packed = packer.compress(json_request()) + packer.flush()
        chance = np.random.default_rng(1)
        for _ in range(2000):
            body = bytearray(packed)
            for place in chance.integers(0, len(body), chance.integers(1, 4)):
                body[place] = chance.integers(256)
            try:
                plain = compression.decompress(body[: chance.integers(1, len(body) + 1)], encoding, 1000)
            except (Invalid, TooLarge):
                continue
            assert len(plain) <= 1000


def test_platform_answers_or_refuses_whatever_comes(platform: Platform, mlp: str) -> None:
    statuses = set()
    with calling(platform.port) as caller:
        for body, length in mutations(2, 600):
            headers = {} if length is None else {"inference_header_content_length": str(length)}
            status, text = caller.ask("POST", f"/v2/models/{mlp}/infer", body, **headers)
            assert status in {200, 400, 413}, (body, length, text)
            if status != 200:
                assert json.loads(text)["error"]
                assert_tells_nothing(platform, text)
            statuses.add(status)
        body, length = binary_request()
        assert (
            caller.ask("POST", f"/v2/models/{mlp}/infer", body, inference_header_content_length=str(length))[0] == 200
        )
    assert statuses >= {200, 400}


def test_platform_answers_or_refuses_whatever_comes_by_grpc(platform: Platform, mlp: str) -> None:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])
    tensor.parameters["a"].int64_param = 1
    message = service_pb2.ModelInferRequest(
        model_name=mlp, id="1", inputs=[tensor], raw_input_contents=[np.ones(4, np.float32).tobytes()]
    ).SerializeToString()
    chance = random.Random(3)
    refused = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}
    with grpc.insecure_channel(platform.address) as channel:
        infer: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")  # bytes in, bytes out
        assert infer(message, timeout=30)
        for _ in range(600):
            body = message
            for _ in range(chance.choice((1, 1, 2, 4))):
                body = mutated(body, chance)
            call = infer.future(body, timeout=30)
            if call.exception() is not None:
                assert call.code() in refused, (body, call.details())
                assert_tells_nothing(platform, call.details())


@pytest.mark.timeout(120 + COUNT // 50)
def test_platform_answers_or_buries_whatever_comes_by_kafka(platform: Platform, mlp: str) -> None:
    chance = random.Random(4)
    told = Topic(platform.layout.kafka, RESULTS, DEAD)
    producer = Producer({"bootstrap.servers": platform.layout.kafka})
    left, outcomes = set(), {"answered": 0, "refused": 0, "dead": 0}
    for number, (body, length) in enumerate(mutations(4, COUNT)):
        own: dict[str, str | bytes | None] = {"id": f"fuzz-{number}", "authorization": f"Bearer {platform.key}"}
        if chance.random() < 0.9:
            own["lepton-model"] = mlp.encode()
        if length is not None:
            own["inference-header-content-length"] = str(length).encode()
        if chance.random() < 0.3:
            own[chance.choice(_HEADERS)] = chance.choice(_VALUES)
        left.add(f"fuzz-{number}")
        producer.produce(REQUESTS, body, headers=own)
        producer.poll(0)
    producer.flush(60)
    while left:
        for message in told.take():
            found = {name: (value or b"").decode("latin-1") for name, value in pairs(message)}
            identity = found.get("ce_correlationid") or found["id"]
            if identity not in left:
                continue
            left.remove(identity)
            if message.topic() == DEAD:
                assert found["lepton-dlq-reason"] == "undecodable", found
                outcomes["dead"] += 1
            else:
                assert found["lepton-status"] in {"200", "400", "404", "413", "504"}, (found, message.value())
                outcomes["answered" if found["lepton-status"] == "200" else "refused"] += 1
                assert_tells_nothing(platform, (message.value() or b"").decode("latin-1"))
    told.close()
    print(f"{COUNT} messages with something wrong: {outcomes}")
    assert all(outcomes.values()), outcomes


_HEADERS = (
    *("content-type", "lepton-version", "lepton-timeout-ms", "lepton-ordered", "lepton-reply-topic", "traceparent"),
    *("ce_specversion", "ce_type", "inference-header-content-length", "content-encoding", "x-unknown"),
)
_VALUES = (
    *(b"", b"1", b"0", b"-1", b"true", b"application/cloudevents+json", b"application/octet-stream", b"\xff\xfe"),
    *(b"9" * 30, b"gzip", b"lepton.audit", b"text/plain; charset=utf-8", b"\x00"),
)
