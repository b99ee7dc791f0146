"""Whether two versions' answers to one request agree, and which is right where the right answer is known. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from lepton_common import compression, oip
from lepton_common.errors import Invalid, LeptonError, TooLarge
from lepton_common.signature import DTYPES, TensorSpec
from lepton_common.tensors import Array, checked_shape, from_binary, from_json

# Beyond, taking an answer apart would keep other requests waiting.
MAX_BYTES = 256 << 10
_RELATIVE, _ABSOLUTE = 0.01, 1e-6
_FLOATS = frozenset({"FP16", "FP32", "FP64", "BF16"})
# A class as the classification extension writes it, value:index[:label]. Its value is a number like any other.
_CLASS = re.compile(rb"(?:-?\d+\.\d{6}|-?inf|nan):(\d+(?::.*)?)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`stable_right` and `shadow_right` are None where no label says what is right."""

    agrees: bool
    stable_right: bool | None = None
    shadow_right: bool | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor of an answer. A discrete one is exact: integers, booleans, text. `classes` are without their scores."""

    array: Array
    discrete: bool
    classes: bool = False


Outputs = Mapping[str, Output]


def decode(headers: Mapping[bytes, bytes], body: bytes, max_bytes: int = MAX_BYTES) -> Outputs:
    """The outputs of a successful OIP answer by name, in its order. Raises Invalid, TooLarge beyond `max_bytes`."""
    plain = bytes(compression.decompress(body, headers.get(b"content-encoding", b""), max_bytes))
    if len(plain) > max_bytes:
        raise TooLarge(f"the answer has more than {max_bytes} bytes")
    length = oip.header_length_of(headers.get(b"inference-header-content-length"))
    if length is None:
        length = len(plain)
    tail = memoryview(plain)[length:]
    try:
        items = orjson.loads(plain[:length])["outputs"]
        outputs: dict[str, Output] = {}
        for item in items:
            size = (item.get("parameters") or {}).get("binary_data_size")
            outputs[item["name"]] = _output(item, None if size is None else tail[:size])
            tail = tail[size or 0 :]
    except LeptonError:
        raise
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise Invalid("the answer is not one of the Open Inference Protocol") from error
    return outputs


def compare(stable: Outputs, shadow: Outputs, label: bytes | None) -> Comparison:
    """How the shadow's answer stands to the stable's. `label` is JSON: the value that is right, or a list of them."""
    agrees = _agree(stable, shadow)
    if label is None:
        return Comparison(agrees)
    try:
        wanted = orjson.loads(label)
    except orjson.JSONDecodeError:
        return Comparison(agrees)
    stable_right, shadow_right = _is_right(stable, wanted), _is_right(shadow, wanted)
    if stable_right is None:
        return Comparison(agrees)  # The label does not speak of what this model answers.
    return Comparison(agrees, stable_right, bool(shadow_right))


def _output(item: Mapping[str, Any], data: memoryview | None) -> Output:
    datatype, shape = item["datatype"], item["shape"]
    if datatype not in DTYPES:
        raise Invalid(f"the answer has an unknown datatype {str(datatype)[:40]!r}")
    spec = TensorSpec(str(item["name"]), datatype, (-1,) * len(shape))
    checked = checked_shape(spec, shape)
    array = from_json(spec, checked, item["data"]) if data is None else from_binary(spec, checked, data)
    if datatype in _FLOATS:
        return Output(array.astype(np.float64), discrete=False)
    classes = [_CLASS.fullmatch(each) for each in array.flat] if datatype == "BYTES" else []
    if classes and all(classes):
        flat = np.empty(array.size, object)
        flat[:] = [found[1] for found in classes if found]
        return Output(flat.reshape(array.shape), discrete=True, classes=True)
    return Output(array, discrete=True)


def _agree(stable: Outputs, shadow: Outputs) -> bool:
    """Exact outputs alone decide where there are any: a class may be the same though its score moved."""
    if stable.keys() != shadow.keys():
        return False
    pairs = [(stable[name], shadow[name]) for name in stable]
    if any(one.discrete != other.discrete or one.array.shape != other.array.shape for one, other in pairs):
        return False
    exact = [(one, other) for one, other in pairs if one.discrete]
    if exact:
        return all(bool(np.array_equal(one.array, other.array)) for one, other in exact)
    return all(_are_near(one.array, other.array) for one, other in pairs)


def _are_near(one: Array, other: Array) -> bool:
    missing = np.isnan(one)
    if not np.array_equal(missing, np.isnan(other)):
        return False  # NaN on one side alone is never near.
    if one.ndim and one.shape[-1] > 1 and one.size and np.array_equal(one.argmax(-1), other.argmax(-1)):
        return True
    one, other = one[~missing], other[~missing]
    with np.errstate(invalid="ignore"):  # of infinities, which are near when they are equal
        allowed = np.maximum(_ABSOLUTE, _RELATIVE * np.maximum(np.abs(one), np.abs(other)))
        return bool(np.all((one == other) | (np.isfinite(allowed) & (np.abs(one - other) <= allowed))))


def _is_right(outputs: Outputs, label: Any) -> bool | None:
    """Whether the first exact output, or else the greatest of the first scores, is the label. None: not comparable."""
    wanted = _flat(label)
    for each in outputs.values():
        if each.discrete:
            answered = each.array.ravel().tolist()
            return _all_are(answered, wanted, classes=each.classes)
    for each in outputs.values():
        if each.array.ndim and each.array.shape[-1] > 1 and each.array.size:
            return _all_are(np.ravel(each.array.argmax(-1)).tolist(), wanted, classes=False)
    return None


def _all_are(answered: Sequence[Any], wanted: Sequence[Any], *, classes: bool) -> bool | None:
    if len(answered) != len(wanted):
        return None
    return all(_is(value, each, classes) for value, each in zip(answered, wanted, strict=True))


def _is(value: Any, wanted: Any, classes: bool) -> bool:
    if not isinstance(value, bytes):
        return bool(value == wanted)
    text = value.decode("utf-8", "replace")
    # A class may be named by its index or by its label.
    return str(wanted) in text.split(":", 1) if classes else str(wanted) == text


def _flat(label: Any) -> list[Any]:
    """The label's values, however deep the lists that hold them."""
    values, left = [], [label]
    while left:
        each = left.pop()
        if isinstance(each, list):
            left.extend(reversed(each))
        else:
            values.append(each)
    return values
