"""What an ONNX file is: may Lepton serve it, and what does it take and give.

The bytes are a stranger's, so the service never parses them itself: `inspector.py` runs this module in a child process.
Only what onnxruntime implements by itself is let through, because a worker has to run it: no custom operator
libraries, no tensors kept in other files, no compiled engines.
"""

import contextlib
import json
import mmap
import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from google.protobuf.message import DecodeError, Message
from lepton_common.errors import Invalid
from lepton_common.signature import Signature, TensorSpec
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

# The standard domain is written "" or "ai.onnx"; here always "".
_DOMAINS = {"": "ai.onnx", "ai.onnx.ml": "ai.onnx.ml", "com.microsoft": "com.microsoft"}

# Operators that only wrap an engine compiled elsewhere, or name its file: opaque code, not a graph.
_COMPILED = {"EPContext", "Snpe"}

# Measured: parsing and checking takes three times the file. The rest is Python and both ONNX libraries.
_MEMORY_FACTOR = 4
_MEMORY_BYTES = 1 << 30

_DATATYPES: dict[int, str] = {
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.UINT16: "UINT16",
    onnx.TensorProto.UINT32: "UINT32",
    onnx.TensorProto.UINT64: "UINT64",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.INT16: "INT16",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.DOUBLE: "FP64",
    onnx.TensorProto.STRING: "BYTES",
}


def inspect(path: Path) -> Signature:
    """The signature of the ONNX model in `path`, after every check. Raises Invalid saying what is wrong."""
    model = _parse(path)
    _check_no_external_data(model)
    _check_operators(model)
    _check_runtime(model)
    signature = read_signature(model)
    # The checker reads the file again; without this the model would be in memory twice.
    del model
    try:
        onnx.checker.check_model(path, full_check=True)
    except MemoryError:
        raise
    except Exception as error:  # The checker's errors share no narrower base.
        raise Invalid(f"not a valid ONNX model: {_one_line(str(error), path)}") from error
    return signature


def read_signature(model: onnx.ModelProto) -> Signature:
    """The graph's inputs and outputs in the protocol's datatypes; an unknown dimension is -1.

    An input that has an initializer is a constant with a name, so it is left out. Raises Invalid, naming the input or
    output, for what the Open Inference Protocol cannot carry.
    """
    graph = model.graph
    constants = {each.name for each in graph.initializer} | {each.values.name for each in graph.sparse_initializer}
    inputs = tuple(_spec("input", value) for value in graph.input if value.name not in constants)
    outputs = tuple(_spec("output", value) for value in graph.output)
    if not inputs or not outputs:
        raise Invalid(f"the graph has no {'outputs' if inputs else 'inputs'}, so there is nothing to ask it")
    return Signature(inputs, outputs)


def _parse(path: Path) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            model.ParseFromString(memoryview(data))  # type: ignore[arg-type] # a view spares the copy, and is taken
    except (DecodeError, ValueError) as error:  # ValueError: an empty file cannot be mapped.
        if "alloc" in str(error):
            raise MemoryError from error
        raise Invalid("not an ONNX model: the bytes are not an ONNX protobuf") from error
    if not model.ir_version or not model.HasField("graph"):
        raise Invalid("not an ONNX model: it has no graph")
    return model


def _messages(root: Message) -> Iterator[Message]:
    """Everything inside `root`, however deep (subgraphs, functions, attributes), but not the bytes of tensors."""
    waiting = [root]
    while waiting:
        message = waiting.pop()
        yield message
        if isinstance(message, onnx.TensorProto):
            continue
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                waiting.extend(value if field.is_repeated else (value,))


def _check_no_external_data(model: onnx.ModelProto) -> None:
    for tensor in _messages(model):
        if isinstance(tensor, onnx.TensorProto) and (
            tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data
        ):
            raise Invalid(
                f"tensor {tensor.name[:80]!r} keeps its data in another file; push one file with all weights inside"
                " (onnx.save(onnx.load(path), one_file), or lepton.push, which packs them)"
            )


def _check_operators(model: onnx.ModelProto) -> None:
    implemented = {(schema.domain, schema.name) for schema in get_all_operator_schema()}
    functions = {(_plain(each.domain), each.name) for each in model.functions}
    for node in _messages(model):
        if not isinstance(node, onnx.NodeProto):
            continue
        domain = _plain(node.domain)
        if (domain, node.op_type) in functions:
            continue
        operator = f"operator {node.op_type[:80]!r} of domain {_DOMAINS.get(domain, domain)[:80]!r}"
        if domain not in _DOMAINS:
            raise Invalid(f"{operator}: only the domains {', '.join(_DOMAINS.values())} are served")
        if node.op_type in _COMPILED:
            raise Invalid(f"{operator}: compiled engines are not served")
        if (domain, node.op_type) not in implemented:
            raise Invalid(f"{operator}: onnxruntime {onnxruntime.__version__} does not implement it")


def _check_runtime(model: onnx.ModelProto) -> None:
    """Ask the runtime itself, with the smallest model of the same IR version and operator sets."""
    opsets = {"": 7}
    for each in _messages(model):
        if isinstance(each, onnx.OperatorSetIdProto) and _plain(each.domain) in _DOMAINS:
            domain = _plain(each.domain)
            opsets[domain] = max(each.version, opsets.get(domain, 1))
    probe = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["": 7]> g (float[1] x) => (float[1] y) {y = Abs(x)}'
    )
    probe.ir_version = model.ir_version
    del probe.opset_import[:]
    probe.opset_import.extend(onnx.helper.make_opsetid(*each) for each in opsets.items())
    try:
        _session(probe)
    except Exception as error:  # The runtime's errors share no narrower base.
        asked = ", ".join(f"{_DOMAINS[domain]} {version}" for domain, version in opsets.items())
        newest = ", ".join(f"{_DOMAINS[domain]} {_newest(domain)}" for domain in opsets)
        raise Invalid(
            f"IR version {model.ir_version} with the operator sets {asked} is newer than onnxruntime"
            f" {onnxruntime.__version__} supports ({newest}); export the model for an older operator set"
        ) from error


def _newest(domain: str) -> int:
    return max(int(schema.since_version) for schema in get_all_operator_schema() if schema.domain == domain)


def _session(model: onnx.ModelProto) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _spec(side: str, value: onnx.ValueInfoProto) -> TensorSpec:
    name = value.name
    if not name or not name.isprintable():
        raise Invalid(f"{side} {name[:80]!r}: a name of printable characters is needed")
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        article = "no type" if kind is None else f"a {kind.removesuffix('_type')}, not a tensor"
        advice = "; export the classifier with zipmap=False" if side == "output" else ""
        raise Invalid(f"{side} {name[:80]!r} is {article}, which the Open Inference Protocol cannot carry{advice}")
    tensor = value.type.tensor_type
    datatype = _DATATYPES.get(tensor.elem_type)
    if datatype is None:
        known = tensor.elem_type in onnx.TensorProto.DataType.values()
        element = onnx.TensorProto.DataType.Name(tensor.elem_type) if known else str(tensor.elem_type)
        raise Invalid(f"{side} {name[:80]!r} has elements of type {element}, for which there is no OIP datatype")
    if not tensor.HasField("shape"):
        raise Invalid(f"{side} {name[:80]!r} has no shape; export it with one, in which dimensions may be unknown")
    return TensorSpec(name, datatype, tuple(_sizes(tensor.shape.dim)))


def _sizes(dimensions: Iterable[onnx.TensorShapeProto.Dimension]) -> Iterator[int]:
    for each in dimensions:
        # Some exporters write an unknown size as 0 or a negative number.
        yield each.dim_value if each.HasField("dim_value") and each.dim_value > 0 else -1


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _one_line(text: str, path: Path) -> str:
    """A library's message as our callers may see it: one line, bounded, without our paths."""
    return " ".join(text.replace(str(path), "the file").split())[:500]


def _main(path: Path) -> None:
    """Print the outcome as JSON: `{"signature": …}` or `{"refused": reason}`."""
    memory_bytes = _MEMORY_BYTES + _MEMORY_FACTOR * path.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Should the machine itself run out of memory, this process is the one to go.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    outcome: dict[str, Any]
    try:
        outcome = {"signature": inspect(path).to_dict()}
    except Invalid as error:
        outcome = {"refused": error.message}
    except MemoryError:
        outcome = {"refused": f"checking the model takes more than {memory_bytes >> 20} MiB of memory"}
    sys.stdout.write(json.dumps(outcome))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
