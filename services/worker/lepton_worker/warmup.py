"""Example inputs made from a signature: to find out whether a model may be batched, and to warm it up."""

import numpy as np
from lepton_common.errors import LeptonError
from lepton_common.signature import DTYPES, Signature
from lepton_common.tensors import Array

from lepton_worker.domain import Verdict, unbatchable
from lepton_worker.engine import Engine

# Sizes tried for unknown dimensions behind the first: a short sequence, none at all, the side of an image.
_FREE_SIZES = (8, 1, 64, 224)
_ROWS = 7
_SEED = 7
_MAX_ELEMENTS = 1 << 22  # of a batch to warm up with
# Rounding differs with the shape of a matrix product; a row that depends on its neighbours differs by far more.
_TOLERANCE = {"FP16": 1e-2, "BF16": 3e-2, "FP32": 1e-4, "FP64": 1e-6}


def examine(engine: Engine) -> Verdict:
    """Runs the model on example rows, one by one and as a batch, and says whether they come out the same."""
    free_size, failure = _runnable_size(engine)
    if free_size is None:
        return Verdict(False, f"no example input could be run: {failure}")
    reason = unbatchable(engine.signature)
    if reason is None:
        reason = _difference(engine, free_size)
    return Verdict(reason is None, reason or "", free_size)


def warm_up(engine: Engine, verdict: Verdict, max_rows: int) -> None:
    """The engine has run one row and a full batch (of bounded size), so that no caller pays for first-time work."""
    if verdict.free_size is None:
        return
    one = _examples(engine.signature, 1, verdict.free_size)
    engine.run(one)
    if verdict.batchable:
        fitting_rows = _MAX_ELEMENTS // max(1, sum(array.size for array in one.values()))
        engine.run(_examples(engine.signature, max(1, min(max_rows, fitting_rows)), verdict.free_size))


def _examples(signature: Signature, rows: int, free_size: int) -> dict[str, Array]:
    """Inputs that fit the signature: normal floats, the integers 0 and 1, short texts; the same on every call."""
    random = np.random.default_rng(_SEED)
    examples: dict[str, Array] = {}
    for spec in signature.inputs:
        rest = [free_size if dim == -1 else dim for dim in spec.shape[1:]]
        first = [rows if spec.shape[0] == -1 else spec.shape[0]] if spec.shape else []
        shape = tuple(first + rest)
        dtype = DTYPES[spec.datatype]
        if spec.datatype == "BYTES":
            examples[spec.name] = random.choice(np.array([b"a", b"bc"], object), shape)
        elif dtype.kind in "fV":
            examples[spec.name] = np.asarray(random.standard_normal(shape)).astype(dtype)
        else:
            examples[spec.name] = np.asarray(random.integers(0, 2, shape)).astype(dtype)
    return examples


def _runnable_size(engine: Engine) -> tuple[int | None, str]:
    """The first of the sizes that the model runs with, or None and why the last one failed."""
    failure = ""
    for free_size in _FREE_SIZES:
        try:
            engine.run(_examples(engine.signature, 1, free_size))
        except LeptonError as error:
            failure = error.message
        else:
            return free_size, ""
    return None, failure


def _difference(engine: Engine, free_size: int) -> str | None:
    """How rows of a batch differ from the same rows alone; None when they do not."""
    batch = _examples(engine.signature, _ROWS, free_size)
    try:
        together = engine.run(batch)
    except LeptonError as error:
        return f"it does not run on {_ROWS} rows: {error.message}"
    for name, array in together.items():
        if array.shape[:1] != (_ROWS,):
            return f"output {name!r} has shape {list(array.shape)} for {_ROWS} rows"
    for row in range(_ROWS):
        alone = engine.run({name: array[row : row + 1] for name, array in batch.items()})
        for spec in engine.signature.outputs:
            if not _equal(spec.datatype, alone[spec.name], together[spec.name][row : row + 1]):
                return f"output {spec.name!r} of a row changes with the rows beside it"
    return None


def _equal(datatype: str, alone: Array, together: Array) -> bool:
    if alone.shape != together.shape:
        return False
    if datatype not in _TOLERANCE:
        return bool((alone == together).all())
    one, other = alone.astype(np.float64), together.astype(np.float64)
    scale = np.max(np.abs(one), initial=0.0, where=np.isfinite(one))
    tolerance = _TOLERANCE[datatype]
    return np.allclose(one, other, rtol=tolerance, atol=tolerance * float(scale), equal_nan=True)
