"""Models as people have them, turned into the one thing Lepton serves: an ONNX file with its weights inside."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model, uses_external_data

from lepton.errors import Invalid, TooLarge

# ONNX metadata that holds a classifier's class names, a JSON list; workers read it for OIP classification.
CLASSES_KEY = "labels"

_TOO_LARGE = "An ONNX model with its weights inside is at most 2 GiB; this one is larger."
_KINDS = "a path to an .onnx file, an onnx.ModelProto, a torch.nn.Module or a fitted scikit-learn estimator"


def to_onnx(model: Any, *, example: Any = None, classes: Sequence[str] | None = None) -> Path | bytes:
    """The model as one self-contained ONNX file (the path given, when it is one already) or as its bytes.

    The same model gives the same bytes. Raises Invalid when it is nothing that can be exported, TooLarge over 2 GiB.
    """
    if isinstance(model, str | Path):
        return _from_path(Path(model), classes)
    if isinstance(model, onnx.ModelProto):
        return _serialized(model, classes)
    if _is_a(model, "torch.nn.modules.module", "Module"):
        return _serialized(_from_torch(model, example), classes)
    if _is_a(model, "sklearn.base", "BaseEstimator"):
        return _serialized(_from_sklearn(model), classes or _classes_of(model))
    raise Invalid(f"{type(model).__name__} is not a model that Lepton knows.", hint=f"Give {_KINDS}.")


def _is_a(model: object, module: str, name: str) -> bool:
    """Whether the model is of that class; asked without importing the library, which may not be installed."""
    return any((kind.__module__, kind.__name__) == (module, name) for kind in type(model).__mro__)


# --- ONNX -------------------------------------------------------------------------------------------------------------


def _from_path(path: Path, classes: Sequence[str] | None) -> Path | bytes:
    if not path.is_file():
        raise Invalid(f"There is no file {str(path)!r}.")
    not_onnx = Invalid(f"{path.name} is not an ONNX file.", hint=f"Give {_KINDS}.")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise not_onnx from error
    if not model.HasField("graph"):
        raise not_onnx
    beside = _files_beside(model)
    if not beside and classes is None:
        return path
    try:
        load_external_data_for_model(model, str(path.parent))  # Refuses links and whatever is not beside the file.
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise Invalid(f"{path.name} keeps weights in {', '.join(beside)}, which cannot be read beside it.") from error
    return _serialized(model, classes)


def _files_beside(model: onnx.ModelProto) -> list[str]:
    """The files in which the model's weights are kept, as torch and onnx write those of large models."""
    tensors = chain(model.graph.initializer, _tensors_in(_nodes(model)))
    return sorted({ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)})


def _nodes(model: onnx.ModelProto) -> Iterable[onnx.NodeProto]:
    return chain(model.graph.node, *(function.node for function in model.functions))


def _tensors_in(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """The tensors in the nodes' attributes, those of the graphs that branches and loops hold included."""
    for attribute in chain.from_iterable(node.attribute for node in nodes):
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from graph.initializer
            yield from _tensors_in(graph.node)


def _serialized(model: onnx.ModelProto, classes: Sequence[str] | None) -> bytes:
    if _files_beside(model):
        raise Invalid("The model's weights are in a file beside it.", hint="Give the path of its .onnx file instead.")
    if classes is not None:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        model = copy
        others = {entry.key: entry.value for entry in model.metadata_props if entry.key != CLASSES_KEY}
        onnx.helper.set_model_props(model, {**others, CLASSES_KEY: json.dumps(list(classes))})
    try:
        return bytes(model.SerializeToString(deterministic=True))
    except (EncodeError, ValueError) as error:
        raise TooLarge(_TOO_LARGE) from error


# --- torch ------------------------------------------------------------------------------------------------------------


def _from_torch(module: Any, example: Any) -> onnx.ModelProto:
    """The module's graph in evaluation mode. Inputs with as many rows as the first one take any number of them."""
    import torch

    if example is None:
        hint = "Give example=: an input, or a tuple of them."
        raise Invalid("A torch module is exported by running it once.", hint=hint)
    examples = tuple(map(_with_rows, example if isinstance(example, tuple) else (example,)))
    rows = torch.export.Dim("rows")
    batched = [each.ndim > 0 and len(each) == len(examples[0]) for each in examples]
    shapes = tuple({0: rows} if free else None for free in batched)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            program = torch.onnx.export(module, examples, dynamo=True, dynamic_shapes=shapes, verbose=False)
    except ImportError as error:
        raise Invalid("torch exports to ONNX with onnxscript.", hint="pip install onnxscript") from error
    except RuntimeError as error:
        raise Invalid(f"torch cannot export {type(module).__name__}: {_first_line(error)}") from error
    finally:
        module.train(was_training)
    exported: onnx.ModelProto = program.model_proto
    # The exporter notes where in the caller's files each node comes from: nobody else's business.
    for node in _nodes(exported):
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return exported


def _with_rows(example: Any) -> Any:
    """The example with at least two rows: torch.export takes a size of one for a constant."""
    import torch

    if not isinstance(example, torch.Tensor):
        raise Invalid(f"example= holds a {type(example).__name__}.", hint="Give tensors only.")
    return torch.cat([example, example]) if example.ndim and len(example) == 1 else example


# --- scikit-learn -----------------------------------------------------------------------------------------------------


def _from_sklearn(estimator: Any) -> onnx.ModelProto:
    """The estimator's graph: `input`, float32 [-1, features], to the converter's outputs.

    A classifier's are `label` [-1] and `probabilities` [-1, classes].
    """
    try:
        from skl2onnx import convert_sklearn
        from skl2onnx.common.data_types import FloatTensorType
    except ImportError as error:
        raise Invalid("Exporting a scikit-learn model needs skl2onnx.", hint="pip install 'lepton[sklearn]'") from error
    from sklearn.base import is_classifier
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    name = type(estimator).__name__
    try:
        check_is_fitted(estimator)
    except NotFittedError as error:
        raise Invalid(f"{name} is not fitted yet.", hint="Call its fit() first.") from error
    features = getattr(estimator, "n_features_in_", None)
    if features is None:
        hint = "Convert it with skl2onnx yourself and push the ONNX model."
        raise Invalid(f"{name} does not say how many numbers it takes.", hint=hint)
    inputs = [("input", FloatTensorType([None, features]))]
    # Without a name skl2onnx invents a random one, and the same model would be other bytes each time.
    convert = partial(convert_sklearn, estimator, name, inputs)
    try:
        with catch_warnings(action="ignore"):  # skl2onnx reads attributes that scikit-learn will rename.
            try:
                # Probabilities as a tensor: OIP has no list of maps.
                exported = convert(options={id(estimator): {"zipmap": False}} if is_classifier(estimator) else None)
            except NameError:
                exported = convert()  # Its converter has no ZipMap to turn off.
    except Exception as error:  # Every converter has its own kinds; all of them mean that this model is not supported.
        raise Invalid(f"skl2onnx cannot export {name}: {_first_line(error)}") from error
    return _with_sorted_opsets(exported)


def _with_sorted_opsets(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with each operator domain named once and in order; skl2onnx takes them from a set."""
    newest: dict[str, int] = {}
    for opset in model.opset_import:
        newest[opset.domain] = max(opset.version, newest.get(opset.domain, 0))
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, newest[domain]) for domain in sorted(newest))
    return model


def _classes_of(estimator: Any) -> list[str] | None:
    """A classifier's class names; None for a regressor, and for several outputs at once, which have one list each."""
    classes = getattr(estimator, "classes_", None)
    if classes is None or isinstance(classes, list):
        return None
    return [str(each) for each in classes.tolist()]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
