"""Which models are let in, what their signature is, and what a refusal says."""

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lepton_common.errors import Invalid
from lepton_common.signature import Signature, TensorSpec
from lepton_registry.inspection import inspect
from lepton_registry.inspector import ChildInspector
from onnx import TensorProto, helper, numpy_helper

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])


def model(
    nodes: Sequence[onnx.NodeProto] = (helper.make_node("Relu", ["x"], ["y"]),),
    inputs: Sequence[onnx.ValueInfoProto] = (X,),
    outputs: Sequence[onnx.ValueInfoProto] = (Y,),
    initializers: Sequence[onnx.TensorProto] = (),
    opsets: dict[str, int] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers))
    imports = [helper.make_opsetid(*each) for each in (opsets or {"": 21}).items()]
    return helper.make_model(graph, ir_version=10, opset_imports=imports, functions=list(functions))


def saved(tmp_path: Path, proto: onnx.ModelProto) -> Path:
    path = tmp_path / "model"
    path.write_bytes(proto.SerializeToString())
    return path


def refusal(tmp_path: Path, proto: onnx.ModelProto) -> str:
    with pytest.raises(Invalid) as caught:
        inspect(saved(tmp_path, proto))
    assert str(tmp_path) not in caught.value.message
    return caught.value.message


def elsewhere(name: str = "w") -> onnx.TensorProto:
    """A tensor whose data is in /etc/passwd."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def test_signature_has_oip_datatypes_and_unknown_sizes_as_minus_one(tmp_path: Path) -> None:
    assert inspect(saved(tmp_path, model())) == Signature(
        (TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 4)),)
    )


@pytest.mark.parametrize(
    ("element", "datatype"),
    [
        (TensorProto.STRING, "BYTES"),
        (TensorProto.BOOL, "BOOL"),
        (TensorProto.FLOAT16, "FP16"),
        (TensorProto.BFLOAT16, "BF16"),
        (TensorProto.DOUBLE, "FP64"),
        (TensorProto.UINT8, "UINT8"),
        (TensorProto.INT64, "INT64"),
    ],
)
def test_every_element_type_has_its_datatype(tmp_path: Path, element: int, datatype: str) -> None:
    ends = [helper.make_tensor_value_info(name, element, [2]) for name in ("x", "y")]
    signature = inspect(saved(tmp_path, model([helper.make_node("Identity", ["x"], ["y"])], ends[:1], ends[1:])))
    assert signature.inputs == (TensorSpec("x", datatype, (2,)),)


def test_inputs_with_an_initializer_are_not_asked_of_the_caller(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones(4, np.float32), "w")
    named = helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])
    proto = model([helper.make_node("Add", ["x", "w"], ["y"])], [X, named], initializers=[weight])
    assert [spec.name for spec in inspect(saved(tmp_path, proto)).inputs] == ["x"]


def test_tensors_without_a_shape_are_refused(tmp_path: Path) -> None:
    assert "input 'x' has no shape" in refusal(
        tmp_path, model(inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, None)])
    )
    assert "output 'y' has no shape" in refusal(
        tmp_path, model(outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    )


def test_classifier_with_a_zipmap_is_refused_with_the_remedy(tmp_path: Path) -> None:
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    zipmap = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2, 3])
    proto = model([zipmap], outputs=[helper.make_value_info("y", maps)], opsets={"": 21, "ai.onnx.ml": 3})
    message = refusal(tmp_path, proto)
    assert "output 'y' is a sequence" in message
    assert "zipmap=False" in message


def test_element_type_without_a_datatype_is_refused(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.COMPLEX64, [2]) for name in ("x", "y")]
    message = refusal(tmp_path, model([helper.make_node("Identity", ["x"], ["y"])], ends[:1], ends[1:]))
    assert "input 'x'" in message
    assert "COMPLEX64" in message


def test_operators_of_onnxruntime_itself_are_let_in(tmp_path: Path) -> None:
    gelu = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    assert inspect(saved(tmp_path, model([gelu], opsets={"": 21, "com.microsoft": 1}))).outputs[0].name == "y"


def test_functions_of_the_model_may_have_any_domain(tmp_path: Path) -> None:
    body = [helper.make_node("Relu", ["a"], ["b"])]
    function = helper.make_function("mine", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    call = helper.make_node("Twice", ["x"], ["y"], domain="mine")
    assert inspect(saved(tmp_path, model([call], opsets={"": 21, "mine": 1}, functions=[function]))).inputs


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (helper.make_node("Relu", ["x"], ["y"], domain="evil"), "'Relu' of domain 'evil'"),
        (helper.make_node("PyOp", ["x"], ["y"], domain="com.microsoft"), "does not implement it"),
        (helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft"), "compiled engines"),
        (helper.make_node("NoSuchThing", ["x"], ["y"]), "does not implement it"),
    ],
)
def test_operators_that_the_runtime_does_not_implement_are_refused_everywhere(
    tmp_path: Path, node: onnx.NodeProto, says: str
) -> None:
    opsets = {"": 21, "com.microsoft": 1, "evil": 1}
    inner = helper.make_graph([node], "inner", [], [Y])
    choose = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    imports = [helper.make_opsetid(*each) for each in opsets.items()]
    function = helper.make_function("mine", "F", ["x"], ["y"], [node], imports)
    call = helper.make_node("F", ["x"], ["y"], domain="mine")
    assert says in refusal(tmp_path, model([node], opsets=opsets))
    assert says in refusal(tmp_path, model([choose], initializers=[condition], opsets=opsets))
    assert says in refusal(tmp_path, model([call], opsets=opsets | {"mine": 1}, functions=[function]))


def external_models() -> dict[str, onnx.ModelProto]:
    constant = helper.make_node("Constant", [], ["w"], value=elsewhere())
    add = helper.make_node("Add", ["x", "w"], ["y"])
    inner = helper.make_graph([add], "inner", [], [Y], [elsewhere()])
    choose = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    function = helper.make_function("mine", "F", ["x"], ["y"], [constant, add], [helper.make_opsetid("", 21)])
    call = helper.make_node("F", ["x"], ["y"], domain="mine")
    sparse = model()
    sparse.graph.sparse_initializer.add(values=elsewhere(), dims=[4])
    marked = elsewhere()
    marked.data_location = TensorProto.DEFAULT
    return {
        "initializer": model([add], initializers=[elsewhere()]),
        "only the location given": model([add], initializers=[marked]),
        "attribute": model([constant, add]),
        "subgraph": model([choose], initializers=[condition]),
        "function": model([call], opsets={"": 21, "mine": 1}, functions=[function]),
        "sparse initializer": sparse,
    }


@pytest.mark.parametrize("where", external_models())
def test_data_in_other_files_is_refused_wherever_it_hides(tmp_path: Path, where: str) -> None:
    assert "keeps its data in another file" in refusal(tmp_path, external_models()[where])


def test_operator_set_newer_than_the_runtime_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, model(opsets={"": 999}))
    assert "ai.onnx 999" in message
    assert "newer than onnxruntime" in message


def test_ir_version_newer_than_the_runtime_is_refused(tmp_path: Path) -> None:
    proto = model()
    proto.ir_version = 99
    assert "IR version 99" in refusal(tmp_path, proto)


@pytest.mark.parametrize("data", [b"", b"hello world", b"PK\x03\x04" + bytes(100), b"\x80\x04\x95" + bytes(50)])
def test_bytes_that_are_no_model_are_called_so(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model"
    path.write_bytes(data)
    with pytest.raises(Invalid, match="not an ONNX model"):
        inspect(path)


def test_graph_that_the_checker_refuses_is_refused_with_its_words(tmp_path: Path) -> None:
    message = refusal(tmp_path, model([helper.make_node("Relu", ["nowhere"], ["y"])]))
    assert "not a valid ONNX model" in message
    assert "nowhere" in message


def test_shapes_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    wrong = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
    assert "not a valid ONNX model" in refusal(tmp_path, model(outputs=[wrong]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_models_are_refused_or_read_but_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(model().SerializeToString())
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(Invalid):
        assert inspect(path).inputs


async def test_child_says_what_inspection_says(tmp_path: Path) -> None:
    inspector = ChildInspector(timeout_s=60)
    assert await inspector.inspect(saved(tmp_path, model())) == inspect(saved(tmp_path, model()))
    with pytest.raises(Invalid, match="keeps its data in another file"):
        await inspector.inspect(saved(tmp_path, external_models()["initializer"]))


async def test_file_that_takes_too_long_is_refused_and_its_child_is_gone(tmp_path: Path) -> None:
    pipe = tmp_path / "model"
    os.mkfifo(pipe)  # Whoever opens it for reading waits for ever.
    with pytest.raises(Invalid, match=r"longer than 0.5 s"):
        await ChildInspector(timeout_s=0.5).inspect(pipe)
    # Opening for writing without waiting succeeds only while somebody has it open for reading.
    with pytest.raises(OSError, match="No such device"):
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


async def test_file_that_crashes_the_check_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="crashes the ONNX checker"):
        await ChildInspector(timeout_s=60).inspect(tmp_path)


async def test_small_file_that_unfolds_to_gigabytes_is_refused(tmp_path: Path) -> None:
    empty_nodes = b"\x0a\x00" * 8_000_000
    bomb = tmp_path / "model"
    # ir_version = 10, then the graph: 2 bytes in the file become more than 100 in memory.
    bomb.write_bytes(b"\x08\x0a\x3a" + b"\x80\xc8\xd0\x07" + empty_nodes)
    with pytest.raises(Invalid, match="MiB of memory"):
        await ChildInspector(timeout_s=60).inspect(bomb)


async def test_many_files_are_checked_a_few_at_a_time(tmp_path: Path) -> None:
    path = saved(tmp_path, model())
    inspector = ChildInspector(timeout_s=60, at_once=1)
    signatures = await asyncio.gather(*(inspector.inspect(path) for _ in range(3)))
    assert len(set(map(str, signatures))) == 1
