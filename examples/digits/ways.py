"""The other ways in: any OIP client over gRPC, and any Kafka producer, neither of which knows of Lepton."""

import json
import time
from typing import Any
from uuid import uuid4

import numpy as np
from confluent_kafka import Consumer, Producer
from digits import Array
from tritonclient.grpc import InferenceServerClient, InferInput

_PATIENCE_S = 60


def by_grpc(address: str, model: str, image: Array) -> int:
    """The digit in the image, asked over gRPC at the front door's own address."""
    pixels = InferInput("input", [1, image.size], "FP32")
    pixels.set_data_from_numpy(image.reshape(1, -1).astype(np.float32))
    with InferenceServerClient(address) as client:
        answer = client.infer(model, [pixels]).as_numpy("label")
    assert answer is not None
    return int(answer[0])


def by_kafka(servers: str, key: str, model: str, image: Array) -> int:
    """The digit in the image, asked on lepton.inference.requests and read from lepton.inference.results."""
    request_id = str(uuid4())
    pixels = {"name": "input", "datatype": "FP32", "shape": [1, image.size], "data": image.ravel().tolist()}
    consumer = Consumer({"bootstrap.servers": servers, "group.id": request_id, "auto.offset.reset": "earliest"})
    consumer.subscribe(["lepton.inference.results"])
    producer = Producer({"bootstrap.servers": servers})
    producer.produce(
        "lepton.inference.requests",
        json.dumps({"model": model, "inputs": [pixels]}),
        headers={"id": request_id, "authorization": f"Bearer {key}"},
    )
    producer.flush()
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        message = consumer.poll(1.0)
        if message is None or message.error():
            continue
        headers: Any = message.headers()
        if ("ce_correlationid", request_id.encode()) in headers:
            consumer.close()
            outputs = {each["name"]: each["data"] for each in json.loads(message.value() or b"")["outputs"]}
            return int(outputs["label"][0])
    raise TimeoutError(f"no answer on lepton.inference.results within {_PATIENCE_S} s")
