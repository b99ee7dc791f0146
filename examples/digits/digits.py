"""Handwritten digits, and what reads them: a small network, a better one, and one that is broken on purpose."""

import warnings
from typing import Any

import numpy as np
import onnx
from lepton.export import to_onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.text import Text
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it has no types

Array = NDArray[Any]

SHADES = " ░▒▓█"


def split_digits() -> tuple[Array, Array, Array, Array]:
    """Train images, test images, train labels, test labels; an image is 64 float32 from 0 (paper) to 16 (ink)."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.astype(np.float32), labels, test_size=0.25, random_state=0, stratify=labels)
    return parts[0], parts[1], parts[2], parts[3]


def train(images: Array, labels: Array) -> MLPClassifier:
    # On one thread sums are taken in one order, so that every run ends in the same weights.
    with threadpool_limits(1):
        return MLPClassifier((128, 64), max_iter=400, random_state=0).fit(images, labels)


def train_better(images: Array, labels: Array, seed: int) -> MLPClassifier:
    """A network that also saw each image moved by a pixel, in four directions. Another seed gives other weights."""
    squares = images.reshape(-1, 8, 8)
    moved = [np.roll(squares, way, (1, 2)) for way in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))]
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # It would go on learning; this is enough to be better.
        model = MLPClassifier((256,), max_iter=30, random_state=seed)
        return model.fit(np.concatenate(moved).reshape(-1, 64), np.tile(labels, len(moved)))


def broken(model: MLPClassifier) -> onnx.ModelProto:
    """The network behind a table of tones that has 8 where images have 17. It loads and warms up, as most bugs do."""
    exported = to_onnx(model)
    assert isinstance(exported, bytes)
    proto = onnx.load_model_from_string(exported)
    graph = proto.graph
    (pixels,) = (each.name for each in graph.input)
    for node in graph.node:
        node.input[:] = ["toned" if name == pixels else name for name in node.input]
    tones = numpy_helper.from_array(np.arange(8, dtype=np.float32), "tones")
    graph.initializer.append(tones)
    graph.node.insert(0, helper.make_node("Cast", [pixels], ["shades"], to=TensorProto.INT64))
    graph.node.insert(1, helper.make_node("Gather", ["tones", "shades"], ["toned"]))
    return proto


# --- drawing ----------------------------------------------------------------------------------------------------------


def show_digits(console: Console, images: Array, labels: Array, predicted: Array, confidence: Array) -> None:
    """Three digits read right and, to be honest, the one wrong answer that the model was surest of."""
    right = np.flatnonzero(predicted == labels)
    wrong = np.flatnonzero(predicted != labels)
    chosen = [*right[:3], *wrong[np.argsort(-confidence[wrong])][:1]]
    console.print()
    drawings = [draw(images[index]) for index in chosen]
    for line in zip(*drawings, strict=True):
        console.print(Text("   ".join(line), style="cyan"))
    captions = [caption(predicted[index], confidence[index], labels[index]) for index in chosen]
    console.print("   ".join(f"{each:^16}" for each in captions))


def draw(image: Array) -> list[str]:
    """Eight lines of sixteen characters: two a pixel, so that pixels are about square."""
    levels = np.round(image.reshape(8, 8) / 16 * (len(SHADES) - 1)).astype(int)
    return ["".join(SHADES[level] * 2 for level in row) for row in levels]


def caption(predicted: int, confidence: float, label: int) -> str:
    return f"{predicted} ({confidence:.0%})" if predicted == label else f"{predicted} ({confidence:.0%}), it's {label}"
