"""From a trained model to live predictions: scikit-learn's handwritten digits, pushed to Lepton, served and called.

Run it twice if you like: the same training gives the same bytes, and the same bytes are the same version.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lepton
import numpy as np
import stamina
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

Array = NDArray[Any]

MODEL = "digits"
BATCH = 50
WANTED_ACCURACY = 0.95
LEPTON = Path(sys.executable).with_name("lepton")
EXAMPLE = Path(__file__).with_name("digit.json")
SHADES = " ░▒▓█"

console = Console(highlight=False)


def main() -> None:
    console.print("\n[bold]Lepton: from a trained model to live predictions[/]\n")
    train_images, test_images, train_labels, test_labels = split_digits()

    with step("Train", f"a small neural network on {len(train_images):,} handwritten digits"):
        model = train(train_images, train_labels)
    start_platform()
    with lepton.Client() as client:
        with step("Push", f"it as the model {MODEL!r}, and wait until it serves"):
            version = client.push(model, name=MODEL)
        note(f"version {version.version}, {version.size_bytes / 1000:.0f} kB of ONNX, sha256 {version.sha256[:12]}…")

        with step("Call", f"{len(test_images)} images it has never seen, {BATCH} a request"):
            predicted, confidence = predict_in_batches(client, test_images)
        accuracy = float(np.mean(predicted == test_labels))
        note(f"[bold green]{accuracy:.1%}[/] are read right")

        with step("Time", "the same images again, one a request, each through gateway, mesh and worker"):
            latencies_ms = time_single_calls(client, test_images)
        p50, p99 = np.percentile(latencies_ms, [50, 99])
        note(f"p50 [bold]{p50:.1f} ms[/], p99 [bold]{p99:.1f} ms[/], measured in this process")

        show_digits(test_images, test_labels, predicted, confidence)
        show_what_next(client.endpoint.url)
    if accuracy < WANTED_ACCURACY:
        sys.exit(f"{accuracy:.1%} is less than {WANTED_ACCURACY:.0%}: something between training and serving is wrong.")


def split_digits() -> tuple[Array, Array, Array, Array]:
    """Train images, test images, train labels, test labels; an image is 64 float32 from 0 (paper) to 16 (ink)."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.astype(np.float32), labels, test_size=0.25, random_state=0, stratify=labels)
    return parts[0], parts[1], parts[2], parts[3]


def train(images: Array, labels: Array) -> MLPClassifier:
    # On one thread sums are taken in one order, so that every run ends in the same weights.
    with threadpool_limits(1):
        return MLPClassifier((128, 64), max_iter=400, random_state=0).fit(images, labels)


def start_platform() -> None:
    """A platform runs: the one that LEPTON_URL names, the local one, or the local one just started."""
    if "LEPTON_URL" in os.environ:
        return
    console.print("[bold cyan]Start[/] the platform: Kafka, PostgreSQL, etcd, Envoy and Lepton's services")
    started = subprocess.run([LEPTON, "up", "--detach"], check=False)
    if started.returncode:
        sys.exit(started.returncode)  # It has said what is missing.


def predict_in_batches(client: lepton.Client, images: Array) -> tuple[Array, Array]:
    """The digit the model reads in each image, and how sure it is of it (0 to 1)."""
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    answers = [client.infer(MODEL, {"input": batch}) for batch in batches]
    labels = np.concatenate([answer["label"] for answer in answers])
    probabilities = np.concatenate([answer["probabilities"] for answer in answers])
    return labels, probabilities.max(axis=1)


def time_single_calls(client: lepton.Client, images: Array) -> list[float]:
    latencies_ms = []
    for image in images:
        start = time.perf_counter()
        client.infer(MODEL, {"input": image[np.newaxis]}, outputs=["label"])
        latencies_ms.append((time.perf_counter() - start) * 1000)
    return latencies_ms


def show_digits(images: Array, labels: Array, predicted: Array, confidence: Array) -> None:
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


def show_what_next(url: str) -> None:
    command = "lepton" if shutil.which("lepton") else os.path.relpath(LEPTON)
    example = os.path.relpath(EXAMPLE)
    console.print("\n[bold]Call it yourself[/], as any Open Inference Protocol client would:\n")
    console.print(f"  curl {url}/v2/models/{MODEL}/infer -d @{example}", soft_wrap=True)
    console.print("\n[bold]Try next[/]\n")
    for arguments, what in (
        (f"infer {MODEL} --input {example}", "the same call from the command line"),
        ("models", "what is served"),
        (f"timeline {MODEL}", "what happened to it, and when"),
        ("status", "how the platform is"),
        ("down", "end it; its data stays (also: make down)"),
    ):
        console.print(f"  {command} {arguments}", soft_wrap=True)
        console.print(f"      [dim]{what}[/]")
    console.print()


@contextmanager
def step(verb: str, what: str) -> Iterator[None]:
    """Says what is being done, and afterwards how long it took."""
    start = time.perf_counter()
    with console.status(f"[bold cyan]{verb:5}[/] {what}"):
        yield
    console.print(f"[bold cyan]{verb:5}[/] {what} [dim]({time.perf_counter() - start:.1f} s)[/]", soft_wrap=True)


def note(text: str) -> None:
    console.print(f"      {text}", soft_wrap=True)


if __name__ == "__main__":
    stamina.instrumentation.set_on_retry_hooks([])  # Its log would interrupt the story.
    try:
        main()
    except lepton.LeptonError as error:
        sys.exit(f"\n{error}")
