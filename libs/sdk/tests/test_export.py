"""Models of every kind become one ONNX file that computes the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from lepton.errors import Invalid
from lepton.export import to_onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

Array = NDArray[Any]


@pytest.fixture(scope="module")
def digits() -> tuple[Array, Array]:
    images, labels = load_digits(return_X_y=True)
    return images[:400].astype(np.float32), labels[:400]


@pytest.fixture
def proto() -> onnx.ModelProto:
    """y = x + w, its weights as raw bytes."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], np.array([1, 2], np.float32).tobytes(), raw=True)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "add", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: bytes, **inputs: Array) -> list[Array]:
    answers: list[Array] = ort.InferenceSession(model).run(None, inputs)
    return answers


def exported(model: Any, **options: Any) -> bytes:
    result = to_onnx(model, **options)
    assert isinstance(result, bytes)
    return result


def classes_in(model: bytes) -> Any:
    return json.loads({entry.key: entry.value for entry in onnx.load_from_string(model).metadata_props}["labels"])


# --- scikit-learn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(max_iter=2000),
        RandomForestClassifier(10, random_state=0),
        MLPClassifier((16,), random_state=0, max_iter=2000),
        SVC(gamma=0.001),
        CalibratedClassifierCV(SVC(gamma=0.001), ensemble=False),
        make_pipeline(StandardScaler(), SVC()),
        LinearSVC(random_state=0, max_iter=5000),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_a_classifier_answers_with_its_labels_and_a_tensor_of_scores(
    estimator: Any, digits: tuple[Array, Array]
) -> None:
    images, labels = digits
    model = exported(estimator.fit(images, labels))
    predicted, scores = run(model, input=images)
    np.testing.assert_array_equal(predicted, estimator.predict(images))
    assert scores.shape == (len(images), 10)
    assert classes_in(model) == [str(digit) for digit in range(10)]


def test_a_regressor_answers_with_its_value_and_has_no_classes(digits: tuple[Array, Array]) -> None:
    images, labels = digits
    model = exported(Ridge().fit(images, labels))
    (value,) = run(model, input=images)
    np.testing.assert_allclose(value[:, 0], Ridge().fit(images, labels).predict(images), atol=1e-3)
    assert not onnx.load_from_string(model).metadata_props


def test_the_same_training_gives_the_same_bytes(digits: tuple[Array, Array]) -> None:
    models = [exported(make_pipeline(StandardScaler(), SVC()).fit(*digits)) for _ in range(2)]
    assert models[0] == models[1]
    domains = [opset.domain for opset in onnx.load_from_string(models[0]).opset_import]
    assert domains == sorted(set(domains)), "skl2onnx takes them from a set, in an order that changes between runs"


def test_given_classes_win_over_the_estimators_own(digits: tuple[Array, Array]) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert classes_in(exported(RandomForestClassifier(3).fit(*digits), classes=words)) == words


def test_an_estimator_that_is_not_fitted_is_refused() -> None:
    with pytest.raises(Invalid, match="SVC is not fitted yet"):
        to_onnx(SVC())


def test_an_estimator_that_takes_no_table_of_numbers_is_refused() -> None:
    with pytest.raises(Invalid, match="does not say how many numbers"):
        to_onnx(CountVectorizer().fit(["a text"]))


# --- ONNX -------------------------------------------------------------------------------------------------------------


def test_a_self_contained_file_is_taken_as_it_is(tmp_path: Path, proto: onnx.ModelProto) -> None:
    onnx.save(proto, tmp_path / "m.onnx")
    assert to_onnx(tmp_path / "m.onnx") == to_onnx(str(tmp_path / "m.onnx")) == tmp_path / "m.onnx"


def test_weights_in_a_side_file_are_packed_in(tmp_path: Path, proto: onnx.ModelProto) -> None:
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    assert b"m.onnx.data" in (tmp_path / "m.onnx").read_bytes()
    packed = exported(tmp_path / "m.onnx")
    assert run(packed, x=np.zeros((1, 2), np.float32))[0].tolist() == [[1, 2]]


def test_weights_of_a_branch_are_packed_in_too(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], np.array([1, 2], np.float32).tobytes(), raw=True)
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, [2])
    branch = helper.make_graph([helper.make_node("Constant", [], ["o"], value=weight)], "branch", [], [out])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    choice = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    model = helper.make_model(helper.make_graph([node], "choose", [choice], [result]), ir_version=10)
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0, convert_attribute=True
    )
    assert run(exported(tmp_path / "m.onnx"), c=np.array(True))[0].tolist() == [1, 2]


def test_a_missing_side_file_is_named(tmp_path: Path, proto: onnx.ModelProto) -> None:
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(Invalid, match=r"weights\.bin, which cannot be read beside it"):
        to_onnx(tmp_path / "m.onnx")


def test_weights_outside_the_models_folder_are_not_read(tmp_path: Path, proto: onnx.ModelProto) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "secret").write_bytes(bytes(8))
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret")
    (tmp_path / "sub" / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(Invalid, match="secret, which cannot be read"):
        to_onnx(tmp_path / "sub" / "m.onnx")


def test_class_names_are_added_without_touching_the_callers_model(proto: onnx.ModelProto) -> None:
    before = proto.SerializeToString()
    assert classes_in(exported(proto, classes=["a", "b"])) == ["a", "b"]
    assert proto.SerializeToString() == before


def test_a_model_whose_weights_are_elsewhere_is_refused(tmp_path: Path, proto: onnx.ModelProto) -> None:
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0)
    with pytest.raises(Invalid, match="in a file beside it"):
        to_onnx(onnx.load(tmp_path / "m.onnx", load_external_data=False))


@pytest.mark.parametrize("content", [b"", b"\x99\x01not a model"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(Invalid, match=r"m\.onnx is not an ONNX file"):
        to_onnx(tmp_path / "m.onnx")


def test_what_is_no_model_is_refused_with_what_would_be_one() -> None:
    with pytest.raises(Invalid, match="int is not a model"):
        to_onnx(3)
    with pytest.raises(Invalid, match="There is no file"):
        to_onnx("nothing.onnx")


# --- torch ------------------------------------------------------------------------------------------------------------


def test_a_torch_module_takes_any_number_of_rows() -> None:
    torch = pytest.importorskip("torch", reason="the base install has no torch; the exporter needs it and onnxscript")
    pytest.importorskip("onnxscript")
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.9))
    model = exported(module, example=torch.zeros(2, 4))
    assert module.training, "the caller's module is as it was"
    rows = torch.ones(5, 4)
    name = ort.InferenceSession(model).get_inputs()[0].name
    np.testing.assert_allclose(run(model, **{name: rows.numpy()})[0], module.eval()(rows).detach().numpy(), rtol=1e-5)
