"""What a version takes and gives: named tensors with OIP datatypes and shapes. Shared by registry and worker."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from lepton_common.errors import Invalid

# The datatypes of Open Inference Protocol v2 and Triton's BF16. BYTES elements are Python `bytes`.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BYTES": np.dtype(object),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. A dimension of -1 takes any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape may be passed here."""
        if len(shape) != len(self.shape):
            return False
        # A loop, because a generator would take longer than all the rest of the check.
        for want, got in zip(self.shape, shape, strict=True):  # noqa: SIM110 - see above
            if want != got and want != -1:
                return False
        return True

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, value: Any) -> "TensorSpec":
        """The inverse of `to_dict`. Raises Invalid on anything else."""
        match value:
            case {"name": str(name), "datatype": str(datatype), "shape": list(shape)}:
                if datatype in DTYPES and all(type(dim) is int and dim >= -1 for dim in shape):
                    return cls(name, datatype, tuple(shape))
        raise Invalid(f"not a tensor's name, datatype and shape: {str(value)[:200]}")


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a version, in the model's own order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @cached_property
    def input_of(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.inputs}

    @cached_property
    def output_of(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.outputs}

    def to_dict(self) -> dict[str, Any]:
        """As OIP's model metadata writes it."""
        return {
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
        }

    @classmethod
    def from_dict(cls, value: Any) -> "Signature":
        """The inverse of `to_dict`. Raises Invalid on anything else."""
        match value:
            case {"inputs": list(inputs), "outputs": list(outputs)}:
                return cls(tuple(map(TensorSpec.from_dict, inputs)), tuple(map(TensorSpec.from_dict, outputs)))
        raise Invalid(f"not a signature: {str(value)[:200]}")
