"""One loaded model on onnxruntime. The only module that imports it."""

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import orjson
from lepton_common.errors import Invalid
from lepton_common.signature import Signature, TensorSpec
from lepton_common.tensors import Array
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from lepton_worker.domain import ModelFailed

RUNTIME = f"onnxruntime {onnxruntime.__version__}"

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16",
    "tensor(string)": "BYTES",
}
# What operators raise for what they were given: an index out of bounds, shapes that do not go together, a division by
# zero. Other values may do, so it is the caller's to mend.
_BY_VALUES = (ort.InvalidArgument, ort.RuntimeException, ort.Fail)
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_CUDA = ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"})
_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
# Where in its sources the runtime stopped: "/src/…/helper.h:84 onnxruntime::Reshape…(…) ", "ops.cc:703 Compute ".
_SOURCE = re.compile(r"\S+\.(?:cc|cpp|cu|h):\d+ [^()\s]*(?:\([^()]*\))? ?|/\S+/\S+")


def device() -> str:
    """What engines of this process run on: `cuda` or `cpu`."""
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    return "cuda" if has_gpu and _CUDA[0] in onnxruntime.get_available_providers() else "cpu"


def trim_memory() -> None:
    """Memory freed by engines goes back to the system, where the C library is glibc; it keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Engine:
    """A model that runs on numpy arrays, from any thread, several at a time."""

    def __init__(self, path: Path, intra_op_threads: int) -> None:
        """Loads the ONNX file. Raises Invalid saying why it cannot be."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = intra_op_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Spinning threads took 30 times the CPU at 100 requests a second and wreck neighbours.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if device() == "cuda":
            providers.insert(0, _CUDA)
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # The runtime's errors share no narrower base.
            raise Invalid(f"onnxruntime cannot load the model: {_clean(error)}") from error
        self.signature = Signature(
            tuple(_spec("input", node) for node in self._session.get_inputs()),
            tuple(_spec("output", node) for node in self._session.get_outputs()),
        )
        self.labels = _labels(self._session.get_modelmeta().custom_metadata_map)
        self._output_names = [spec.name for spec in self.signature.outputs]
        self._texts = [spec.name for spec in self.signature.inputs if spec.datatype == "BYTES"]
        self._has_bfloat16 = any(spec.datatype == "BF16" for spec in (*self.signature.inputs, *self.signature.outputs))
        if self._has_bfloat16 and self._texts:
            raise Invalid(f"input {self._texts[0]!r}: onnxruntime does not run text and BF16 in one model from here")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by name. Raises Invalid when it fails on these values, ModelFailed when it fails otherwise."""
        feed = dict(inputs)
        for name in self._texts:
            feed[name] = _text(name, feed[name])
        try:
            if self._has_bfloat16:
                return self._run_values(feed)
            return dict(zip(self._output_names, self._session.run(self._output_names, feed), strict=True))
        except _BY_VALUES as error:
            names = ", ".join(map(repr, feed))
            raise Invalid(f"the model fails on these values of {names}: {_clean(error)}") from error
        except Exception as error:
            raise ModelFailed(f"the model failed: {_clean(error)}") from error

    def _run_values(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """As `run`, by the runtime's own values, because it does not know numpy's bfloat16."""
        values = {name: _value(array) for name, array in feed.items()}
        outputs = self._session.run_with_ort_values(self._output_names, values)
        return dict(zip(self._output_names, map(_array, outputs), strict=True))


def _spec(kind: str, node: Any) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise Invalid(f"{kind} {node.name!r} is {node.type}, which the Open Inference Protocol cannot carry")
    return TensorSpec(node.name, datatype, tuple(dim if type(dim) is int and dim > 0 else -1 for dim in node.shape))


def _labels(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The class names in the model's metadata `labels`, a JSON list; none when it is anything else."""
    try:
        labels = orjson.loads(metadata.get("labels", "[]"))
    except orjson.JSONDecodeError:
        return ()
    return tuple(map(str, labels)) if type(labels) is list else ()


def _text(name: str, array: Array) -> Array:
    """The elements as `str`: the runtime takes no other, and would write bytes as "b'…'"."""
    text = np.empty(array.size, object)
    try:
        text[:] = [item.decode() for item in array.flat]
    except UnicodeDecodeError as error:
        raise Invalid(f"input {name!r}: the model takes text, and an element is not UTF-8") from error
    return text.reshape(array.shape)


def _value(array: Array) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            np.ascontiguousarray(array).view(np.uint16), _BFLOAT16
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _array(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    memory = (ctypes.c_char * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    # Copied, because the memory is the value's.
    return np.frombuffer(bytes(memory), ml_dtypes.bfloat16).reshape(value.shape())


def _clean(error: Exception) -> str:
    """The runtime's message as callers may see it: one line without its error prefix and paths."""
    message = _CODE.sub("", str(error)).rpartition("Status Message: ")[2]
    return " ".join(_SOURCE.sub("", message).split())[:300] or type(error).__name__
