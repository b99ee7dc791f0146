import re
from collections.abc import Mapping

import pytest
from lepton_common.tensors import Array
from lepton_worker.domain import Verdict
from lepton_worker.engine import Engine
from lepton_worker.warmup import examine, warm_up

from .conftest import DOUBLE, OnnxFile


@pytest.mark.parametrize(
    "graph",
    [
        DOUBLE,
        "g (float[N, 2] x) => (int64[N] y) { y = ArgMax<axis = 1, keepdims = 0>(x) }",
        "g (string[N] x) => (string[N] y) { y = Identity(x) }",
        "g (float[N, T] x, int64[N] k) => (float[N, T] y, int64[N] z) { y = Softmax<axis = 1>(x) z = Identity(k) }",
        "g (float16[N, 4] x) => (float16[N, 4] y) { y = Softmax<axis = 1>(x) }",
        "g (bfloat16[N, 4] x) => (bfloat16[N, 4] y) { y = Identity(x) }",
        "g (bool[N] x) => (bool[N] y) { y = Not(x) }",
    ],
)
def test_a_model_whose_rows_are_independent_is_batched(graph: str, onnx_file: OnnxFile) -> None:
    assert examine(Engine(onnx_file(graph), 1)) == Verdict(True, "", 8)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            "g (float[N, 2] x) => (float[N, 2] y) { y = Softmax<axis = 0>(x) }",
            "of a row changes with the rows beside it",
        ),
        ("g (float[N, 2] x) => (float[N, 2] y) { s = RandomNormalLike(x) y = Add(x, s) }", "changes with the rows"),
        ("g (float[N, 2] x) => (float[M, 1] y) <int64[2] s = {-1, 1}> { y = Reshape(x, s) }", "shape .* for 7 rows"),
        ("g (float[1, 2] x) => (float[1, 2] y) { y = Add(x, x) }", "input 'x' has no free first dimension"),
        ("g (float[N, 2] x) => (float y) { y = ReduceSum<keepdims = 0>(x) }", "output 'y' has no free first dimension"),
    ],
)
def test_a_model_whose_rows_are_not_independent_is_not_batched(graph: str, reason: str, onnx_file: OnnxFile) -> None:
    verdict = examine(Engine(onnx_file(graph), 1))
    assert not verdict.batchable
    assert re.search(reason, verdict.reason)


def test_a_free_size_that_the_model_runs_with_is_found(onnx_file: OnnxFile) -> None:
    ones = ", ".join(["1"] * 64)
    graph = f"g (float[N, M] x) => (float[N, K] y) <float[64, 1] w = {{{ones}}}> {{ y = MatMul(x, w) }}"
    assert examine(Engine(onnx_file(graph), 1)) == Verdict(True, "", 64)


def test_a_model_that_no_example_fits_is_served_unbatched_and_not_warmed_up(onnx_file: OnnxFile) -> None:
    graph = "g (float[N, M] x) => (float[N, K] y) <float[5, 1] w = {1, 1, 1, 1, 1}> { y = MatMul(x, w) }"
    engine = Engine(onnx_file(graph), 1)
    verdict = examine(engine)
    assert verdict.free_size is None
    assert verdict.reason.startswith("no example input could be run: ")
    warm_up(engine, verdict, 8)


class Counting(Engine):
    """An engine that remembers how many rows it ran."""

    ran: tuple[int, ...] = ()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.ran += (len(inputs["x"]),)
        return super().run(inputs)


@pytest.mark.parametrize(
    ("batchable", "max_rows", "expected"),
    [(True, 32, (1, 32)), (False, 32, (1,)), (True, 1 << 30, (1, 1 << 21))],
)
def test_warming_up_runs_one_row_and_a_full_batch_of_bounded_size(
    batchable: bool, max_rows: int, expected: tuple[int, ...], onnx_file: OnnxFile
) -> None:
    engine = Counting(onnx_file(), 1)
    warm_up(engine, Verdict(batchable, "", 8), max_rows)
    assert engine.ran == expected
