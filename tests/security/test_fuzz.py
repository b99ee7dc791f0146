"""Thousands of infer requests with something wrong in them: each is read or refused, none is a fault of ours."""

import json
import random
import zlib
from typing import Any

import grpc
import numpy as np
import pytest
from lepton_common import compression, oip
from lepton_common.errors import Invalid, TooLarge
from lepton_common.signature import DTYPES, Signature, TensorSpec
from tritonclient.grpc import service_pb2

from ..integration.local_platform import Platform
from .hostile import assert_tells_nothing, calling
from .mutations import binary_request, json_request, mutated, mutations

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
