"""How a model is called, as text to copy: by curl, Python, gRPC and Kafka, with inputs of zeros that it takes. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from lepton_common.signature import Signature, TensorSpec

_FEW = 16  # elements that are written out
_FREE = 1  # what stands for a free size
_NUMPY = {
    **{f"{kind}{bits}": f"np.{kind.lower()}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"np.float{bits}" for bits in (16, 32, 64)},
    "BOOL": "np.bool_",
    "BYTES": "object",
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who reads the snippets: `address` is the front door as host:port. On this machine no key is needed."""

    address: str
    keyless: bool


def shape_of(spec: TensorSpec) -> list[int]:
    """A shape that the input takes."""
    return [_FREE if size < 0 else size for size in spec.shape]


def zero_of(datatype: str) -> Any:
    """The datatype's zero, as JSON has it."""
    match datatype:
        case "BYTES":
            return ""
        case "BOOL":
            return False
        case _:
            return 0.0 if datatype.startswith(("FP", "BF")) else 0


def snippets(model: str, signature: Signature, caller: Caller) -> Mapping[str, str]:
    """By language."""
    return {
        "curl": _curl(model, signature, caller),
        "Python": _lepton(model, signature, caller),
        "tritonclient": _triton(model, signature, caller, "http"),
        "gRPC": _triton(model, signature, caller, "grpc"),
        "Kafka": _kafka(model, signature),
    }


def _curl(model: str, signature: Signature, caller: Caller) -> str:
    url = f"http://{caller.address}/v2/models/{model}/infer"
    key = "" if caller.keyless else ' -H "Authorization: Bearer $LEPTON_API_KEY"'
    if sum(map(_count, signature.inputs)) > _FEW:
        # What has many elements is written by a program, and not by hand.
        program = f"import json; print(json.dumps({_request(signature.inputs)}))"
        return f"python3 -c {_quoted(program)} |\n  curl -s {url}{key} -d @-\n"
    inputs = [{**_head(each), "data": [zero_of(each.datatype)] * _count(each)} for each in signature.inputs]
    return f"curl -s {url}{key} \\\n  -d {_quoted(_text({'inputs': inputs}))}\n"


def _lepton(model: str, signature: Signature, caller: Caller) -> str:
    inputs = ", ".join(f"{_text(each.name)}: {_array(each)}" for each in signature.inputs)
    return (
        f"{_imports(signature)}import lepton\n\n"
        f'with lepton.Client("http://{caller.address}") as client:  # the key: LEPTON_API_KEY, or of `lepton up`\n'
        f"    outputs = client.infer({_text(model)}, {{{inputs}}})\n"
        f"print(outputs[{_text(signature.outputs[0].name)}])\n"
    )


def _triton(model: str, signature: Signature, caller: Caller, protocol: str) -> str:
    lines = ["import numpy as np", f"import tritonclient.{protocol} as triton", ""]
    headers = ""
    if not caller.keyless:
        lines.insert(0, "import os\n")
        headers = f', headers={{"{_AUTHORIZATION[protocol]}": f"Bearer {{os.environ[\'LEPTON_API_KEY\']}}"}}'
    tensors = (
        f"triton.InferInput({_text(each.name)}, {shape_of(each)}, {_text(each.datatype)})" for each in signature.inputs
    )
    lines.append(f"inputs = [{', '.join(tensors)}]")
    for index, each in enumerate(signature.inputs):
        # Its BF16 is made from FP32.
        array = _array(each) if each.datatype != "BF16" else f"np.zeros({shape_of(each)}, np.float32)"
        lines.append(f"inputs[{index}].set_data_from_numpy({array})")
    lines += [
        f"client = triton.InferenceServerClient({_text(caller.address)})",
        f"answer = client.infer({_text(model)}, inputs{headers})",
        f"print(answer.as_numpy({_text(signature.outputs[0].name)}))",
    ]
    return "\n".join(lines) + "\n"


# gRPC's metadata are in lower case.
_AUTHORIZATION = {"http": "Authorization", "grpc": "authorization"}


def _kafka(model: str, signature: Signature) -> str:
    return (
        "import json\nimport os\n\n"
        "from confluent_kafka import Producer  # or any other: it need know nothing of Lepton\n\n"
        "# KAFKA is the address that `lepton status` shows, KEY what `lepton keys create NAME` prints.\n"
        'producer = Producer({"bootstrap.servers": os.environ["KAFKA"]})\n'
        f"request = {_request(signature.inputs, model)}\n"
        'headers = {"id": "order-7", "authorization": f"Bearer {os.environ[\'KEY\']}"}\n'
        'producer.produce("lepton.inference.requests", json.dumps(request), headers=headers)\n'
        "producer.flush()  # the answer is on lepton.inference.results, its ce_correlationid is order-7\n"
    )


def _request(inputs: Sequence[TensorSpec], model: str | None = None) -> str:
    """The request as a Python expression, in which many zeros are short."""
    tensors = ", ".join(f'{_text(_head(each))[:-1]}, "data": [{_zero(each)}] * {_count(each)}}}' for each in inputs)
    named = "" if model is None else f'"model": {_text(model)}, '
    return f'{{{named}"inputs": [{tensors}]}}'


def _text(value: Any) -> str:
    """JSON that is Python too: without true, false and null."""
    return json.dumps(value, ensure_ascii=False)


def _zero(spec: TensorSpec) -> str:
    zero = zero_of(spec.datatype)
    return _text(zero) if isinstance(zero, str) else repr(zero)


def _head(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": shape_of(spec), "datatype": spec.datatype}


def _array(spec: TensorSpec) -> str:
    if spec.datatype == "BYTES":
        return f'np.full({shape_of(spec)}, b"", object)'
    return f"np.zeros({shape_of(spec)}, {_NUMPY.get(spec.datatype, 'ml_dtypes.bfloat16')})"


def _imports(signature: Signature) -> str:
    is_needed = any(each.datatype == "BF16" for each in signature.inputs)
    return "import ml_dtypes\nimport numpy as np\n" if is_needed else "import numpy as np\n"


def _count(spec: TensorSpec) -> int:
    return prod(shape_of(spec))


def _quoted(text: str) -> str:
    """The text as one word of a shell."""
    return "'" + text.replace("'", "'\\''") + "'"
