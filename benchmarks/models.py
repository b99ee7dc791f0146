"""The models of the benchmarks, made from a fixed seed."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def mlp(path: Path, sizes: tuple[int, ...]) -> Path:
    """A multi-layer perceptron with ReLU between its layers, input `x` [n, sizes[0]], output `y` [n, sizes[-1]]."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer, (rows, columns) in enumerate(pairwise(sizes)):
        weight = rng.normal(0, rows**-0.5, (rows, columns)).astype(np.float32)
        weights += [
            numpy_helper.from_array(weight, f"w{layer}"),
            numpy_helper.from_array(np.zeros(columns, np.float32), f"b{layer}"),
        ]
        is_output = layer == len(sizes) - 2
        out = "y" if is_output else f"z{layer}"
        nodes.append(helper.make_node("Gemm", [last, f"w{layer}", f"b{layer}"], [out]))
        if not is_output:
            nodes.append(helper.make_node("Relu", [out], [last := f"h{layer}"]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", sizes[0]])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", sizes[-1]])]
    graph = helper.make_graph(nodes, "mlp", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
